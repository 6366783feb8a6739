"""HoliTom with windows of a fixed length in place of its global segmentation: an ablation."""

from .holitom_merging import merge_holitom
from .merged_video import MergedVideo


DEFAULT_WINDOW = 4


def merge_fixed_windows(features, importance, config, newline=None, keys=None) -> MergedVideo:
    """
    Stages 1 and 2 over windows of `max_segment_frames` frames (4 if that is `None`), whatever they show.

    Takes the arguments of `merge_video_tokens`; `keys` are not needed.
    """
    num_frames, window = len(features), config.max_segment_frames or DEFAULT_WINDOW
    windows = [(start, min(start + window, num_frames)) for start in range(0, num_frames, window)]
    return merge_holitom(features, importance, config, newline, keys, segments=windows)
