"""What settings mean in an engine that fixes a video's number of placeholders before it looks at it. Without vLLM."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from ..configuration import HoliTomConfig
from ..merging.budget import token_budget
from ..merging.vision_methods import REUSE


# What a request may change, in `mm_processor_kwargs`.
RATIO = "retention_ratio"

# What a paged cache and the engine's towers have no place for, and why.
LEFT_OUT = {
    "inner_method": ("none", "stage 3 (layers of a paged cache are of one length)"),
    "skipped_layers": (None, "work that visual tokens leave out (the engine runs whole layers)"),
    "proportional_attention": (False, "proportional attention (paged attention takes no bias)"),
    "vision_reuse_layer": (None, "the vision tower's stage (of it, patches are reused in LLaVA-OneVision alone)"),
}


class EngineEndedError(OSError):
    """The engine's process is gone, whatever was asked: answers that are there stay, and no others come."""


def check_asked(settings: HoliTomConfig | None, device: str, keeps_positions: bool) -> None:
    """
    Raises a `ValueError` if a caller asks of the engine what it does not do. What a checkpoint's own settings have of
    that is left out instead, see [`engine_settings`].

    Args:
        settings: That a caller asks for; `None`: the checkpoint's.
        device: `"auto"`, since the engine knows where it runs.
        keeps_positions: As in [`engine_settings`].
    """
    if device != "auto":
        raise ValueError(f"vLLM takes the device that it was built for: leave out --device {device}")
    if settings is None:
        return
    _, left_out = engine_settings(settings, keeps_positions)
    if left_out:
        raise ValueError(
            f"vLLM does not do what these settings ask for: {', '.join(left_out)}; pass a file of settings "
            "without it, or for LLaVA-OneVision a preset that ends with -no-inner"
        )


def checkpoint_settings(hf_config: PreTrainedConfig, model: str, revision: str | None = None) -> HoliTomConfig:
    """
    The settings that a model is served with.

    Args:
        hf_config: As the engine has it. `holitom_config` in it, a dictionary or what remote code has made of one,
            overlays what the file says: the engine puts overrides in place of all of it.
        model: Folder or Hub repository of the checkpoint.
        revision: Of it.

    Raises:
        OSError: If the checkpoint's `config.json` can't be read.
        ValueError: If a setting is out of range.
    """
    values, _ = PreTrainedConfig.get_config_dict(model, revision=revision)
    own = HoliTomConfig.coerce(values.get("holitom_config"))
    return HoliTomConfig.coerce(getattr(hf_config, "holitom_config", None), own)


def engine_settings(settings: HoliTomConfig, keeps_positions: bool) -> tuple[HoliTomConfig, list[str]]:
    """
    What an engine makes of settings: counts that content does not change, and no stage inside the decoder.

    Args:
        settings: As a checkpoint has them.
        keeps_positions: Whether tokens of this model stand where they stood uncompressed, whatever the settings name,
            see [`Backbone`]; else they are numbered as they come.

    Returns:
        Those in force, and what they leave out, in words.

    Raises:
        ValueError: If tokens are to be chosen by the question, which an engine's encoder does not see, or rows are to
            end with newlines.
    """
    if settings.newline_position != "end":
        raise ValueError(
            f"newline_position={settings.newline_position!r} is LLaVA-Video's, which is not served: set 'end'"
        )
    if settings.needs_question:
        raise ValueError(
            f"outer_method={settings.outer_method!r} chooses tokens by the question, which the encoder of an engine "
            "does not see: take another method"
        )
    left_out = []
    positions = "kept" if keeps_positions else "packed"
    if settings.position_ids == "kept" and not keeps_positions:
        left_out.append("kept positions (this model's are packed)")
    is_asked = {
        "inner_method": settings.has_inner_stage,
        "skipped_layers": settings.skips,
        "proportional_attention": settings.proportional_attention,
        "vision_reuse_layer": settings.has_vision_stage,
    }
    # Positions are kept by the Qwen families, whose towers are not SigLIP.
    reuses_patches = settings.vision_method == REUSE and not keeps_positions
    names = [name for name in LEFT_OUT if not (name == "vision_reuse_layer" and reuses_patches)]
    left_out += [LEFT_OUT[name][1] for name in names if is_asked[name]]
    off = {name: LEFT_OUT[name][0] for name in names}
    return settings.overlaid({"exact_budget": True, "position_ids": positions} | off), left_out


def request_settings(settings: HoliTomConfig, mm_processor_kwargs: Mapping[str, Any]) -> HoliTomConfig:
    """
    The settings of one request.

    Args:
        settings: The model's.
        mm_processor_kwargs: Of the request; its `retention_ratio` is taken in place of the model's.

    Raises:
        TypeError, ValueError: If the ratio is not one.
    """
    ratio = mm_processor_kwargs.get(RATIO)
    return settings if ratio is None else settings.overlaid({RATIO: ratio})


def may_need_importance(settings: HoliTomConfig) -> bool:
    """Whether a request can ask for a rate at which what is kept depends on the vision tower's attention."""
    return settings.overlaid({RATIO: min(settings.retention_ratio, 0.5)}).needs_importance


def num_placeholders(settings: HoliTomConfig, num_frames: int, tokens_per_frame: int) -> int:
    """
    Placeholders of a video in a prompt of LLaVA-OneVision: as many as it will have tokens, and one for the newline.

    Args:
        settings: With `exact_budget`.
        num_frames: F.
        tokens_per_frame: T.
    """
    return token_budget(settings, num_frames, tokens_per_frame) + 1
