"""Small models of the Qwen-VL families, prompts for them, and the method once more as a plain loop over upstream."""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    ProcessorMixin,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
    Qwen2VLVideoProcessor,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import holitom_hf
from holitom_hf import HoliTomConfig
from holitom_hf.merging import merge_video_tokens

from ..reference import plain_attention, plain_inner_merge, plain_layer, plain_merge


ON = HoliTomConfig(retention_ratio=0.3, similarity_threshold=0.3, inner_merge_layer=2)
PAD, VISION_START, VISION_END, IMAGE, VIDEO = 0, 116, 117, 118, 119
MERGE, PATCH = 2, 4
QWEN3_VL = {
    "vision_config": {
        "depth": 4,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "spatial_merge_size": MERGE,
        "out_hidden_size": 32,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1, 2],
        "initializer_range": 0.2,
    },
    "text_config": {
        "vocab_size": 120,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "pad_token_id": PAD,
        "initializer_range": 0.2,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
        },
    },
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
QWEN2_5_VL = {
    "vision_config": {
        "depth": 4,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "spatial_merge_size": MERGE,
        "out_hidden_size": 64,
        "window_size": 2 * MERGE * PATCH,  # of 2 x 2 tokens
        "fullatt_block_indexes": [1, 3],
        "tokens_per_second": 2,
        "initializer_range": 0.2,
    },
    "text_config": {
        "vocab_size": 120,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "pad_token_id": PAD,
        "bos_token_id": None,
        "eos_token_id": None,
        "initializer_range": 0.15,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
    },
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
_HYBRID = {
    "layer_types": ["linear_attention", "full_attention"] * 2 + ["linear_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "rope_parameters": QWEN3_VL["text_config"]["rope_parameters"]
    | {"partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]},
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def without(values: dict, name: str) -> dict:
    return {other: value for other, value in values.items() if other != name}


QWEN3_VL_MOE = QWEN3_VL | {"text_config": QWEN3_VL["text_config"] | _EXPERTS | {"mlp_only_layers": [1]}}
QWEN3_5 = QWEN3_VL | {
    "vision_config": without(QWEN3_VL["vision_config"], "deepstack_visual_indexes"),
    "text_config": QWEN3_VL["text_config"] | _HYBRID,
}
QWEN3_5_MOE = QWEN3_5 | {
    "text_config": without(QWEN3_5["text_config"], "intermediate_size")
    | _EXPERTS
    | {"shared_expert_intermediate_size": 16}
}


CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}"
    "{% if part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% endif %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer with Qwen's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["user assistant seconds"], trainer)
    names = ["endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad"]
    tokenizer.add_special_tokens([AddedToken(f"<|{name}|>", special=True) for name in names])
    return Qwen2Tokenizer(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left"
    )


def make_processor(processor_class, video_processor_class, most_pixels: int = 8 * 16 * 32):
    """A processor of small frames: `most_pixels` are a frame's for Qwen2.5-VL, a video's for those after it."""
    sizes = {"patch_size": PATCH, "merge_size": MERGE}
    return processor_class(
        Qwen2VLImageProcessorPil(**sizes, size={"shortest_edge": 64, "longest_edge": 32 * 32}),
        make_tokenizer(),
        video_processor_class(
            **sizes, size={"shortest_edge": 64, "longest_edge": most_pixels}, cap_pixels_per_frame=False
        ),
        chat_template=CHAT_TEMPLATE,
    )


def config_for(config_class, values: dict, tokenizer, **kwargs):
    """A configuration whose tokens are a tokenizer's."""
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }
    text = values["text_config"] | {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return config_class(**values | ids | {"text_config": text}, **kwargs)


def make_patches(grid: tuple[int, int, int], seed: int, change: float = 0.2) -> torch.Tensor:
    """(P, C) patches of a video or an image: two scenes that are mostly still, a quarter that changes throughout."""
    random = torch.Generator().manual_seed(seed)
    frames, patches = grid[0], grid[1] * grid[2]
    scenes = torch.randn(2, patches, 3 * 2 * PATCH * PATCH, generator=random)
    video = torch.stack([scenes[f * 2 // frames] for f in range(frames)])
    video = video + change * torch.randn(video.shape, generator=random)
    video[:, : patches // 4] = torch.randn(frames, patches // 4, video.shape[-1], generator=random)
    return video.flatten(0, 1)


def make_prompt(*parts, seed: int = 0, is_timed: bool = True) -> torch.Tensor:
    """
    (L,) ids: a number stands for that many text tokens, a grid (T, h, w) for a video, one (h, w) for an image.
    `is_timed`: each of a video's temporal patches stands apart, with text before it.
    """
    random = torch.Generator().manual_seed(seed)

    def text(length):
        return torch.randint(3, 110, (length,), generator=random)

    def visual(token, height, width, frames=1):
        placeholders = torch.full((frames * height * width // MERGE**2,), token)
        return [torch.tensor([VISION_START]), placeholders, torch.tensor([VISION_END])]

    ids = []
    for part in parts:
        if isinstance(part, int):
            ids.append(text(part))
        elif len(part) == 2:
            ids += visual(IMAGE, *part)
        elif not is_timed:
            ids += visual(VIDEO, *part[1:], part[0])
        else:
            for _ in range(part[0]):
                ids += [text(2), *visual(VIDEO, *part[1:])]  # as "<1.5 seconds>" before every temporal patch
    return torch.cat(ids)


def token_types(ids: torch.Tensor) -> torch.Tensor:
    """0 text, 1 image, 2 video, as the processors have it."""
    return (ids == IMAGE).int() + 2 * (ids == VIDEO).int()


def inputs_of(rows: list[torch.Tensor], videos=(), images=(), side: str = "left") -> dict:
    """A batch of prompts with `videos` and `images` as lists of (grid, patches)."""
    length = max(map(len, rows))
    ids, mask = torch.full((len(rows), length), PAD), torch.zeros((len(rows), length), dtype=torch.long)
    for row, prompt in enumerate(rows):
        place = slice(length - len(prompt), None) if side == "left" else slice(0, len(prompt))
        ids[row, place], mask[row, place] = prompt, 1
    inputs = {"input_ids": ids, "mm_token_type_ids": token_types(ids)}
    if len({len(row) for row in rows}) > 1:
        inputs["attention_mask"] = mask
    return inputs | media(videos, images)


def media(videos=(), images=()) -> dict:
    """Arguments for lists of (grid, patches)."""
    found = {}
    for kind, (pixels, grids) in (
        (videos, ("pixel_values_videos", "video_grid_thw")),
        (images, ("pixel_values", "image_grid_thw")),
    ):
        if kind:
            found[pixels] = torch.cat([patches for _, patches in kind])
            found[grids] = torch.tensor([grid for grid, _ in kind])
    return found


def video(grid: tuple[int, int, int], seed: int) -> tuple[tuple[int, int, int], torch.Tensor]:
    return grid, make_patches(grid, seed)


def recording_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Eager attention that keeps its matrix on the module."""
    weights = ((query @ key.mT) * scaling).softmax(-1, dtype=torch.float32)
    module.recorded = [*getattr(module, "recorded", ()), weights]
    return (weights.to(query.dtype) @ value).transpose(1, 2).contiguous(), weights


ALL_ATTENTION_FUNCTIONS.register("recording", recording_attention)


@dataclass
class PlainVideo:
    """A video after stages 1 and 2: tokens, DeepStack's maps and sizes in the order of the placeholders they take."""

    tokens: torch.Tensor
    maps: list[torch.Tensor]
    slots: list[int]
    sizes: list[int]
    num_slots: int


class PlainQwen:
    """Upstream's weights on one row at a time without a cache, positions from upstream's `get_rope_index`."""

    def __init__(self, model, upstream_class, config):
        self.upstream = upstream_class._from_config(config, attn_implementation="eager")
        self.upstream.load_state_dict(model.state_dict())
        self.upstream.to(model.dtype).eval()
        self.config = self.upstream.config
        self.generator = PlainGenerator.over(self)
        self.encoded = {}  # of this model's videos, which many tests share

    def position_inputs(self, inputs: dict) -> dict:
        """Of what [`media`] returns, what `get_rope_index` takes."""
        return {name: inputs[name] for name in ("video_grid_thw", "image_grid_thw") if name in inputs}

    def importance(self, grid, patches) -> torch.Tensor:
        """(T, tokens): the last block's attention matrices, averaged over heads, queries and squares of patches."""
        tower = self.upstream.model.visual
        own, tower.config._attn_implementation = tower.config._attn_implementation, "recording"
        attention = tower.blocks[-1].attn
        attention.recorded = []
        tower(patches, grid_thw=torch.tensor([grid]))
        tower.config._attn_implementation = own
        received = torch.cat([weights.mean((1, 2)) for weights in attention.recorded])  # (T, P)
        return received.view(grid[0], -1, MERGE**2).mean(-1)

    @torch.no_grad()
    def encode(self, grid, patches, settings) -> PlainVideo:
        key = (grid, patches.numpy().tobytes(), repr(settings))
        if key not in self.encoded:
            self.encoded[key] = self.encode_anew(grid, patches, settings)
        return self.encoded[key]

    def encode_anew(self, grid, patches, settings) -> PlainVideo:
        found = self.upstream.model.get_video_features(patches, torch.tensor([grid]))
        frames = found.pooler_output[0].unflatten(0, (grid[0], -1))
        maps = [layer[0] for layer in getattr(found, "deepstack_features", None) or []]
        if settings.outer_method == "none" or settings.retention_ratio == 1:
            count = len(found.pooler_output[0])
            return PlainVideo(found.pooler_output[0], maps, list(range(count)), [1] * count, count)
        importance = self.importance(grid, patches)
        tokens, places, sizes = plain_merge(frames, importance, settings)
        slots = [f * frames.shape[1] + t for f, t in places]
        order = sorted(range(len(slots)), key=slots.__getitem__)
        # The linear map of the merge is held to plain sums in tests/merging/test_linear_map.py.
        merged = merge_video_tokens(frames, importance, settings)
        assert merged.place.tolist() == slots
        maps = [merged.apply(values.unflatten(0, (grid[0], -1)))[order] for values in maps]
        return PlainVideo(
            tokens[order], maps, [slots[i] for i in order], [sizes[i] for i in order], frames[..., 0].numel()
        )

    @torch.no_grad()
    def logits(self, ids, encoded, settings, prompt_length=None, videos=(), images=()) -> torch.Tensor:
        """
        (L, vocabulary) logits of one row: at a dropped position those of the last token before it that survived.

        `encoded` are its videos after [`encode`], `videos` and `images` their lists of (grid, patches),
        `prompt_length` one number or one per video.
        """
        upstream = self.upstream
        types = token_types(ids)
        inputs = media(videos, images)
        grids = self.position_inputs(inputs)
        positions, _ = upstream.model.get_rope_index(ids[None], types[None], **grids)
        embeds = upstream.get_input_embeddings()(ids)
        num_maps = len(getattr(self.config.vision_config, "deepstack_visual_indexes", ()))
        maps = torch.zeros(num_maps, *embeds.shape)
        if images:
            found = upstream.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
            embeds[types == 1] = torch.cat(list(found.pooler_output))
            for layer, features in enumerate(getattr(found, "deepstack_features", None) or []):
                maps[layer, types == 1] = torch.cat(list(features))
        owner, sizes, left = [None] * len(ids), [1] * len(ids), []
        slot = number = 0
        for place in range(len(ids)):
            if types[place] != 2:
                left.append(place)
                continue
            if slot in encoded[number].slots:
                which = encoded[number].slots.index(slot)
                embeds[place] = encoded[number].tokens[which]
                for layer in range(num_maps):
                    maps[layer, place] = encoded[number].maps[layer][which]
                owner[place] = number
                sizes[place] = encoded[number].sizes[which] if settings.proportional_attention else 1
                left.append(place)
            slot += 1
            if slot == encoded[number].num_slots:
                slot, number = 0, number + 1

        places, all_places = left, left
        decoder = upstream.model.language_model
        hidden = embeds[left][None]
        has_inner = settings.has_inner_stage
        weights = {}
        for index, layer in enumerate(decoder.layers):
            if has_inner and index == settings.inner_merge_layer:
                owners = [owner[place] for place in left]
                so_far = list(range(len(places)))
                ends = prompt_length if isinstance(prompt_length, list) else [prompt_length] * len(encoded)
                for v, end in enumerate(ends):
                    last = max(i for i, place in enumerate(all_places) if end is None or place < end)
                    visual = [i for i, place in enumerate(places) if owner[place] == v]
                    merged, keep, targets = plain_inner_merge(
                        hidden[0],
                        plain_attention(weights["last"][0], owners, last, settings)[so_far],
                        visual,
                        settings.inner_merge_ratio,
                        settings.inner_method == "merge",
                    )
                    if settings.proportional_attention:
                        for other, target in targets.items():
                            sizes[places[target]] += sizes[places[other]]
                    hidden = merged[None]
                    so_far, places = [so_far[i] for i in keep], [places[i] for i in keep]
            n = len(places)
            mask = torch.full((n, n), torch.finfo(hidden.dtype).min, dtype=hidden.dtype).triu(1)[None, None]
            mask = mask + torch.tensor([sizes[place] for place in places]).log()
            rotary = decoder.rotary_emb(hidden, positions[:, :, places])
            handle = None
            if hasattr(layer, "self_attn"):  # linear attention has no weights, and is causal by itself
                handle = layer.self_attn.register_forward_hook(lambda _, __, out: weights.update(last=out[1]))
            visual = [i for i, place in enumerate(places) if owner[place] is not None]
            method = settings.inner_method if settings.skips and index in settings.skipped_layers else None
            hidden = plain_layer(layer, hidden, mask, rotary, visual, method)
            if handle is not None:
                handle.remove()
            if index < num_maps:
                hidden = hidden + maps[index, places]
        logits = upstream.lm_head(decoder.norm(hidden))[0]
        fill = [max((i for i, p in enumerate(places) if p <= place), default=0) for place in range(len(ids))]
        return logits[fill]


def seconds_of(grids: torch.Tensor) -> torch.Tensor:
    """(V,), how long a temporal patch lasts: no whole number, and long enough for time to outrun the text behind."""
    return 0.6 * grids[:, 0] + 0.1 * grids[:, 1]


def window_order(height: int, width: int, side: int = 2) -> list[int]:
    """Tokens of a frame in the order of its windows, row by row in each."""
    return [
        y * width + x
        for top in range(0, height, side)
        for left in range(0, width, side)
        for y in range(top, min(top + side, height))
        for x in range(left, min(left + side, width))
    ]


class PlainQwen2_5(PlainQwen):  # noqa: N801 - named as upstream's classes
    """[`PlainQwen`] with seconds and windows."""

    def position_inputs(self, inputs: dict) -> dict:
        found = super().position_inputs(inputs)
        return found | (
            {"second_per_grid_ts": seconds_of(found["video_grid_thw"])} if "video_grid_thw" in found else {}
        )

    def importance(self, grid, patches) -> torch.Tensor:
        received = super().importance(grid, patches)
        placed = torch.empty_like(received)
        placed[:, window_order(grid[1] // MERGE, grid[2] // MERGE)] = received
        return placed


class PlainGenerator:
    """
    Before upstream's class: its `generate` over [`PlainQwen`], every mode of it, without a cache, one row at a time.

    Attributes:
        encoded: The videos of every row after [`PlainQwen.encode`].
    """

    @classmethod
    def over(cls, plain: PlainQwen):
        """Of a loop, with nothing to say yet; its own weights do not matter."""
        generator = type("Generator", (cls, type(plain.upstream)), {})._from_config(plain.config).eval()
        generator.plain = (plain,)  # no module of it
        return generator

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        rows = []
        for row, ids in enumerate(input_ids):
            real = ids if attention_mask is None else ids[attention_mask[row].bool()]
            which = next(i for i, p in enumerate(self.prompts) if torch.equal(real[: len(p)], p[: len(real)]))
            of_row = (self.prompt_lengths[which], self.videos[which], self.images[which])
            logits = self.plain[0].logits(real, self.encoded[which], self.settings, *of_row)
            rows.append(F.pad(logits, (0, 0, len(ids) - len(real), 0)))
        return CausalLMOutputWithPast(logits=torch.stack(rows))

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        return {"input_ids": input_ids, "attention_mask": attention_mask}


def plain_generator(plain: PlainQwen, prompts, videos, settings, prompt_lengths=None, images=None) -> PlainGenerator:
    """
    A [`PlainGenerator`] for some prompts.

    Rows are told apart by how they begin: `prompts` are (L,) ids without padding, `videos` and `images` what each has.
    """
    generator = copy.copy(plain.generator)
    generator.prompts, generator.videos, generator.settings = prompts, videos, settings
    generator.prompt_lengths = prompt_lengths or [len(prompt) for prompt in prompts]
    generator.images = images or [[]] * len(prompts)
    generator.encoded = [[plain.encode(*video, settings) for video in row] for row in videos]
    return generator


@dataclass(frozen=True)
class Family:
    """
    The classes of a family, and small models of it.

    Attributes:
        name: In the names of our classes.
        values: Of the configuration.
        upstream: transformers' class.
        trained: Names of parameters in parts of their own.
        plain: The plain loop.
        layers: Where stage 3 may run: usually, as early as can be, and as late.
        is_timed: Whether each of a video's temporal patches stands apart in the prompt, with its time before it.
        most_pixels: What the `size` of videos allows: all frames together, or each.
        grids: (T, h, w) of two videos.
        tolerance: How far logits may be off. Linear attention's norms make more of rounding: where a millionth of the
            tokens that go in is changed, upstream's logits change by 1.3e-4.
        upstream_processor, upstream_video_processor: transformers' classes.
    """

    name: str
    values: dict
    upstream: type
    trained: tuple[str, ...]
    plain: type[PlainQwen] = PlainQwen
    layers: tuple[int, int, int] = (2, 1, 4)
    is_timed: bool = True
    most_pixels: int = 8 * 16 * 32
    grids: tuple[tuple[int, int, int], ...] = ((4, 4, 8), (3, 8, 4))
    tolerance: float = 1e-5
    upstream_processor: type = Qwen3VLProcessor
    upstream_video_processor: type = Qwen3VLVideoProcessor

    def ours(self, role: str) -> type:
        """A class of the package, by the end of its name."""
        return getattr(holitom_hf, f"HoliTom{self.name}{role}")

    @property
    def generation(self) -> type:
        return self.ours("ForConditionalGeneration")

    @property
    def is_hybrid(self) -> bool:
        """Whether some of the decoder's layers have linear attention, whose states upstream can't repeat or crop."""
        return "linear_num_key_heads" in self.values["text_config"]

    @property
    def has_experts(self) -> bool:
        return "num_experts" in self.values["text_config"]

    @property
    def has_deepstack(self) -> bool:
        return "deepstack_visual_indexes" in self.values["vision_config"]

    def prompt(self, *parts, seed: int = 0) -> torch.Tensor:
        return make_prompt(*parts, seed=seed, is_timed=self.is_timed)

    def prompts(self) -> list[torch.Tensor]:
        """Of different lengths, with a video in each."""
        return [self.prompt(3, self.grids[0], 8, seed=21), self.prompt(2, self.grids[1], 3, seed=22)]

    def videos(self) -> list:
        return [video(grid, 23 + index) for index, grid in enumerate(self.grids)]

    def media(self, videos=(), images=()) -> dict:
        found = media(videos, images)
        is_asked = bool(videos) and not self.is_timed
        return found | ({"second_per_grid_ts": seconds_of(found["video_grid_thw"])} if is_asked else {})

    def inputs_of(self, rows: list[torch.Tensor], videos=(), images=(), side: str = "left") -> dict:
        return inputs_of(rows, side=side) | self.media(videos, images)

    def make_processor(self) -> ProcessorMixin:
        return make_processor(self.ours("Processor"), self.ours("VideoProcessor"), self.most_pixels)

    def make_model(self, tokenizer):
        """With random weights, all stages on."""
        torch.manual_seed(0)
        config = config_for(self.ours("Config"), self.values, tokenizer, holitom_config=ON)
        return self.generation(config).eval()

    def save(self, folder) -> None:
        """A checkpoint of ours."""
        processor = self.make_processor()
        self.make_model(processor.tokenizer).save_pretrained(folder)
        processor.save_pretrained(folder)

    def make_upstream_processor(self) -> ProcessorMixin:
        return make_processor(self.upstream_processor, self.upstream_video_processor, self.most_pixels)


_BLOCK, _LAYER = "model.visual.blocks.0.attn.qkv.weight", "model.language_model.layers.0"
_DEEPSTACK, _MERGER = "model.visual.deepstack_merger_list.1.linear_fc2.weight", "model.visual.merger.linear_fc2.weight"
FAMILIES = {
    "qwen2_5_vl": Family(
        "Qwen2_5_VL",
        QWEN2_5_VL,
        Qwen2_5_VLForConditionalGeneration,
        (_BLOCK, "model.visual.merger.mlp.0.weight", f"{_LAYER}.self_attn.q_proj.weight"),
        plain=PlainQwen2_5,
        is_timed=False,
        most_pixels=16 * 32,
        grids=((4, 6, 10), (3, 8, 4)),  # three windows of 2 x 2 tokens and more, at the edges smaller ones
        upstream_processor=Qwen2_5_VLProcessor,
        upstream_video_processor=Qwen2VLVideoProcessor,
    ),
    "qwen3_vl": Family(
        "Qwen3VL",
        QWEN3_VL,
        Qwen3VLForConditionalGeneration,
        (_BLOCK, _DEEPSTACK, f"{_LAYER}.self_attn.q_norm.weight"),
    ),
    "qwen3_vl_moe": Family(
        "Qwen3VLMoe",
        QWEN3_VL_MOE,
        Qwen3VLMoeForConditionalGeneration,
        (_BLOCK, _DEEPSTACK, f"{_LAYER}.mlp.experts.gate_up_proj", f"{_LAYER}.mlp.gate.weight"),
    ),
    "qwen3_5": Family(
        "Qwen3_5",
        QWEN3_5,
        Qwen3_5ForConditionalGeneration,
        (_BLOCK, _MERGER, f"{_LAYER}.linear_attn.in_proj_qkv.weight", f"{_LAYER}.linear_attn.A_log"),
        layers=(2, 2, 4),
        tolerance=5e-4,
    ),
    "qwen3_5_moe": Family(
        "Qwen3_5Moe",
        QWEN3_5_MOE,
        Qwen3_5MoeForConditionalGeneration,
        (_BLOCK, _MERGER, f"{_LAYER}.linear_attn.in_proj_qkv.weight", f"{_LAYER}.mlp.experts.gate_up_proj"),
        layers=(2, 2, 4),
        tolerance=5e-4,
    ),
}
CHECKPOINTS = {name: family.save for name, family in FAMILIES.items()}
