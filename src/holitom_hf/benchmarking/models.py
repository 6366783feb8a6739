"""Upstream's model and ours over the same random weights, and what both are asked."""

import copy
from dataclasses import dataclass

import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..models.registry import backbone_class
from .backbones import MEASURED, MeasuredBackbone
from .synthetic import SCENE_FRAMES, synthetic_features, synthetic_pixels


NUM_TEXT_BEFORE, NUM_TEXT_AFTER = 14, 20  # tokens of a conversation's frame and of a short question


@dataclass
class Contest:
    """
    Two models and the same question for both.

    Attributes:
        models: `"plain"`, upstream's class (where there is none, ours with settings that change nothing), and
            `"holitom"`; they share their weights.
        backbone: What is special to them.
        input_ids: (B, L) with a placeholder for every token of the video, and a newline's where the model has one.
        media: Pixels, and what goes with them; B times as long as one video's.
        features: (B*F, T, D), what both see behind tower and projector.
    """

    models: dict[str, PreTrainedModel]
    backbone: MeasuredBackbone
    input_ids: torch.Tensor
    media: dict[str, torch.Tensor]
    features: torch.Tensor

    @property
    def device(self) -> torch.device:
        """Where both models are."""
        return self.input_ids.device

    def inputs(self, rows: int | None = None) -> dict[str, torch.Tensor]:
        """The question as both models take it; `rows` repeats the first."""
        ids, media = self.input_ids, self.media
        if rows is not None:
            media = {name: _repeated(value[: len(value) // len(ids)], rows) for name, value in media.items()}
            ids = _repeated(ids[:1], rows)
        kinds = self.backbone.token_kinds(ids)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **kinds, **media}

    def with_video(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """The question about another video, one for all prompts."""
        pixels = pixels.to(self.device, self.features.dtype)
        return self.inputs() | {"pixel_values_videos": _repeated(pixels, len(self.input_ids))}

    def encode(self, model, **kwargs) -> BaseModelOutputWithPooling:
        """What a model's vision tower and projector make of the pixels."""
        return model.get_video_features(**self.media, return_dict=True, **kwargs)


def _repeated(values: torch.Tensor, number: int) -> torch.Tensor:
    """(N, ...) -> (number * N, ...)."""
    return values.repeat(number, *[1] * (values.ndim - 1))


@torch.no_grad()
def random_models(
    config, device: torch.device, dtype: torch.dtype, attention: str = "sdpa"
) -> dict[str, PreTrainedModel]:
    """
    The plain model and ours with the same random weights, made on the device: no second copy, nothing read.

    Args:
        config: Of ours.
        device, dtype: Of the weights.
        attention: An `attn_implementation`.
    """
    plain = MEASURED[config.model_type].plain_config(config)
    options = {"dtype": dtype, "attn_implementation": attention}
    with torch.device("meta"):
        ours = backbone_class(config.backbone, "generation")._from_config(copy.deepcopy(config), **options)
        theirs = AutoModelForImageTextToText.from_config(plain, **options)
    ours.to_empty(device=device)
    torch.manual_seed(0)
    ours.initialize_weights()
    for name, weight in ours.named_parameters():
        if name.endswith("mlp.gate.weight"):  # a router; upstream draws none for Qwen3.5
            weight.normal_(std=config.text_config.initializer_range)
    ours.tie_weights()
    theirs.load_state_dict(ours.state_dict(), assign=True, strict=False)
    theirs.tie_weights()
    buffers = dict(theirs.named_modules())
    for name, value in ours.named_buffers():
        owner, _, last = name.rpartition(".")
        buffers[owner].register_buffer(last, value, persistent=False)
    return {"plain": theirs.eval(), "holitom": ours.eval()}


def check_loads(config) -> None:
    """
    Raises what loading a model would raise, such as a `ValueError` for a layer that stage 3 can't run before.

    Args:
        config: Of ours. A model of it is made, without memory for its weights.
    """
    with torch.device("meta"):
        backbone_class(config.backbone, "model")(config)


def contest(
    config,
    num_frames: int,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
    attention: str = "sdpa",
    static_share: float = 0.6,
    size: tuple[int, int] | None = None,
) -> Contest:
    """
    Makes models, pixels, features and prompts.

    Args:
        config: Architecture and settings.
        num_frames: Of each video.
        batch_size: B.
        device, dtype, attention: As in [`random_models`].
        static_share: Share of the tokens and patches that repeat, see [`synthetic_features`], [`synthetic_pixels`].
        size: Height and width of frames in pixels, where the backbone takes several; default: its usual one.

    Raises:
        ValueError: If the backbone is not measured yet, or takes no frames of this size.
    """
    if config.model_type not in MEASURED:
        raise ValueError(f"the benchmark does not measure {config.backbone.title} yet")
    backbone = MEASURED[config.model_type](config, num_frames, size)
    models = random_models(config, device, dtype, attention)
    sizes, vocabulary = backbone.operations, config.text_config.vocab_size
    features = synthetic_features(
        batch_size * sizes.num_frames,
        sizes.tokens_per_frame,
        config.text_config.hidden_size,
        static_share,
        scene_frames=SCENE_FRAMES // backbone.frames_together,
        device=device,
        dtype=dtype,
    )
    for model in models.values():
        backbone.show(model, features)
    random = torch.Generator().manual_seed(0)
    before = torch.randint(0, vocabulary - 4, (batch_size, NUM_TEXT_BEFORE), generator=random)
    after = torch.randint(0, vocabulary - 4, (batch_size, NUM_TEXT_AFTER), generator=random)
    video = backbone.video_ids(random).expand(batch_size, -1)
    input_ids = torch.cat([before, video, after], dim=1).to(device)
    frames = synthetic_pixels(
        batch_size * num_frames,
        backbone.size,
        backbone.repeating_side,
        static_share,
        device=device,
        dtype=dtype,
    ).unflatten(0, (batch_size, num_frames))
    return Contest(models, backbone, input_ids, backbone.media(frames), features)
