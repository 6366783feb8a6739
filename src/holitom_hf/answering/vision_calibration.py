"""Thresholds of a vision tower that merges what is alike, found on a few videos (DyMU, arXiv 2504.17040)."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from ..configuration import HoliTomConfig
from ..merging.vision_methods import DYMU
from ..models.siglip import HoliTomSiglipVisionModel
from ..models.siglip_dymu import find_thresholds
from ..models.vision import check_finite, chunks_on_device
from .answerer import Answerer
from .prompts import PIXELS


# Frames that go through a layer at once.
FRAMES_AT_ONCE = 16


def vision_thresholds(
    answerer: Answerer, videos: Iterable[str | Path], layer: int, retention_ratio: float, num_frames: int | None = None
) -> HoliTomConfig:
    """
    The model's settings with a tower that merges patches by thresholds, which leave a share of these videos' patches.

    Args:
        answerer: With a loaded model.
        videos: Files. What all their frames are behind a layer is held at once: 729 patches of 1152 numbers a frame of
            LLaVA-OneVision.
        layer: Layers of the tower after which it begins to merge.
        retention_ratio: The share.
        num_frames: Of every video; `None`: at most the processor's.

    Raises:
        OSError, ValueError: If a video can't be read, the model's tower has no such form, or too few layers.
    """
    settings = replace(
        answerer.config.holitom_config,
        vision_method=DYMU,
        vision_reuse_layer=layer,
        vision_retention_ratio=retention_ratio,
        vision_merge_thresholds=None,
    )
    answerer.config.check_settings(settings)
    model = answerer.model.model
    tower = model.vision_tower
    if not isinstance(tower, HoliTomSiglipVisionModel):
        raise ValueError(f"thresholds are of a SigLIP vision tower, this model's is a {type(tower).__name__}")
    prepared = [answerer.prepare(str(video), "What happens?", num_frames).features[PIXELS][0] for video in videos]
    pixels = torch.cat(prepared).to(dtype=tower.dtype)
    check_finite(pixels, [len(frames) for frames in prepared])
    chosen = answerer.config.vision_feature_layer
    chosen = [index % (len(tower.encoder.layers) + 1) for index in ([chosen] if isinstance(chosen, int) else chosen)]
    shared_from = min(*chosen, model.importance_layer(chosen)[0])
    chunks = chunks_on_device(pixels, FRAMES_AT_ONCE, tower.device)
    return replace(settings, vision_merge_thresholds=find_thresholds(tower, chunks, settings, shared_from))
