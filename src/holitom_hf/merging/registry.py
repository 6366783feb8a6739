"""
What can shorten a video before the decoder, by name: the one list of methods.

A new method is a file in `methods/` and a line here. Settings accept its name, and the evaluation compares it.
Checkpoints carry the files that are imported at the top; what is there for comparison alone is looked up when used.
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
        needs_importance: Whether it looks at [`VideoTokens.importance`] whatever the settings are.
        needs_question: Whether it looks at [`VideoTokens.question`].
        flops: Its matrix products, two operations for a multiplication and an addition as torch counts them, from the
            sizes of a [`VideoTokens`] and the settings; `None` where it has none or they depend on the video.
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


def _control(method: str, function: str | None = None) -> Callable:
    """A function of a method that is there to compare with; by default the one that merges."""
    return of_package(f"merging.methods.{method}", function or f"merge_{method}")


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
    "question_tokens": Method(
        _control("question_tokens"),
        "tokens like the question",
        "control",
        "question",
        needs_importance=False,
        needs_question=True,
        flops=_control("question_tokens", "question_tokens_flops"),
    ),
    "fixed_windows": Method(_control("fixed_windows"), "HoliTom over fixed windows", "ablation"),
    "visionzip": Method(_control("visionzip"), "VisionZip", flops=_control("visionzip", "visionzip_flops")),
    "video_farthest_points": Method(
        _control("video_farthest_points"),
        "farthest points of the video",
        "control",
        "farthest-video",
        needs_importance=False,
        flops=_control("video_farthest_points", "video_farthest_points_flops"),
    ),
    "frame_subsampling": Method(
        _control("frame_subsampling"), "fewer frames", "control", "frames", needs_importance=False
    ),
    "random_tokens": Method(_control("random_tokens"), "random tokens", "control", "random", needs_importance=False),
    "regular_grid": Method(_control("regular_grid"), "regular grid", "control", "grid", needs_importance=False),
    "average_pooling": Method(
        _control("average_pooling"), "average pooling", "control", "pooling", needs_importance=False
    ),
}
