"""Segments between frames whose mean tokens differ: what several published methods cut a video into."""

from itertools import pairwise

import torch
import torch.nn.functional as F

from .host_numbers import Steps, on_device
from .merged_video import MergedVideo, TokenGroup, TokenKind, in_order
from .video_tokens import VideoTokens


def transition_segments(features: torch.Tensor, threshold: float, min_segments: int) -> Steps:
    """
    Cuts a video wherever the means of adjacent frames have a cosine similarity below `threshold`, and where they are
    least alike until there are `min_segments`. The device is asked for the similarities.

    Args:
        features: (F, T, D).
        threshold: Cosine similarity.
        min_segments: At least that many, if there are as many frames.

    Returns:
        Half-open frame ranges.

    Source: DySeg of FastVID (arXiv 2503.11187), which FlashVID (arXiv 2602.08024) has, too.
    """
    unit = F.normalize(features.detach().float().mean(1), dim=-1)  # (F, D)
    similarity = (yield (unit[:-1] * unit[1:]).sum(-1)).tolist()
    num_cuts = max(sum(each < threshold for each in similarity), min_segments - 1)
    least_alike = sorted(range(len(similarity)), key=similarity.__getitem__)[:num_cuts]
    cuts = [0, *(frame + 1 for frame in sorted(least_alike)), len(features)]
    return list(pairwise(cuts))


def segment_numbers(segments: list[tuple[int, int]], device: torch.device) -> torch.Tensor:
    """(F,) int64, the segment of every frame."""
    return on_device([s for s, (start, stop) in enumerate(segments) for _ in range(stop - start)], device)


def weighted_sums(
    video: VideoTokens,
    chosen: torch.Tensor,
    assigned: torch.Tensor,
    contributions: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    segments: list[tuple[int, int]],
    ratio: float,
) -> MergedVideo:
    """
    The [`MergedVideo`] of a method whose outputs are weighted sums of tokens, frame by frame in ascending position.

    Args:
        video: Its tokens.
        chosen: (N,) int64, for each output the token among the F*T in whose place it stands.
        assigned, contributions: As in [`MergedVideo`], outputs counted as in `chosen`.
        segments: Frame ranges.
        ratio: Share that was to be kept.
    """
    frame, position = chosen // video.tokens_per_frame, chosen % video.tokens_per_frame
    group = TokenGroup(None, frame, position, TokenKind.DYNAMIC, frame)
    merged = in_order(video, [group], assigned, segments, ratio, contributions=contributions)
    merged.embeddings = merged.apply(video.features, video.newline)
    return merged
