"""Operations of LLaVA-OneVision before its decoder."""

import math

import torch

from ..operations import (
    EncoderOperations,
    importance_flops,
    packed_tower_flops,
    projector_flops,
    vision_tower_flops,
)


def encoder_operations(
    config, num_frames: int, size: tuple[int, int] | None = None, settings=None, computed_share: float = 1.0
) -> EncoderOperations:
    """
    What stands before the decoder, for one video.

    Args:
        config: [`HoliTomLlavaOnevisionConfig`].
        num_frames: F.
        size: Not asked: frames have the one size that the tower takes.
        settings: [`HoliTomConfig`]; default: the config's.
        computed_share: Of the patches that the vision tower computes after `vision_reuse_layer`, where that is set.

    Raises:
        ValueError: If another size is asked for.
    """
    settings, vision = settings or config.holitom_config, config.vision_config
    if size is not None and tuple(size) != (vision.image_size, vision.image_size):
        raise ValueError(f"frames of {config.backbone.title} are {vision.image_size} pixels wide and high, not {size}")
    tower, num_rows = vision_tower_flops(vision, num_frames), None
    if settings.has_vision_stage:
        rows = computed_rows(vision, num_frames, settings.vision_reuse_layer, computed_share)
        num_rows = int(rows[-1].sum())
        tower = packed_tower_flops(vision, rows, settings.vision_method)
    return EncoderOperations(
        num_frames=num_frames,
        tokens_per_frame=math.ceil(vision.image_size // vision.patch_size / 2) ** 2,
        num_newlines=1,
        key_dim=vision.hidden_size // vision.num_attention_heads,
        vision_tower=tower,
        projector=projector_flops(config, num_frames, num_rows),
        importance=importance_flops(vision, num_frames, num_rows),
    )


def computed_rows(vision_config, num_frames: int, first_layer: int, computed_share: float) -> torch.Tensor:
    """(L, F) rows of every layer and frame of a tower that computes a share of the patches after its first layers."""
    num_patches = (vision_config.image_size // vision_config.patch_size) ** 2
    rows = torch.full((vision_config.num_hidden_layers, num_frames), num_patches)
    rows[first_layer:] = round(computed_share * num_patches)
    return rows
