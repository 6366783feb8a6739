"""
Random batches, videos and settings of every backbone: generation with the cache against the plain loop.

`pytest tests/models/test_fuzzing.py --fuzz-cases 5000` for a longer run: half of them LLaVA-OneVision's, an
eighth each LLaVA-Video's and the Qwen-VLs'.
"""

import functools
from itertools import chain

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from holitom_hf import (
    HoliTomConfig,
    HoliTomLlavaOnevisionConfig,
    HoliTomLlavaOnevisionForConditionalGeneration,
    HoliTomLlavaVideoConfig,
    HoliTomLlavaVideoForConditionalGeneration,
)
from holitom_hf.models.upstream import cache_of

from ..conftest import FUZZ_CASES, pad_batch
from ..reference import PlainModel
from . import qwen
from .llava_video import PlainLlavaVideo
from .qwen import PlainQwen2_5, seconds_of


LAYERS, VIDEO, PAD = 3, 61, 0


@functools.cache
def llava_models(grid: int, mode: str | None = None, newlines: str | None = None):
    """
    A model whose frames have grid x grid patches, pooled to half of it, and its plain counterpart: LLaVA-OneVision, or
    with a way of pooling and newlines LLaVA-Video.
    """
    torch.manual_seed(grid)
    config_class, own = HoliTomLlavaOnevisionConfig, {}
    if mode is not None:
        config_class, own = HoliTomLlavaVideoConfig, {"spatial_pool_mode": mode, "newline_layout": newlines}
    config = config_class(
        **own,
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 2 * grid,
            "patch_size": 2,
            "vision_use_head": False,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": 62,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": PAD,
        },
        image_token_index=60,
        video_token_index=VIDEO,
        holitom_config=HoliTomConfig(inner_merge_layer=None),
    )
    model_class = HoliTomLlavaOnevisionForConditionalGeneration
    if mode is not None:
        model_class = HoliTomLlavaVideoForConditionalGeneration
    model = model_class(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2.0 if weight.ndim > 1 else 1.0)
    return model, (PlainModel if mode is None else PlainLlavaVideo)(model)


def num_placeholders(num_frames: int, grid: int, mode: str | None = None, newlines: str | None = None) -> int:
    """Of a video for one of [`llava_models`]."""
    side = grid // 2 if mode in ("average", "max") else -(-grid // 2)
    return num_frames * side * (side + 1) if newlines == "grid" else num_frames * side**2 + 1


@functools.cache
def qwen_models(name: str) -> tuple[torch.nn.Module, qwen.PlainQwen]:
    """A small model of a Qwen-VL family, and its plain counterpart."""
    torch.manual_seed(0)
    family = qwen.FAMILIES[name]
    config = family.ours("Config")(**family.values, holitom_config=HoliTomConfig(inner_merge_layer=None))
    model = family.generation(config).eval()
    plain = PlainQwen2_5 if name == "qwen2_5_vl" else qwen.PlainQwen
    return model, plain(model, family.upstream, family.upstream.config_class(**family.values))


CONFIGS = st.builds(
    HoliTomConfig,
    retention_ratio=st.sampled_from([0.02, 0.1, 0.25, 0.5, 0.8, 1.0]),
    similarity_threshold=st.sampled_from([0.2, 0.6, 0.8, 0.95]),
    max_segment_frames=st.sampled_from([None, None, 1, 2]),
    cluster_neighbors=st.sampled_from([2, 7]),
    cluster_center_weight=st.sampled_from([0.6, 0.25]),
    contextual_ratio=st.sampled_from([0.0, 0.0, 0.5]),
    inner_merge_layer=st.sampled_from([None, 1, 2]),
    inner_merge_ratio=st.sampled_from([0.0, 0.3, 0.5, 0.9]),
    outer_method=st.sampled_from(["holitom", "holitom", "none"]),
    inner_method=st.sampled_from(["merge", "merge", "prune", "prune_by_question", "none"]),
    position_ids=st.sampled_from(["packed", "packed", "kept"]),
    proportional_attention=st.booleans(),
    exact_budget=st.booleans(),
)


# A row: parts in any order, text last. A number is that many text tokens.
def rows_of(*parts):
    row = st.tuples(st.lists(st.one_of(st.integers(0, 3), *parts), max_size=4), st.integers(1, 4))
    return st.lists(row.map(lambda drawn: [*drawn[0], drawn[1]]), min_size=1, max_size=3)


# (f,) is a video of f frames.
LLAVA_ROWS = rows_of(st.tuples(st.integers(1, 4)))
# Patches along a side, pooling, newlines.
LLAVA_VIDEOS = st.tuples(
    st.sampled_from([4, 5, 6]), st.sampled_from(["average", "max", "bilinear"]), st.sampled_from(["grid", "one_token"])
)
# (f, h, w) is a video of f temporal patches of h x w patches, (h, w) an image.
SIDES = st.sampled_from([4, 6, 8])
QWEN_ROWS = rows_of(st.tuples(st.integers(1, 4), SIDES, SIDES), st.tuples(SIDES, SIDES))
SIDE, CHANGE, SEED = st.sampled_from(["left", "right"]), st.sampled_from([0.05, 0.5, 2.0]), st.integers(0, 2**20)


