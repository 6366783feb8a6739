"""Limits of frames and sizes, which the video processors of the Qwen-VL families spell alike in every call."""

import copy

import numpy as np
from transformers.image_processing_utils import BatchFeature
from transformers.video_utils import VideoMetadata

from ..processing import HoliTomVideoProcessorMixin


# The least and the most pixels, in transformers' words.
EDGES = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}


class QwenVideoProcessorMixin(HoliTomVideoProcessorMixin):
    """
    For the video processor of a Qwen-VL backbone, before upstream's class: `num_frames` or `fps`, `min_frames`,
    `max_frames`, `min_pixels` and `max_pixels` are taken by the constructor and by every call, for files and frames.
    Pixels are another spelling of `size`, which bounds what upstream's class says. Where one of them is given, the
    other gives way to it.
    """

    sampling_names = (*HoliTomVideoProcessorMixin.sampling_names, "min_frames", "max_frames")

    def __init__(self, **kwargs):
        """Overrides BaseVideoProcessor.__init__: with `min_pixels` and `max_pixels`, as [`with_size`] takes them."""
        super().__init__(**with_size(kwargs, self.size))

    def preprocess(self, videos, **kwargs) -> BatchFeature:
        """Overrides HoliTomVideoProcessorMixin.preprocess: with `min_pixels` and `max_pixels`, as [`with_size`]."""
        return super().preprocess(videos, **with_size(kwargs, self.size))

    def sample_frames(
        self, metadata: VideoMetadata, *, min_frames: int | None = None, max_frames: int | None = None, **kwargs
    ) -> np.ndarray:
        """Overrides sample_frames of the class after this one: a call's limits of frames by rate count, too."""
        limited = self.within(min_frames, max_frames)
        return super(QwenVideoProcessorMixin, limited).sample_frames(metadata, **kwargs)

    def within(self, min_frames: int | None, max_frames: int | None) -> "QwenVideoProcessorMixin":
        """This processor with other limits of the frames that are taken by rate; `None`: its own."""
        limits = {"min_frames": min_frames, "max_frames": max_frames}
        limited = copy.copy(self)
        vars(limited).update({name: value for name, value in limits.items() if value is not None})
        return limited


def with_size(kwargs: dict, size: dict) -> dict:
    """
    Arguments of a video processor whose `min_pixels` and `max_pixels` are its `size`.

    Args:
        kwargs: Of a call.
        size: The processor's own, of which what is not given is taken.

    Raises:
        ValueError: If a number of pixels is not positive, or the least is more than the most.
    """
    given = {edge: kwargs[name] for name, edge in EDGES.items() if kwargs.get(name) is not None}
    if not given:
        return kwargs
    least, most = (given.get(edge) for edge in EDGES.values())
    if min(given.values()) < 1 or (len(given) == 2 and least > most):
        raise ValueError(
            f"min_pixels and max_pixels must be positive, the first not above the other: got {least}, {most}"
        )
    own = dict(kwargs.get("size") or size)
    edges = {edge: given.get(edge, own[edge]) for edge in EDGES.values()}
    if most is None:
        edges["longest_edge"] = max(edges.values())
    elif least is None:
        edges["shortest_edge"] = min(edges.values())
    return {name: value for name, value in kwargs.items() if name not in EDGES} | {"size": edges}
