"""Small LLaVA-Videos, prompts for them, and the model once more as plain operations over upstream's weights."""

import copy
import math

import torch
import torch.nn.functional as F
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, LlavaOnevisionImageProcessorPil

from holitom_hf import (
    HoliTomConfig,
    HoliTomLlavaVideoConfig,
    HoliTomLlavaVideoForConditionalGeneration,
    HoliTomLlavaVideoProcessor,
    HoliTomLlavaVideoVideoProcessor,
)
from holitom_hf.bundled.tiny_model import CHAT_TEMPLATE, tiny_tokenizer

from ..conftest import SMALL, VIDEO_TOKEN, make_prompt, make_video
from ..reference import PlainModel, PlainVideo, plain_merge


# 7 patches along a side: 4 tokens that begin there, 3 that fit.
SIDE, PATCH = 28, 4
VALUES = SMALL | {
    "vision_config": SMALL["vision_config"] | {"image_size": SIDE},
    "image_grid_pinpoints": [[SIDE, SIDE], [SIDE, 2 * SIDE]],
}
# Pooling and newlines, and what they come to: tokens along a side, tokens of F frames.
LAYOUTS = {
    ("average", "grid"): (3, lambda frames: frames * 12),
    ("max", "grid"): (3, lambda frames: frames * 12),
    ("bilinear", "grid"): (4, lambda frames: frames * 20),
    ("average", "one_token"): (3, lambda frames: frames * 9 + 1),
    ("bilinear", "one_token"): (4, lambda frames: frames * 16 + 1),
}
ON = HoliTomConfig(retention_ratio=0.3, similarity_threshold=0.3, inner_merge_layer=2)


def small_model(
    mode: str = "average", newlines: str = "grid", **settings
) -> HoliTomLlavaVideoForConditionalGeneration:
    torch.manual_seed(0)
    config = HoliTomLlavaVideoConfig(
        **copy.deepcopy(VALUES),
        spatial_pool_mode=mode,
        newline_layout=newlines,
        holitom_config=HoliTomConfig.from_dict(ON.to_dict() | settings),
    )
    model = HoliTomLlavaVideoForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5 if parameter.ndim > 1 else 1.0)
    return model


def video(num_frames: int, seed: int, **kwargs) -> torch.Tensor:
    """(F, 3, H, W)."""
    return make_video(num_frames, seed, **kwargs)[..., :SIDE, :SIDE]


def prompt(*parts: int | str, layout=("average", "grid"), seed: int = 0) -> torch.Tensor:
    """(L,) ids; "video:F" stands for a video of F frames."""
    ids = []
    for number, part in enumerate(parts):
        if isinstance(part, str) and part.startswith("video:"):
            ids.append(torch.full((LAYOUTS[layout][1](int(part.split(":")[1])),), VIDEO_TOKEN))
        else:
            ids.append(make_prompt(part, seed=100 * seed + number))
    return torch.cat(ids)


def small_processor(mode: str = "average", newlines: str = "grid", **kwargs) -> HoliTomLlavaVideoProcessor:
    size = {"height": SIDE, "width": SIDE}
    return HoliTomLlavaVideoProcessor(
        LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=[[SIDE, SIDE]]),
        tiny_tokenizer(),
        HoliTomLlavaVideoVideoProcessor(size=size, **kwargs),
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
        spatial_pool_mode=mode,
        newline_layout=newlines,
    )


def save(folder, is_told: bool = False) -> None:
    """
    A checkpoint of ours; `is_told`: with the time instruction, whose last token is that of the line's end, too, as of
    Qwen's tokenizer.
    """
    processor = small_processor(add_time_instruction=is_told)
    if is_told:
        processor.tokenizer.add_tokens([".\n"])
    tokens = {"image_token_index": processor.image_token_id, "video_token_index": processor.video_token_id}
    text = VALUES["text_config"] | {"vocab_size": len(processor.tokenizer), "initializer_range": 0.2}
    torch.manual_seed(0)
    config = HoliTomLlavaVideoConfig(**copy.deepcopy(VALUES) | tokens | {"text_config": text}, holitom_config=ON)
    HoliTomLlavaVideoForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)


