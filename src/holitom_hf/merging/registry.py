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
    from .merged_video import MergedVideo
    from .settings import MergingSettings
    from .video_tokens import VideoTokens


@dataclass(frozen=True)
class Method:
    """
    A way to shorten one video before the decoder.

    Attributes:
        merge: Takes a [`VideoTokens`], checked, and the settings. Its `newline` is `None` where no rows end with one.
        label: Its name in tables.
        group: `"published"`, `"ours"`, `"control"` (what a method has to beat) or `"ablation"` (of HoliTom; compared
            with it alone).
        short_name: What `holitom-hf evaluate --methods` calls it, where that is not its name.
        needs_importance, needs_question: Whether it looks at these of [`VideoTokens`], whatever the settings are.
        flops: Operations of its matrix products, as torch counts them; `None` where it has none or they depend on
            the video.
        fields: Settings that it is meant to be used with; what compares methods sets them.
    """

    merge: Callable[[VideoTokens, MergingSettings], MergedVideo]
    label: str
    group: str = "published"
    short_name: str | None = None
    needs_importance: bool = True
    needs_question: bool = False
    flops: Callable[[VideoTokens, MergingSettings], float] | None = None
    fields: dict[str, Any] = field(default_factory=dict)


def _compared(name: str, label: str, has: str = "", *values, **fields) -> tuple[str, Method]:
    """A row whose functions are looked up in the file of its name; `has` may name importance, question and flops."""
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
    _compared("fixed_windows", "HoliTom over fixed windows", "importance", "ablation"),
    _compared("visionzip", "VisionZip", "importance, flops"),
    _compared("vidcom2", "VidCom2"),
    _compared("divprune", "DivPrune", "flops"),
    _compared("dycoke", "DyCoke's merging over time"),
    _compared("fastvid", "FastVID", "importance, flops", position_ids="kept"),
    _compared("flashvid", "FlashVID", "importance, flops"),
    _compared("unicomp", "UniComp", "importance, flops"),
    _compared("holitom_stop", "HoliTom with SToP", "importance"),
    _compared("temporal_pooling", "means over time (STORM)"),
    _compared("question_tokens", "tokens like the question", "question, flops", "control", "question"),
    _compared("video_farthest_points", "farthest points of the video", "flops", "control", "farthest-video"),
    _compared("frame_subsampling", "fewer frames", "", "control", "frames"),
    _compared("random_tokens", "random tokens", "", "control", "random"),
    _compared("regular_grid", "regular grid", "", "control", "grid"),
    _compared("average_pooling", "average pooling", "", "control", "pooling"),
)
