"""Fewer frames, evenly spaced: the control that every method for shortening videos has to beat."""

import torch

from .merged_video import MergedVideo, take_tokens


def merge_frame_subsampling(features, importance, config, newline=None, keys=None) -> MergedVideo:
    """
    Keeps `round(F * R)` whole frames, at least one, each from the middle of an equal part of the video.

    Takes the arguments of `merge_video_tokens`; `importance` and `keys` are not needed.
    """
    num_frames, tokens_per_frame, _ = features.shape
    num_kept = max(1, round(num_frames * config.retention_ratio))
    device = features.device
    frames = (2 * torch.arange(num_kept, device=device) + 1) * num_frames // (2 * num_kept)  # (K,)
    chosen = frames[:, None] * tokens_per_frame + torch.arange(tokens_per_frame, device=device)
    return take_tokens(features, chosen.flatten(), num_kept / num_frames, newline)
