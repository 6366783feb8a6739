"""Where `MergedVideo` and `merge_video_tokens` stood in 0.1: `holitom_hf.merging` has them now."""

from .merging import MergedVideo, merge_video_tokens


__all__ = ["MergedVideo", "merge_video_tokens"]
