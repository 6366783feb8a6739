"""Upstream's class against ours, step by step, in one process."""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from ..answering.savings import cache_bytes
from ..configuration import HoliTomConfig
from ..merging.outer import merge_videos
from ..merging.segmentation import choose_segments, count_static_tokens, frame_similarity, similarity_runs
from ..models.compression import in_slot_order
from ..models.upstream import CACHE_NAME, cache_of
from ..sequence.compaction import compact_prompt
from .measuring import Spread, alternate, count_operations, count_waits, peak_bytes, seconds, wait_for
from .models import Contest, contest
from .stage_benchmark import machine_limits
from .synthetic import write_clip


# What is measured of both models, in the order of a forward pass; of the others only ours has something.
SHARED_STEPS = ("decode", "preprocess", "vision_tower", "prefill", "first_token", "answer", "end_to_end")
# Of these a variant of HoliTom, with other settings of the vision tower, has a measurement, too.
VARIED_STEPS = ("vision_tower", "first_token", "end_to_end")
OWN_STEPS = ("importance", "segmentation", "merging", "compaction")
CLIP_SECONDS = 10


@dataclass
class ModelResult:
    """
    What a contest came to.

    Attributes:
        steps: Seconds by step and by model: `"plain"`, `"holitom"`, and in [`VARIED_STEPS`] HoliTom's variants.
            `merging` is what stages 1 and 2 take beyond `segmentation`, `answer` the tokens after the first.
        tokens: Positions of the prompt in the decoder: `plain`, `outer` and `inner`, the last of them from stage 3 on.
        new_tokens: Tokens of an answer.
        cache_bytes: Keys and values after the prompt, by model.
        peak_bytes: Most memory that a first token and a whole answer needed beyond weights and inputs, by model.
        operations: Launches and waits of what only ours does.
        computed_patches: Share of the patches that the vision tower computes in its later layers, by variant.
        tower_share: Of the operations that the device multiplies large matrices with, what the vision tower and the
            projector reach in ours.
        throughput: Largest batch that fitted and its tokens a second, by model; empty where not asked for.
        plain: What the plain model is: upstream's class, or ours uncompressed where transformers has none.
    """

    steps: dict[str, dict[str, Spread]]
    tokens: dict[str, int]
    new_tokens: int
    cache_bytes: dict[str, int]
    peak_bytes: dict[str, dict[str, int | None]]
    operations: dict[str, int | None]
    tower_share: float
    throughput: dict[str, dict[str, float]] = field(default_factory=dict)
    computed_patches: dict[str, float] = field(default_factory=dict)
    plain: str = "upstream"

    def ratio(self, step: str, model: str = "holitom") -> float:
        """How many times faster than upstream's a model of ours is."""
        return self.steps[step]["plain"].median / self.steps[step][model].median

    @property
    def own_share(self) -> float:
        """What HoliTom adds before the decoder, as a share of the plain model's time to first token."""
        own = sum(self.steps[step]["holitom"].median for step in OWN_STEPS)
        return own / self.steps["first_token"]["plain"].median


