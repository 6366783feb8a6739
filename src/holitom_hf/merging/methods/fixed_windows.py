"""HoliTom with windows of a fixed length in place of its global segmentation: an ablation."""

from ..host_numbers import Steps
from ..video_tokens import VideoTokens
from .holitom import merge_holitom


DEFAULT_WINDOW = 4


def merge_fixed_windows(video: VideoTokens, config) -> Steps:
    """
    Stages 1 and 2 over windows of `max_segment_frames` frames (4 if that is `None`), whatever they show.

    Args:
        video: Its tokens, with `importance`.
        config: The settings.
    """
    num_frames, window = video.num_frames, config.max_segment_frames or DEFAULT_WINDOW
    windows = [(start, min(start + window, num_frames)) for start in range(0, num_frames, window)]
    return merge_holitom(video, config, segments=windows)
