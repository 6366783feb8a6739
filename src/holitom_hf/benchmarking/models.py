"""Upstream's model and ours over the same random weights, and what both are asked."""

import copy
from dataclasses import dataclass

import torch
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..models.llava_onevision.configuration import HoliTomLlavaOnevisionConfig
from ..models.llava_onevision.modeling import HoliTomLlavaOnevisionForConditionalGeneration
from .synthetic import SyntheticPooling, synthetic_features, synthetic_pixels


NUM_TEXT_BEFORE, NUM_TEXT_AFTER = 14, 20  # tokens of a conversation's frame and of a short question


@dataclass
class Contest:
    """
    Two models and the same question for both.

    Attributes:
        models: `"plain"`, upstream's class, and `"holitom"`; they share their weights.
        input_ids: (B, L) with F*T+1 placeholders a row.
        pixels: (B, F, 3, H, W).
        features: (B*F, T, D), what both see behind the pooling.
    """

    models: dict[str, LlavaOnevisionForConditionalGeneration]
    input_ids: torch.Tensor
    pixels: torch.Tensor
    features: torch.Tensor

    @property
    def device(self) -> torch.device:
        """Where both models are."""
        return self.input_ids.device

    def inputs(self, rows: int | None = None) -> dict[str, torch.Tensor]:
        """The question as both models take it; `rows` repeats the first."""
        ids, pixels = self.input_ids, self.pixels
        if rows is not None:
            ids, pixels = ids[:1].repeat(rows, 1), pixels[:1].repeat(rows, 1, 1, 1, 1)
        return {"input_ids": ids, "pixel_values_videos": pixels, "attention_mask": torch.ones_like(ids)}

    def encoded(self) -> BaseModelOutputWithPooling:
        """What our vision tower makes of the pixels."""
        return self.models["holitom"].get_video_features(self.pixels, return_vision_states=False, return_dict=True)


@torch.no_grad()
def random_models(
    config: HoliTomLlavaOnevisionConfig, device: torch.device, dtype: torch.dtype, attention: str = "sdpa"
) -> dict[str, LlavaOnevisionForConditionalGeneration]:
    """
    Both classes with the same random weights, made on the device: no second copy, nothing read.

    Args:
        config: Of ours.
        device, dtype: Of the weights.
        attention: An `attn_implementation`.
    """
    plain = LlavaOnevisionConfig(
        **{name: value for name, value in config.to_dict().items() if name not in ("holitom_config", "auto_map")}
    )
    with torch.device("meta"):
        ours = HoliTomLlavaOnevisionForConditionalGeneration._from_config(
            copy.deepcopy(config), dtype=dtype, attn_implementation=attention
        )
        theirs = LlavaOnevisionForConditionalGeneration._from_config(plain, dtype=dtype, attn_implementation=attention)
    ours.to_empty(device=device)
    torch.manual_seed(0)
    ours.initialize_weights()
    ours.tie_weights()
    theirs.load_state_dict(ours.state_dict(), assign=True, strict=False)
    theirs.tie_weights()
    buffers = dict(theirs.named_modules())
    for name, value in ours.named_buffers():
        owner, _, last = name.rpartition(".")
        buffers[owner].register_buffer(last, value, persistent=False)
    return {"plain": theirs.eval(), "holitom": ours.eval()}


def contest(
    config: HoliTomLlavaOnevisionConfig,
    num_frames: int,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
    attention: str = "sdpa",
    static_share: float = 0.6,
) -> Contest:
    """
    Makes models, pixels, features and prompts.

    Args:
        config: Architecture and settings.
        num_frames: F.
        batch_size: B.
        device, dtype, attention: As in [`random_models`].
        static_share: Share of the tokens and patches that repeat, see [`synthetic_features`], [`synthetic_pixels`].
    """
    models = random_models(config, device, dtype, attention)
    vision, vocabulary = config.vision_config, config.text_config.vocab_size
    side = vision.image_size // vision.patch_size
    tokens_per_frame = (-(-side // 2)) ** 2
    features = synthetic_features(
        batch_size * num_frames,
        tokens_per_frame,
        config.text_config.hidden_size,
        static_share,
        device=device,
        dtype=dtype,
    )
    for model in models.values():
        model.model.apply_pooling = SyntheticPooling(model.model.apply_pooling, features)
    random = torch.Generator().manual_seed(0)
    before = torch.randint(0, vocabulary - 2, (batch_size, NUM_TEXT_BEFORE), generator=random)
    after = torch.randint(0, vocabulary - 2, (batch_size, NUM_TEXT_AFTER), generator=random)
    video = torch.full((batch_size, num_frames * tokens_per_frame + 1), config.video_token_id)
    input_ids = torch.cat([before, video, after], dim=1).to(device)
    pixels = synthetic_pixels(
        batch_size * num_frames,
        vision.image_size,
        vision.patch_size,
        static_share,
        device=device,
        dtype=dtype,
    ).unflatten(0, (batch_size, num_frames))
    return Contest(models, input_ids, pixels, features)
