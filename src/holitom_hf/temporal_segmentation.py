"""Where `segment_frames` stood in 0.1: `holitom_hf.merging` has them now."""

from .merging import segment_frames


__all__ = ["segment_frames"]
