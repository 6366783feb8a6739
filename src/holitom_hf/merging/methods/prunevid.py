"""PruneVid before the decoder: what stands still in a segment becomes one mean, then all is clustered."""

from itertools import accumulate, groupby

import torch
import torch.nn.functional as F

from ..apportionment import apportion, kept_tokens
from ..density import density_peaks, join_peaks, peak_scores, token_distances
from ..host_numbers import Steps, on_device
from ..merged_video import TokenGroup, TokenKind, in_order
from ..spatial import masked_positions
from ..transitions import segment_numbers
from ..video_tokens import VideoTokens


# As published: tau, above which a place stands still; clusters of frames for each frame; k of DPC-KNN.
STILL = 0.8
CLUSTERS_PER_FRAME = 0.25
NUM_NEIGHBORS = 7


def merge_prunevid(video: VideoTokens, config) -> Steps:
    """
    Keeps exactly `round(F * T * R)` tokens, at least one.

    - Segments: the means of frames are clustered (DPC-KNN) into int(F / 4) clusters. Of each cluster the longest run
      of adjacent frames stays, if it has two or more; other frames join the longer of the runs beside them.
    - A place is static where the mean cosine similarity of its tokens in every two frames of a segment is above 0.8:
      these tokens become one, their mean. All others are dynamic.
    - The static tokens of a segment, and the dynamic ones of a frame, are clustered (DPC-KNN) into the same share of
      them, at least one cluster each; a cluster is the mean of its tokens. In a segment static ones come first.

    Args:
        video: Its tokens; importance is not looked at.
        config: The settings; R is `retention_ratio`.

    Source: PruneVid (arXiv 2412.16117), `merge_frames_dynamic` in `models/pllava/modeling_pllava.py` of
    Visual-AI/PruneVid, whose constants these are. What differs: the share is what the budget asks for, where it is one
    half and leaves up to 14 tokens alone; where so much stands still that fewer tokens than the budget would be left,
    the places that do so least are taken as dynamic; a cluster is called by its centre, which gives it its place;
    fewer than 4 frames are one segment; nothing is random. Its second stage, which drops tokens inside the decoder
    and from its cache by the question's attention, is not part of this.
    """
    num_frames, tokens_per_frame, device = video.num_frames, video.tokens_per_frame, video.features.device
    num_kept = kept_tokens(video, config)
    tokens = video.features.detach().float()
    segments = yield from clustered_segments(tokens.mean(1))
    starts, lengths = on_device([[start for start, _ in segments], [stop - start for start, stop in segments]], device)
    segment = segment_numbers(segments, device)  # (F,)
    is_static = still_places(tokens, segment, lengths, num_frames * tokens_per_frame - num_kept)  # (S, T)

    # What is clustered: means at the static places of a segment's first frame, tokens elsewhere.
    means = tokens.new_zeros(len(segments), *tokens.shape[1:]).index_add_(0, segment, tokens) / lengths[:, None, None]
    tokens = tokens.index_copy(0, starts, torch.where(is_static[..., None], means, tokens[starts]))
    distance = token_distances(tokens)
    is_token = torch.cat([is_static, ~is_static[segment]])  # (S + F, T), the static tokens of segments first
    distance = torch.cat([distance[starts], distance]).masked_fill(~is_token[:, None], torch.inf)
    size = is_token.sum(1)
    counts = apportion(size.clamp_min(1), size, num_kept, tokens_per_frame, is_each_shown=True)
    score = peak_scores(distance, is_token, size.clamp(1, NUM_NEIGHBORS)[:, None], NUM_NEIGHBORS)
    is_center, home = join_peaks(distance, score, counts)

    center = masked_positions(is_center.view(1, -1), num_kept)[0]  # (K,) among the (S + F) * T
    number = torch.full((is_center.numel(),), -1, device=device)
    number[center] = torch.arange(num_kept, device=device)
    output = number.view_as(home).gather(1, home)  # -1 in sets without a centre
    assigned = torch.where(is_static[segment], output[segment], output[len(segments) :])  # (F, T)
    is_shown, joined = assigned.flatten() >= 0, assigned.flatten().clamp_min(0)
    num_joined = torch.zeros(num_kept, device=device).index_add_(0, joined, is_shown.float())
    contributions = (torch.arange(len(joined), device=device), joined, is_shown / num_joined[joined].clamp_min(1))

    of_set, position = center // tokens_per_frame, center % tokens_per_frame
    every = torch.arange(num_frames, device=device)
    frame = torch.cat([starts, every])[of_set]
    line = torch.cat([starts + segment[starts], every + segment + 1])[of_set]
    group = TokenGroup(None, frame, position, TokenKind.DYNAMIC, line)
    merged = in_order(video, [group], assigned, segments, config.retention_ratio, contributions=contributions)
    is_mean = is_static[segment[merged.frame], merged.position] & (merged.kind == TokenKind.DYNAMIC)
    merged.kind = merged.kind.masked_fill(is_mean, TokenKind.STATIC)
    merged.embeddings = merged.apply(video.features, video.newline)
    return merged


