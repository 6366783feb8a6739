"""
What can shorten a video before the decoder, by name: the one list of methods.

A new method is a file in `methods/` and a line here. Checkpoints carry the files that are imported at the top.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .methods.farthest_points import merge_farthest_points
from .methods.holitom import merge_holitom
from .package import of_package


if TYPE_CHECKING:
    from .host_numbers import Steps
    from .merged_video import MergedVideo
    from .settings import MergingSettings
    from .video_tokens import VideoTokens


@dataclass(frozen=True)
class Method:
    """
    A way to shorten one video before the decoder.

    Attributes:
        merge: Takes a [`VideoTokens`], checked, and the settings. Its `newline` is `None` where no rows end with one.
            Where it needs numbers of the device on the host, it yields the tensor and gets it there.
        label: Its name in tables.
        group: `"published"`, `"ours"`, `"control"` (what a method has to beat) or `"ablation"` (of HoliTom; compared
            with it alone).
        short_name: What `holitom-hf evaluate --methods` calls it, where that is not its name.
        needs_importance, needs_question: Whether it looks at these of a video, whatever the settings are.
        flops: Of its matrix products, as torch counts; `None`: it has none, or they depend on the video.
        fields: Settings that it is meant to be used with; what compares methods sets them.
    """

    merge: Callable[[VideoTokens, MergingSettings], MergedVideo | Steps]
    label: str
    group: str = "published"
    short_name: str | None = None
    needs_importance: bool = True
    needs_question: bool = False
    flops: Callable[[VideoTokens, MergingSettings], float] | None = None
    fields: dict[str, Any] = field(default_factory=dict)


def _other(name: str, label: str, has: str = "", *values, **fields) -> tuple[str, Method]:
    """What is there to compare with, looked up when used. `has` may name importance, question and flops."""
    merge, flops = (of_package(f"merging.methods.{name}", each) for each in (f"merge_{name}", f"{name}_flops"))
    needs = {f"needs_{what}": what in has for what in ("importance", "question")}
    return name, Method(merge, label, *values, **needs, flops=flops if "flops" in has else None, fields=fields)


METHODS = {
    "holitom": Method(merge_holitom, "HoliTom"),
    "farthest_points": Method(
        merge_farthest_points,
        "farthest points",
        "ours",
        "farthest",
        needs_importance=False,
        flops=of_package("merging.products", "farthest_points_flops"),
        fields={"position_ids": "kept", "proportional_attention": True, "similarity_threshold": 1.0},
    ),
}
METHODS |= (
    _other("fixed_windows", "HoliTom over fixed windows", "importance", "ablation"),
    _other("visionzip", "VisionZip", "importance flops"),
    _other("vidcom2", "VidCom2"),
    _other("divprune", "DivPrune", "flops"),
    _other("dycoke", "DyCoke, over time"),
    _other("fastvid", "FastVID", "importance flops", position_ids="kept"),
    _other("flashvid", "FlashVID", "importance flops"),
    _other("unicomp", "UniComp", "importance flops"),
    _other("prunevid", "PruneVid, before the decoder", "flops"),
    _other("dymu_tokens", "DyMU, before the decoder", "importance"),
    _other("holitom_stop", "HoliTom with SToP", "importance"),
    _other("temporal_pooling", "means over time (STORM)"),
    _other("question_tokens", "tokens like the question", "question flops", "control", "question"),
    _other("video_farthest_points", "farthest points of the video", "flops", "control", "farthest-video"),
    _other("frame_subsampling", "fewer frames", "", "control", "frames"),
    _other("random_tokens", "random tokens", "", "control", "random"),
    _other("regular_grid", "regular grid", "", "control", "grid"),
    _other("average_pooling", "average pooling", "", "control", "pooling"),
)