class PlainLlavaVideo(PlainModel):
    """The plain loop, from the tower's hidden states on: projected, pooled and broken into lines as written here."""

    def __init__(self, model):
        own = (
            "holitom_config",
            "auto_map",
            "model_type",
            "spatial_pool_mode",
            "spatial_pool_stride",
            "newline_layout",
        )
        self.mode, self.newlines = model.config.spatial_pool_mode, model.config.newline_layout
        config = LlavaOnevisionConfig(**{n: v for n, v in model.config.to_dict().items() if n not in own})
        self.upstream = LlavaOnevisionForConditionalGeneration._from_config(config, attn_implementation="eager")
        self.upstream.load_state_dict(model.state_dict())
        self.upstream.eval()
        self.config = self.upstream.config

    def pooled(self, patches: torch.Tensor) -> torch.Tensor:
        """(F, P, D) -> (F, T, D)."""
        side = math.isqrt(patches.shape[1])
        grid = patches.transpose(1, 2).reshape(len(patches), -1, side, side)
        if self.mode == "bilinear":
            grid = F.interpolate(grid, size=(-(-side // 2),) * 2, mode="bilinear")
        else:
            grid = {"average": F.avg_pool2d, "max": F.max_pool2d}[self.mode](grid, 2)
        return grid.flatten(2).transpose(1, 2)

    def importance(self, frames: torch.Tensor) -> torch.Tensor:
        attention = self.upstream.model.vision_tower(frames, output_attentions=True).attentions[-1].mean((1, 2))
        return self.pooled(attention[..., None])[..., 0]

    @torch.no_grad()
    def features(self, frames: torch.Tensor) -> torch.Tensor:
        """(F, T, D)."""
        states = self.upstream.model.vision_tower(frames, output_hidden_states=True).hidden_states[-1]
        projector = self.upstream.model.multi_modal_projector
        return self.pooled(projector.linear_2(F.gelu(projector.linear_1(states))))

    def whole(self, features: torch.Tensor) -> torch.Tensor:
        """All tokens of an uncompressed video, one after another."""
        newline, width = self.upstream.model.image_newline.detach(), round(features.shape[1] ** 0.5)
        tokens = []
        for frame in features:
            for place, token in enumerate(frame):
                tokens.append(token)
                if self.newlines == "grid" and place % width == width - 1:
                    tokens.append(newline)
        return torch.stack(tokens + [newline] * (self.newlines == "one_token"))

    @torch.no_grad()
    def encode(self, frames: torch.Tensor, settings) -> PlainVideo:
        features = self.features(frames)
        whole = self.whole(features)
        if settings.outer_method == "none" or settings.retention_ratio == 1:
            return PlainVideo(whole, len(whole), list(range(len(whole))), [1] * len(whole))
        newline = self.upstream.model.image_newline.detach()
        if self.newlines == "grid":
            settings = settings.overlaid({"newline_position": "row"})
        tokens, places, sizes = plain_merge(features, self.importance(frames), settings, newline)
        if settings.newline_position == "end":
            tokens, sizes = torch.cat([tokens, newline[None]]), [*sizes, 1]
        slots = list(range(len(tokens)))
        if settings.position_ids == "kept" and self.newlines == "grid":
            width = round(features.shape[1] ** 0.5)
            rows = [(f, t // width) for f, t in places]
            # A row's last entry is its newline.
            is_newline = [i + 1 == len(rows) or rows[i + 1] != row for i, row in enumerate(rows)]
            slots = [
                f * width * (width + 1) + t // width * (width + 1) + (width if newline else t % width)
                for (f, t), newline in zip(places, is_newline)
            ]
        elif settings.position_ids == "kept":
            slots = [f * features.shape[1] + t for f, t in places] + [len(whole) - 1]
            order = sorted(range(len(slots)), key=slots.__getitem__)
            tokens, slots, sizes = tokens[order], [slots[i] for i in order], [sizes[i] for i in order]
        return PlainVideo(tokens, len(whole), slots, sizes)