def clustered_segments(means: torch.Tensor) -> Steps:
    """(F, D), the mean of every frame -> half-open frame ranges. The device is asked for the clusters."""
    num_frames = len(means)
    is_frame = torch.ones(1, num_frames, dtype=torch.bool, device=means.device)
    neighbors, clusters = on_device(
        [[min(num_frames, NUM_NEIGHBORS)], [max(1, int(num_frames * CLUSTERS_PER_FRAME))]], means.device
    )
    distance, score = density_peaks(means[None], is_frame, neighbors[:, None], NUM_NEIGHBORS)
    _, home = join_peaks(distance, score, clusters)
    return longest_runs((yield home[0]).tolist())


def longest_runs(labels: list[int]) -> list[tuple[int, int]]:
    """
    Half-open ranges of equal labels, once only the longest runs of each label are left: other frames take the label
    of the longer run beside them, of equally long ones the earlier.

    Example: [0, 0, 1, 0, 2, 2, 2, 1]: [(0, 2), (2, 8)].
    """
    runs = [(label, len(list(frames))) for label, frames in groupby(labels)]
    longest = {label: max(length for other, length in runs if other == label) for label, _ in runs}
    kept = [(label if length == longest[label] > 1 else None, length) for label, length in runs]
    kept = [(label, sum(length for _, length in some)) for label, some in groupby(kept, key=lambda run: run[0])]

    joined: list[list[int]] = []  # [label, length]
    for index, (label, length) in enumerate(kept):
        if label is None:
            before = joined[-1] if joined else (None, 0)
            after = kept[index + 1] if index + 1 < len(kept) else (None, 0)
            label = after[0] if after[1] > before[1] else before[0]
        if joined and joined[-1][0] == label:
            joined[-1][1] += length
        else:
            joined.append([label, length])
    stops = list(accumulate(length for _, length in joined))
    return list(zip([0, *stops], stops))


def still_places(tokens: torch.Tensor, segment: torch.Tensor, lengths: torch.Tensor, most_saved: int) -> torch.Tensor:
    """
    Which places of every segment stand still.

    Args:
        tokens: (F, T, D) float32.
        segment: (F,) int64, the segment of every frame.
        lengths: (S,) int64, the frames of every segment.
        most_saved: How many tokens may go where those of a place become one; the stillest places come first.

    Returns:
        (S, T) bool.
    """
    unit = F.normalize(tokens, dim=-1)
    total = unit.new_zeros(len(lengths), *unit.shape[1:]).index_add_(0, segment, unit)
    num_pairs = lengths * (lengths - 1)
    similarity = (total.square().sum(-1) - lengths[:, None]) / num_pairs.clamp_min(1)[:, None]  # (S, T)
    similarity = similarity.round(decimals=5)  # so that in a still video the earlier places come first
    is_static = (similarity > STILL) & (lengths > 1)[:, None]
    saved = (is_static * (lengths - 1)[:, None]).flatten()
    order = similarity.flatten().argsort(descending=True, stable=True)
    fits = torch.empty_like(is_static.flatten()).scatter_(0, order, saved[order].cumsum(0) <= most_saved)
    return is_static & fits.view_as(is_static)


def prunevid_flops(video: VideoTokens, config) -> float:
    """Products of [`merge_prunevid`]: frames with each other, and the tokens of every frame with each other."""
    num_frames, tokens, dim = video.features.shape
    return 2.0 * num_frames * dim * (num_frames + tokens**2)
