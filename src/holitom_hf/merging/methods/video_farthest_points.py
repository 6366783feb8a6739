"""Farthest points of the whole video at once: what sharing the budget out among frames is worth."""

import torch
import torch.nn.functional as F

from ..merged_video import MergedVideo, take_tokens
from ..spatial import masked_positions
from ..video_tokens import VideoTokens


def merge_video_farthest_points(video: VideoTokens, config) -> MergedVideo:
    """
    Keeps exactly `round(F * T * R)` tokens, at least one, as they are: first the one most like the mean of all, then
    always the one whose largest cosine similarity to those that were chosen is smallest.

    One product of all tokens with the last chosen one a step, so that memory does not grow with the square of them.

    Args:
        video: Its tokens; nothing but their features matters.
        config: The settings.

    Source: the greedy max-min choice of DivPrune (arXiv 2503.02175), whose first token is another one.
    """
    num_kept = max(1, round(video.num_frames * video.tokens_per_frame * config.retention_ratio))
    unit = F.normalize(video.features.detach().flatten(0, 1).float(), dim=-1)  # (F * T, D)
    likeness = -(unit @ unit.mean(0))
    is_kept = torch.zeros(len(unit), dtype=torch.bool, device=unit.device)
    for step in range(num_kept):
        index = likeness.masked_fill(is_kept, torch.inf).argmin()[None]
        is_kept.index_fill_(0, index, True)
        similarity = (unit @ unit[index].T)[:, 0]
        likeness = similarity if step == 0 else torch.maximum(likeness, similarity)
    return take_tokens(video, masked_positions(is_kept[None], num_kept)[0], config.retention_ratio)


def video_farthest_points_flops(video: VideoTokens, config) -> float:
    """Products of [`merge_video_farthest_points`]: all tokens with every one that is chosen."""
    num_tokens = video.num_frames * video.tokens_per_frame
    num_kept = max(1, round(num_tokens * config.retention_ratio))
    return 2.0 * num_kept * num_tokens * video.features.shape[-1]
