"""Stage 1: cut a video where its redundancy ends (HoliTom, section 3.1, arXiv 2505.21334)."""

import numpy as np
import torch

from .host_numbers import Steps, on_device


# On a CPU: frames that are multiplied with each other at once. More would mean more products that nobody needs.
FRAMES_AT_ONCE = 8
# The same where each is multiplied with one other: few enough for a processor's cache.
GUARDED_FRAMES = 2
# Elsewhere: bytes of converted frames and of their products that exist at once.
COMPARED_BYTES = 512 * 2**20


@torch.no_grad()
def frame_similarity(features: torch.Tensor) -> torch.Tensor:
    """
    Cosine similarity of every token with the token at the same place in the next frame.

    Args:
        features: (F, T, D) pooled, projected features of F frames; any floating dtype.

    Returns:
        (F-1, T) float32, without gradient: it only decides.

    Source: section 3.1, equation for the token-wise similarity of adjacent frames.
    """
    num_frames, num_tokens, dim = features.shape
    if num_frames == 1:
        return features.new_empty((0, num_tokens), dtype=torch.float32)
    if features.device.type == "cpu":
        compare, at_once = compare_by_products, FRAMES_AT_ONCE
    else:
        compare, at_once = compare_by_element, max(2, COMPARED_BYTES // (4 * num_tokens * dim))
    starts = range(0, num_frames - 1, at_once - 1)
    return torch.cat([compare(features[start : start + at_once].float()) for start in starts])


def compare_by_products(frames: torch.Tensor) -> torch.Tensor:
    """
    Cosine similarity of adjacent frames in one pass over them: products of all with all hold the norms, too.

    Args:
        frames: (F, T, D) float32, F >= 2.

    Returns:
        (F-1, T).
    """
    by_token = frames.transpose(0, 1)
    products = torch.bmm(by_token, by_token.mT)  # (T, F, F)
    norms = products.diagonal(dim1=1, dim2=2).sqrt().clamp_min(1e-8)
    return (products.diagonal(1, dim1=1, dim2=2) / (norms[:, :-1] * norms[:, 1:])).T


def compare_by_element(frames: torch.Tensor) -> torch.Tensor:
    """
    As [`compare_by_products`], in a few kernels for any number of frames, and in float32 whatever the precision that
    is set for matrix products.
    """
    norms = torch.linalg.vector_norm(frames, dim=-1).clamp_min(1e-8)
    return (frames[:-1] * frames[1:]).sum(-1) / (norms[:-1] * norms[1:])


def similarity_runs(similarity: torch.Tensor, threshold: float) -> torch.Tensor:
    """
    For every token and pair of adjacent frames: how many pairs in a row, up to this one, are alike.

    A token is static over frames [a, b) exactly if `runs[b - 2] >= b - a - 1`.

    Args:
        similarity: (F-1, T).
        threshold: tau; a pair is alike if its similarity is strictly larger.

    Returns:
        (F-1, T) int64.
    """
    pair = torch.arange(1, similarity.shape[0] + 1, device=similarity.device)[:, None]  # (F-1, 1), counted from 1
    last_break = torch.where(similarity > threshold, 0, pair).cummax(dim=0).values if len(similarity) else pair
    return pair - last_break


def count_static_tokens(runs: torch.Tensor) -> torch.Tensor:
    """
    Number of static tokens of every possible segment, from the runs alone: O(F*T + F^2) instead of O(F^2 * T).

    Args:
        runs: (F-1, T) from [`similarity_runs`].

    Returns:
        (F-1, F) int64: entry [i, l] counts the tokens that are static over the l+1 frames that end in frame i+1
        (l = 0, a single frame, counts all of them).
    """
    num_pairs = len(runs)
    histogram = runs.new_zeros((num_pairs, num_pairs + 1))
    histogram.scatter_add_(1, runs, torch.ones_like(runs))
    return histogram.flip(1).cumsum(1).flip(1)


def choose_segments(
    static_counts: torch.Tensor, max_segment_frames: int | None = None
) -> tuple[list[tuple[int, int]], int]:
    """
    The partition of 0..F with the largest total gain, by dynamic programming on the host.

    A segment of L >= 2 frames gains (number of its static tokens) * (L - 1), a single frame 0. Among partitions of
    equal gain the one whose last segments are shortest wins.

    Args:
        static_counts: (F-1, F) from [`count_static_tokens`], on any device; copied to the host once.
        max_segment_frames: Longest segment allowed; `None` sets no limit.

    Returns:
        Half-open `(start, stop)` frame ranges that cover 0..F in order, and their total gain G in tokens.

    Source: section 3.1, global redundancy-aware segmentation.
    """
    counts = static_counts.cpu().numpy()
    num_frames = counts.shape[1]
    longest = num_frames if max_segment_frames is None else min(max_segment_frames, num_frames)
    best = np.zeros(num_frames + 1, dtype=np.int64)  # best[i]: largest gain of the first i frames
    length_of_last = np.ones(num_frames + 1, dtype=np.int64)
    for stop in range(2, num_frames + 1):
        saved_frames = np.arange(min(stop, longest))  # L - 1 for L = 1, 2, ...
        gains = best[stop - 1 - saved_frames] + counts[stop - 2, : len(saved_frames)] * saved_frames
        # argmax takes the first of equal gains, which is the shortest segment.
        choice = int(gains.argmax())
        best[stop], length_of_last[stop] = gains[choice], choice + 1

    segments = []
    stop = num_frames
    while stop > 0:
        segments.append((stop - int(length_of_last[stop]), stop))
        stop = segments[-1][0]
    return segments[::-1], int(best[num_frames])


def segment_starts(features: torch.Tensor, threshold: float, max_segment_frames: int | None = None) -> Steps:
    """
    The first frame of each frame's segment, (F,) int64, of the segments that stage 1 cuts (F, T, D) features into.

    Args:
        features, max_segment_frames: As in [`frame_similarity`] and [`choose_segments`].
        threshold: tau; at 1 nothing repeats, every frame is a segment, and the host waits for nothing.
    """
    if threshold >= 1:
        return torch.arange(len(features), device=features.device)
    counts = yield count_static_tokens(similarity_runs(frame_similarity(features), threshold))
    segments, _ = choose_segments(counts, max_segment_frames)
    return on_device([start for start, stop in segments for _ in range(stop - start)], features.device)


def repeats_first(features: torch.Tensor, first: torch.Tensor, threshold: float) -> torch.Tensor:
    """
    Which tokens are like the same place of their segment's first frame, so that what drifts slowly is told.

    Args:
        features: (F, T, D).
        first: (F,) from [`segment_starts`].
        threshold: Cosine similarity above which they are alike.

    Returns:
        (F, T) bool; False in the first frames.
    """
    if threshold >= 1:
        return torch.zeros(features.shape[:2], dtype=torch.bool, device=features.device)
    is_later = first != torch.arange(len(first), device=first.device)
    is_cpu = features.device.type == "cpu"
    at_once = GUARDED_FRAMES if is_cpu else max(1, COMPARED_BYTES // (12 * features[0].numel()))
    products, norms = [], []
    for some, starts in zip(features.split(at_once), first.split(at_once)):
        frames = some.float()
        norms.append(torch.linalg.vector_norm(frames, dim=-1).clamp_min(1e-8))
        products.append((frames * features[starts]).sum(-1))
    norms = torch.cat(norms)
    return (torch.cat(products) / (norms * norms[first]) > threshold) & is_later[:, None]
