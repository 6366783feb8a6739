"""Tokens drawn at random: the control that says what choosing them is worth."""

import torch

from ..merged_video import MergedVideo, take_tokens
from ..video_tokens import VideoTokens


def merge_random_tokens(video: VideoTokens, config) -> MergedVideo:
    """
    Keeps `round(F * T * R)` tokens, at least one, drawn evenly from the whole video; the same ones in every call.

    Args:
        video: Its tokens; nothing but their number matters.
        config: The settings.
    """
    num_tokens = video.num_frames * video.tokens_per_frame
    num_kept = max(1, round(num_tokens * config.retention_ratio))
    order = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(0))  # on the host: alike on all devices
    return take_tokens(video, order[:num_kept].sort().values.to(video.features.device), config.retention_ratio)
