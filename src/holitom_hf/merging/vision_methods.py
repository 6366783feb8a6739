"""How a vision tower may compute less, by name: the one list. What a name stands for is in `models/`."""

from dataclasses import dataclass

import torch


REUSE, FRAMES, TOME, DYMU = VISION_METHODS = ("reuse", "frames", "tome", "dymu")


@dataclass
class VisionPlan:
    """
    What a tower computed of F frames with P patches.

    Attributes:
        is_computed: (F, P) bool, the places that rows stand at in the end: of what was merged, the first one.
        rows_by_layer: (L, F) int64, on the host: how many rows of every frame go into each of the L layers that run.
        groups: (F, P) int64, the first place of the row that each place has, in its frame; `None` where nobody asks.
    """

    is_computed: torch.Tensor
    rows_by_layer: torch.Tensor
    groups: torch.Tensor | None = None