@torch.inference_mode()
def run_model_benchmark(
    config,
    num_frames: int = 32,
    batch_size: int = 1,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    static_share: float = 0.6,
    new_tokens: int = 32,
    rounds: int = 5,
    largest_batch: int | None = None,
    compile_vision: bool = False,
    variants: dict[str, dict] | None = None,
    progress=iter,
    size: tuple[int, int] | None = None,
) -> ModelResult:
    """
    Measures upstream's class and ours over the same random weights.

    Args:
        config: Architecture and settings, of any backbone in `MEASURED`.
        num_frames: Of each video.
        batch_size: Prompts at once, each with a video.
        device, dtype, attention: Of the models.
        static_share: Share of the tokens that repeat, see [`synthetic_features`].
        new_tokens: Tokens of an answer, at least 2.
        rounds: How often each step is measured; the models take turns.
        largest_batch: Measure throughput, too, at the largest power of 2 up to this that fits.
        compile_vision: Run the vision tower through `torch.compile`.
        variants: By name, settings that a variant of HoliTom has in place of the config's.
        progress: Wraps the rounds, as a progress bar does.
        size: Height and width of frames in pixels, where the backbone takes several; default: its usual one.

    Raises:
        ValueError: If the settings don't shorten anything, an answer has fewer than 2 tokens, or the backbone takes no
            frames of this size.
    """
    if new_tokens < 2:
        raise ValueError(f"an answer needs at least 2 tokens to be measured, got {new_tokens}")
    if not config.holitom_config.has_outer_stage or config.holitom_config.outer_method != "holitom":
        raise ValueError("the benchmark is of HoliTom: outer_method must be holitom and retention_ratio below 1")
    game = contest(config, num_frames, batch_size, torch.device(device), dtype, attention, static_share, size)
    if compile_vision:
        for model in game.models.values():
            game.backbone.tower(model).compile()
    encoded = game.encode(game.models["holitom"], return_vision_states=False)
    variants = {name: config.holitom_config.overlaid(settings) for name, settings in (variants or {}).items()}
    with tempfile.TemporaryDirectory() as folder:
        clip = Path(folder) / "clip.mp4"
        write_clip(clip, max(CLIP_SECONDS, num_frames / 25), size=game.backbone.clip_size)
        clocks = {name: _Stopwatch(game.device) for name in game.models}
        calls = _calls(game, encoded, clip, new_tokens, clocks, variants)
        times = alternate(calls, game.device, rounds, progress=progress)
    # What is left of stages 1 and 2 besides the segmentation of the same round.
    pairs = zip(times["merging holitom"], times["segmentation holitom"])
    times["merging holitom"] = [max(0.0, both - first) for both, first in pairs]
    for name, clock in clocks.items():
        times[f"answer {name}"] = clock.after_first[-rounds:]
    steps = {}
    for name, values in times.items():
        step, model = name.split()
        steps.setdefault(step, {})[model] = Spread.of(values)

    operations = game.backbone.operations
    tower_flops = batch_size * (operations.vision_tower + operations.projector)
    limit = machine_limits(game.device, dtype).operations_per_second
    caches = {name: cache_of(_prefill(model, game)) for name, model in game.models.items()}
    record = caches["holitom"].compressed_sequence

    def own_work():
        _merge(game, encoded)

    result = ModelResult(
        steps=steps,
        tokens={
            "plain": game.input_ids.shape[1],
            "outer": record.outer_mask.shape[1],
            "inner": record.inner_mask.shape[1],
        },
        new_tokens=new_tokens,
        cache_bytes={name: cache_bytes(cache) for name, cache in caches.items()},
        peak_bytes={
            step: {name: peak_bytes(calls[f"{step} {name}"], game.device) for name in game.models}
            for step in ("first_token", "answer")
        },
        operations={
            "merging_launches": count_operations(own_work).launches,
            "merging_waits": count_waits(own_work) if game.device.type == "cuda" else None,
        },
        tower_share=tower_flops / steps["vision_tower"]["holitom"].median / limit,
        computed_patches={
            name: _computed_share(game, settings)
            for name, settings in ({"holitom": config.holitom_config} | variants).items()
            if settings.has_vision_stage
        },
        plain="upstream" if config.backbone.has_upstream else "uncompressed",
    )
    del caches, record
    if largest_batch:
        result.throughput = {
            name: _throughput(game, model, new_tokens, largest_batch, rounds) for name, model in game.models.items()
        }
    return result


class _Stopwatch(BaseStreamer):
    """Seconds that the tokens after the first took, answer by answer."""

    def __init__(self, device: torch.device):
        self.device, self.num_puts, self.after_first = device, 0, []

    def put(self, value):
        """Overrides BaseStreamer.put: the first call brings the prompt, the second the first token."""
        self.num_puts += 1
        if self.num_puts == 2:
            wait_for(self.device)
            self.start = time.perf_counter()

    def end(self):
        """Overrides BaseStreamer.end."""
        wait_for(self.device)
        self.after_first.append(time.perf_counter() - self.start)
        self.num_puts = 0


