"""
The method, in pure tensors: no model, no transformers, nothing of ours outside this folder.

    from holitom_hf.merging import MergingSettings, merge_video_tokens
    merged = merge_video_tokens(features, importance, MergingSettings(retention_ratio=0.1))
"""

from .frame_segments import segment_frames
from .hidden_states import merge_hidden_states
from .merged_video import MergedVideo, TokenKind
from .registry import METHODS, Method
from .settings import MergingSettings
from .tensors import merge_video_tokens
from .video_tokens import VideoTokens


__all__ = [
    "METHODS",
    "MergedVideo",
    "MergingSettings",
    "Method",
    "TokenKind",
    "VideoTokens",
    "merge_hidden_states",
    "merge_video_tokens",
    "segment_frames",
]
