"""Tokens at regular places: the control that says what choosing by content is worth."""

import torch

from ..merged_video import MergedVideo, take_tokens
from ..video_tokens import VideoTokens


def merge_regular_grid(video: VideoTokens, config) -> MergedVideo:
    """
    Keeps `round(F * T * R)` tokens, at least one, as evenly spaced in the sequence of all as whole numbers allow.

    Args:
        video: Its tokens; nothing but their number matters.
        config: The settings.
    """
    num_tokens, device = video.num_frames * video.tokens_per_frame, video.features.device
    num_kept = max(1, round(num_tokens * config.retention_ratio))
    chosen = (2 * torch.arange(num_kept, device=device) + 1) * num_tokens // (2 * num_kept)
    return take_tokens(video, chosen, config.retention_ratio)