def _calls(
    game: Contest,
    encoded,
    clip: Path,
    new_tokens: int,
    clocks: dict[str, _Stopwatch],
    variants: dict[str, HoliTomConfig],
) -> dict[str, Callable]:
    """The steps as functions, in the order in which they take turns."""
    ours, backbone = game.models["holitom"], game.backbone
    processor = backbone.processor()
    frames, _ = processor.decode(str(clip))

    def preprocess(videos):
        pixels = backbone.preprocess(processor, videos, game.device)["pixel_values_videos"]
        return pixels.to(game.device, game.features.dtype)

    def segmentation():
        for video in ours.model.video_tokens(encoded):
            runs = similarity_runs(frame_similarity(video.features), ours.config.holitom_config.similarity_threshold)
            choose_segments(count_static_tokens(runs))

    videos = ours.model.video_tokens(encoded)
    merged, embeddings = _merge(game, encoded)
    embeds = ours.get_input_embeddings()(game.input_ids)
    is_video = game.input_ids == ours.config.video_token_id

    def compaction():
        slots = [ours.model.token_slots(tokens, video) for tokens, video in zip(merged, videos)]
        _, ordered, slots = in_slot_order(merged, embeddings, slots)
        num_slots = [video.num_slots for video in videos]
        compact_prompt(embeds, is_video, torch.ones_like(is_video), ordered, num_slots, slots)

    calls = {"decode plain": lambda: processor.decode(str(clip)), "preprocess plain": lambda: preprocess(frames)}
    calls |= {"decode holitom": calls["decode plain"], "preprocess holitom": calls["preprocess plain"]}
    calls |= {
        "importance holitom": backbone.importance(ours, game.media),
        "segmentation holitom": segmentation,
        "merging holitom": lambda: _merge(game, encoded),
        "compaction holitom": compaction,
    }

    def end_to_end(model, **kwargs):
        pixels = preprocess(processor.decode(str(clip))[0])
        _generate(model, game.with_video(pixels) | kwargs, new_tokens)

    for name, model in game.models.items():
        replay = _decoder_call(model, game)
        calls[f"vision_tower {name}"] = _vision_call(model, game)
        calls[f"prefill {name}"] = replay
        calls[f"first_token {name}"] = partial(_prefill, model, game)
        calls[f"answer {name}"] = partial(_generate, model, game.inputs(), new_tokens, clocks[name])

        calls[f"end_to_end {name}"] = partial(end_to_end, model)
    for name, settings in variants.items():
        calls[f"vision_tower {name}"] = _vision_call(ours, game, settings)
        calls[f"first_token {name}"] = partial(_prefill, ours, game, holitom_config=settings)
        calls[f"end_to_end {name}"] = partial(end_to_end, ours, holitom_config=settings)
    return calls


def _vision_call(model, game: Contest, settings: HoliTomConfig | None = None) -> Callable:
    """Vision tower, projector and pooling; in ours without importance, which is a step of its own."""
    if model is game.models["plain"]:
        return lambda: game.encode(model)
    settings = replace(settings or model.config.holitom_config, outer_method="none")
    return lambda: game.encode(model, holitom_config=settings, return_vision_states=False)


def _computed_share(game: Contest, settings: HoliTomConfig) -> float:
    """Share of the patches that our tower computes in its later layers."""
    computed = game.encode(game.models["holitom"], holitom_config=settings).computed_patches
    return float(torch.cat(computed).float().mean())


def _decoder_call(model, game: Contest) -> Callable:
    """The decoder alone, with what the model passes to it."""
    seen = {}

    def remember(module, args, kwargs):
        seen.update(kwargs)

    handle = model.model.language_model.register_forward_pre_hook(remember, with_kwargs=True)
    _prefill(model, game)
    handle.remove()
    decoder = model.model.language_model
    return lambda: decoder(**{**seen, CACHE_NAME: DynamicCache(config=decoder.config)})


def _prefill(model, game: Contest, **kwargs):
    return model(**game.inputs(), logits_to_keep=1, use_cache=True, **kwargs)


def _generate(model, inputs: dict[str, torch.Tensor], new_tokens: int, streamer: BaseStreamer | None = None) -> None:
    length = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
    model.generate(**inputs, **length, do_sample=False, pad_token_id=0, streamer=streamer)


def _merge(game: Contest, encoded):
    """Stages 1 and 2 of all videos, with their further feature maps."""
    model = game.models["holitom"]
    videos = model.model.video_tokens(encoded)
    merged, embeddings = merge_videos(videos, model.config.holitom_config)
    for tokens, video in zip(merged, videos):
        for features in video.maps:
            tokens.apply(features)
    return merged, embeddings


def _throughput(game: Contest, model, new_tokens: int, largest: int, rounds: int) -> dict[str, float]:
    """Prompts and tokens a second of whole answers, for the largest batch that fits."""
    best, rows = {}, 1
    while rows <= largest:
        answer = partial(_generate, model, game.inputs(rows), new_tokens)
        try:
            answer()  # a device's memory is handed out for the first one
        except torch.OutOfMemoryError:
            break
        elapsed = statistics.median(seconds(answer, game.device) for _ in range(rounds))
        best = {
            "batch_size": rows,
            "seconds": elapsed,
            "prompts_per_second": rows / elapsed,
            "tokens_per_second": rows * new_tokens / elapsed,
        }
        rows *= 2
    if game.device.type == "cuda":
        torch.cuda.empty_cache()
    return best
