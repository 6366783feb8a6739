"""HoliTom's stages 1 and 2 over one video: static tokens merged over segments, dynamic ones selected or clustered."""

import math

import torch

from .merged_video import MergedVideo, TokenGroup, TokenKind, in_order
from .spatial_merging import cluster_tokens, masked_positions, mean_over_frames, select_tokens
from .temporal_segmentation import choose_segments, count_static_tokens, frame_similarity, similarity_runs


def merge_holitom(features, importance, config, newline=None, keys=None, segments=None) -> MergedVideo:
    """
    Stages 1 and 2 with the arguments of `merge_video_tokens`; `keys` are not needed.

    Args:
        segments: Half-open frame ranges in place of those that stage 1 would choose.
    """
    num_frames, tokens_per_frame, dim = features.shape
    num_tokens = num_frames * tokens_per_frame
    device = features.device

    # Stage 1. The table of counts is all that the host needs to know: every size below follows from it.
    runs = similarity_runs(frame_similarity(features), config.similarity_threshold)
    static_counts = count_static_tokens(runs).cpu()
    segments = segments or choose_segments(static_counts, config.max_segment_frames)[0]

    lengths = [stop - start for start, stop in segments]
    table = static_counts.numpy()
    num_static = [int(table[stop - 2, stop - start - 1]) if stop - start > 1 else 0 for start, stop in segments]
    gain = sum(static * (length - 1) for static, length in zip(num_static, lengths))
    ratio = min(config.retention_ratio / ((num_tokens - gain) / num_tokens), 1)
    segment_of_frame = torch.repeat_interleave(
        torch.arange(len(segments), device=device), torch.tensor(lengths, device=device), output_size=num_frames
    )
    is_static = torch.zeros((len(segments), tokens_per_frame), dtype=torch.bool, device=device)
    if num_frames > 1:
        ends = torch.tensor([[max(stop - 2, 0), stop - start - 1] for start, stop in segments], device=device)
        is_static = (runs[ends[:, 0]] >= ends[:, 1:]) & (ends[:, 1:] > 0)  # (S, T)

    # Stage 2, dynamic tokens: selected by importance, frame by frame.
    num_dynamic = [tokens_per_frame - static for static, length in zip(num_static, lengths) for _ in range(length)]
    num_kept = [math.ceil(n * ratio) for n in num_dynamic]
    num_dominant = [round(kept * (1 - config.contextual_ratio)) for kept in num_kept]
    is_dynamic = ~is_static[segment_of_frame]  # (F, T)
    is_dominant = select_tokens(importance, is_dynamic, torch.tensor(num_dominant, device=device))
    dominant = masked_positions(is_dominant.reshape(1, -1), sum(num_dominant))[0]  # (N_d,)
    line = torch.arange(num_frames, device=device) + segment_of_frame + 1
    groups = [
        TokenGroup(
            embeddings=features.flatten(0, 1)[dominant],
            frame=dominant // tokens_per_frame,
            position=dominant % tokens_per_frame,
            kind=TokenKind.DYNAMIC,
            line=2 * line[dominant // tokens_per_frame],
        )
    ]
    assigned = torch.full((num_tokens,), -1, device=device)
    assigned[dominant] = torch.arange(len(dominant), device=device)

    # The other dynamic tokens that are kept: cluster centres, where some are asked for.
    num_contextual = [kept - top for kept, top in zip(num_kept, num_dominant)]
    frames = [f for f in range(num_frames) if num_contextual[f]]
    if frames:
        sizes = [num_dynamic[f] - num_dominant[f] for f in frames]
        index = torch.tensor(frames, device=device)
        places = masked_positions((is_dynamic & ~is_dominant)[index], max(sizes))  # (S, N)
        members = index[:, None] * tokens_per_frame + places
        merged, centers, cluster = cluster_tokens(
            features.flatten(0, 1)[members],
            sizes,
            clusters := [num_contextual[f] for f in frames],
            config.cluster_neighbors,
            config.cluster_center_weight,
        )
        taken, member_taken = _ragged_rows(clusters, device), _ragged_rows(sizes, device)
        assigned[members[member_taken]] = _number_clusters(cluster, clusters, len(dominant))[member_taken]
        frame = index[taken[0]]
        groups.append(
            TokenGroup(merged[taken], frame, places.gather(1, centers)[taken], TokenKind.DYNAMIC, 2 * line[frame] + 1)
        )
    num_dynamic_kept = sum(num_kept)

    # Stage 2, static tokens: averaged over their segment's frames, then clustered.
    num_clusters = [round(n * ratio) for n in num_static]
    chosen = [s for s in range(len(segments)) if num_clusters[s]]
    if chosen:
        sizes, clusters = [num_static[s] for s in chosen], [num_clusters[s] for s in chosen]
        index = torch.tensor(chosen, device=device)
        places = masked_positions(is_static[index], max(sizes))  # (S, N)
        token_taken = _ragged_rows(sizes, device)
        positions = places[token_taken]  # (n,) all sets behind each other
        starts = torch.tensor([segments[s][0] for s in chosen], device=device)
        spans = torch.tensor([lengths[s] for s in chosen], device=device)[token_taken[0]]  # (n,) frames to average
        first_rows = starts[token_taken[0]] * tokens_per_frame + positions
        num_rows = sum(size * lengths[s] for size, s in zip(sizes, chosen))
        token = torch.repeat_interleave(torch.arange(len(spans), device=device), spans, output_size=num_rows)
        step = torch.arange(num_rows, device=device) - (spans.cumsum(0) - spans)[token]
        rows = first_rows[token] + step * tokens_per_frame
        means = features.new_zeros((len(chosen), max(sizes), dim))
        means[token_taken] = mean_over_frames(features, rows, spans)
        merged, centers, cluster = cluster_tokens(
            means, sizes, clusters, config.cluster_neighbors, config.cluster_center_weight
        )
        assigned[rows] = _number_clusters(cluster, clusters, num_dynamic_kept)[token_taken][token]
        taken = _ragged_rows(clusters, device)
        groups.append(
            TokenGroup(
                merged[taken],
                starts[taken[0]],
                places.gather(1, centers)[taken],
                TokenKind.STATIC,
                2 * (starts[taken[0]] + index[taken[0]]),
            )
        )

    return in_order(groups, assigned.view(num_frames, tokens_per_frame), segments, ratio, newline)


def _ragged_rows(sizes: list[int], device) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of the first `sizes[s]` entries of every row s of a padded (S, N) array, row after row."""
    total = sum(sizes)
    size = torch.tensor(sizes, device=device)
    row = torch.repeat_interleave(torch.arange(len(sizes), device=device), size, output_size=total)
    return row, torch.arange(total, device=device) - (size.cumsum(0) - size)[row]


def _number_clusters(cluster: torch.Tensor, num_clusters: list[int], first: int) -> torch.Tensor:
    """Numbers the clusters of all sets in one sequence that starts at `first`."""
    size = torch.tensor(num_clusters, device=cluster.device)
    return cluster + (size.cumsum(0) - size)[:, None] + first
