"""Fewer frames, evenly spaced: the control that every method for shortening videos has to beat."""

import torch

from ..merged_video import MergedVideo, take_tokens
from ..video_tokens import VideoTokens


def merge_frame_subsampling(video: VideoTokens, config) -> MergedVideo:
    """
    Keeps `round(F * R)` whole frames, at least one, each from the middle of an equal part of the video.

    Args:
        video: Its tokens; nothing but their number matters.
        config: The settings.
    """
    num_frames, tokens_per_frame, device = video.num_frames, video.tokens_per_frame, video.features.device
    num_kept = max(1, round(num_frames * config.retention_ratio))
    frames = (2 * torch.arange(num_kept, device=device) + 1) * num_frames // (2 * num_kept)  # (K,)
    chosen = frames[:, None] * tokens_per_frame + torch.arange(tokens_per_frame, device=device)
    return take_tokens(video, chosen.flatten(), num_kept / num_frames)