def check_case(model, inputs, prompts, side, random, expected, first_positions=None):
    """
    A batch of prompts, and two more tokens of each row, whatever they are, through the cache.

    `expected` is the plain loop: logits of a row of ids, of which the first so many are the prompt. `first_positions`
    are passed where upstream's forward alone would count padding as positions; then later ones are passed, too.
    """
    settings, mask = inputs["holitom_config"], inputs["attention_mask"]
    given = {} if first_positions is None else {"position_ids": first_positions}
    with torch.no_grad():
        outputs = model(**inputs, **given, use_cache=True)
        for row, prompt in enumerate(prompts):
            logits = expected(row, prompt, len(prompt))
            torch.testing.assert_close(outputs.logits[row][mask[row].bool()], logits, atol=1e-4, rtol=1e-4)
        lengths = [len(prompt) for prompt in prompts]
        for step in range(2):
            token = torch.randint(1, 59, (len(prompts), 1), generator=random)
            mask = torch.cat([mask, torch.ones_like(token)], 1)
            if first_positions is not None:
                given = {"position_ids": mask.sum(1, keepdim=True) - 1}
            outputs = model(
                input_ids=token, attention_mask=mask, **given, cache=cache_of(outputs), holitom_config=settings
            )
            if step == 1 and side == "left":
                generated = model.generate(**inputs, max_new_tokens=1, do_sample=False)
                assert torch.equal(generated[:, :-1], inputs["input_ids"])
            prompts = [torch.cat([prompt, token[row]]) for row, prompt in enumerate(prompts)]
            for row, prompt in enumerate(prompts):
                logits = expected(row, prompt, lengths[row])
                torch.testing.assert_close(outputs.logits[row, -1], logits[-1], atol=1e-4, rtol=1e-4)


def check_llava(which, rows, config, side, change, seed):
    (grid, *_), (model, plain) = which, llava_models(*which)
    random = torch.Generator().manual_seed(seed)
    prompts, videos = [], []
    for row in rows:
        ids, row_videos = [], []
        for part in row:
            if isinstance(part, int):
                ids.append(torch.randint(1, 59, (part,), generator=random))
                continue
            ids.append(torch.full((num_placeholders(part[0], *which),), VIDEO))
            still = torch.randn(1, 3, 2 * grid, 2 * grid, generator=random)
            row_videos.append(still + change * torch.randn(part[0], 3, 2 * grid, 2 * grid, generator=random))
        prompts.append(torch.cat(ids))
        videos.append(row_videos)
    ids, mask = pad_batch(prompts, side)
    inputs = {"input_ids": ids, "attention_mask": mask, "holitom_config": config}
    if any(videos):
        inputs["pixel_values_videos"] = [video for row in videos for video in row]
    encoded = [[plain.encode(video, config) for video in row] for row in videos]

    def expected(row, ids, prompt_length):
        return plain.logits(ids, None, config, prompt_length, encoded=encoded[row])

    check_case(model, inputs, prompts, side, random, expected, (mask.cumsum(1) - 1).clamp_min(0))


def check_qwen(name, rows, config, side, change, seed):
    model, plain = qwen_models(name)
    random = torch.Generator().manual_seed(seed)
    prompts, videos, images = [], [], []
    for number, row in enumerate(rows):
        prompts.append(qwen.make_prompt(*row, seed=seed + number, is_timed=name == "qwen3_vl"))
        media = [
            (grid := part if len(part) == 3 else (1, *part), qwen.make_patches(grid, seed + 10 * number + i, change))
            for i, part in enumerate(row)
            if not isinstance(part, int)
        ]
        kinds = [len(part) for part in row if not isinstance(part, int)]
        videos.append([medium for medium, kind in zip(media, kinds) if kind == 3])
        images.append([medium for medium, kind in zip(media, kinds) if kind == 2])
    inputs = qwen.inputs_of(prompts, list(chain(*videos)), list(chain(*images)), side)
    inputs |= {"attention_mask": pad_batch(prompts, side)[1], "holitom_config": config}
    if name == "qwen2_5_vl" and any(videos):
        inputs["second_per_grid_ts"] = seconds_of(inputs["video_grid_thw"])
    encoded = [[plain.encode(*video, config) for video in row] for row in videos]

    def expected(row, ids, prompt_length):
        return plain.logits(ids, encoded[row], config, prompt_length, videos[row], images[row])

    is_text = not any(videos) and not any(images)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0) if is_text else None
    check_case(model, inputs, prompts, side, random, expected, positions)


# How to check a case, which models there are, what rows are drawn, and the part of `--fuzz-cases` that is drawn: cases
# with grids take about three times as long.
BACKBONES = {
    "llava_onevision": (check_llava, st.tuples(st.sampled_from([4, 5, 6])), LLAVA_ROWS, 2),
    "llava_video": (check_llava, LLAVA_VIDEOS, LLAVA_ROWS, 8),
    "qwen2_5_vl": (check_qwen, st.just("qwen2_5_vl"), QWEN_ROWS, 8),
    "qwen3_vl": (check_qwen, st.just("qwen3_vl"), QWEN_ROWS, 8),
}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_random_cases_agree_with_the_plain_loop(request, backbone):
    num_cases = request.config.getoption("--fuzz-cases")
    check, which, rows, part = BACKBONES[backbone]

    @settings(
        max_examples=num_cases // part,
        deadline=None,
        derandomize=num_cases == FUZZ_CASES,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    @given(which, rows, CONFIGS, SIDE, CHANGE, SEED)
    def run(which, rows, config, side, change, seed):
        check(which, rows, config, side, change, seed)

    run()
