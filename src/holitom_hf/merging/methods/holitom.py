"""HoliTom's stages 1 and 2 over one video: static tokens merged over segments, dynamic ones selected or clustered."""

import math
from collections.abc import Iterator

import torch

from ..host_numbers import Steps, on_device
from ..merged_video import TokenGroup, TokenKind, in_order
from ..segmentation import choose_segments, count_static_tokens, frame_similarity, similarity_runs
from ..spatial import cluster_tokens, masked_positions, mean_over_frames, select_tokens
from ..video_tokens import VideoTokens


# Bytes of the tokens that are clustered at once: few enough for a processor's cache, many enough to fill a GPU.
CLUSTERED_BYTES = {"cpu": 8 * 2**20}
CLUSTERED_BYTES_ELSEWHERE = 256 * 2**20


def merge_holitom(video: VideoTokens, config, segments=None, similarity=None) -> Steps:
    """
    Stages 1 and 2 (sections 3.1 and 3.2).

    The device is asked once, for stage 1's table of counts: every size below follows from it.

    Args:
        video: Its tokens, with `importance`.
        config: The settings.
        segments, similarity: Half-open frame ranges and (F-1, T) in place of stage 1's.
    """
    features, num_frames, tokens_per_frame = video.features, video.num_frames, video.tokens_per_frame
    num_tokens = num_frames * tokens_per_frame
    device = features.device

    # Stage 1.
    alike = frame_similarity(features) if similarity is None else similarity
    runs = similarity_runs(alike, config.similarity_threshold)
    static_counts = yield count_static_tokens(runs)
    segments = segments or choose_segments(static_counts, config.max_segment_frames)[0]

    lengths = [stop - start for start, stop in segments]
    table = static_counts.numpy()
    num_static = [int(table[stop - 2, stop - start - 1]) if stop - start > 1 else 0 for start, stop in segments]
    gain = sum(static * (length - 1) for static, length in zip(num_static, lengths))
    ratio = min(config.retention_ratio / ((num_tokens - gain) / num_tokens), 1)
    segment_of_frame = on_device([s for s, length in enumerate(lengths) for _ in range(length)], device)  # (F,)
    is_static = torch.zeros((len(segments), tokens_per_frame), dtype=torch.bool, device=device)
    if num_frames > 1:
        ends = on_device([[max(stop - 2, 0), stop - start - 1] for start, stop in segments], device)
        is_static = (runs[ends[:, 0]] >= ends[:, 1:]) & (ends[:, 1:] > 0)  # (S, T)

    # Stage 2, dynamic tokens: selected by importance, frame by frame.
    num_dynamic = [tokens_per_frame - static for static, length in zip(num_static, lengths) for _ in range(length)]
    num_kept = [math.ceil(n * ratio) for n in num_dynamic]
    num_dominant = [round(kept * (1 - config.contextual_ratio)) for kept in num_kept]
    is_dynamic = ~is_static[segment_of_frame]  # (F, T)
    is_dominant = select_tokens(video.importance, is_dynamic, on_device(num_dominant, device))
    dominant = masked_positions(is_dominant.reshape(1, -1), sum(num_dominant))[0]  # (N_d,)
    frame = dominant // tokens_per_frame
    line = torch.arange(num_frames, device=device) + segment_of_frame + 1
    groups = [TokenGroup(None, frame, dominant % tokens_per_frame, TokenKind.DYNAMIC, 2 * line[frame])]
    assigned = torch.full((num_tokens,), -1, device=device)
    assigned[dominant] = torch.arange(len(dominant), device=device)

    def add_clusters(rows, num_frames_of, positions, sizes, clusters, frame, line, kind) -> None:
        """
        Averages sets of tokens over frames, clusters them, and adds what comes out.

        Args:
            rows: (R,) int64 indices among the F*T tokens; the frames of one token of a set after another.
            num_frames_of: (S, N) int64, how many of them belong to each token; 0 behind a set's end.
            positions: (S, N) int64 in the frame.
            sizes, clusters: Number of tokens and of clusters of each set.
            frame, line: (S,) int64, those of the clusters.
        """
        tokens = mean_over_frames(features, rows, num_frames_of.flatten()).view(*positions.shape, -1)
        merged, centers, cluster = cluster_tokens(
            tokens, sizes, clusters, config.cluster_neighbors, config.cluster_center_weight
        )
        count = on_device(clusters, device)
        first = sum(len(group.frame) for group in groups)
        number = cluster + (count.cumsum(0) - count)[:, None] + first
        assigned[rows] = number.flatten().repeat_interleave(num_frames_of.flatten(), output_size=len(rows))
        taken = _ragged_rows(count, sum(clusters))
        groups.append(
            TokenGroup(merged[taken], frame[taken[0]], positions.gather(1, centers)[taken], kind, line[taken[0]])
        )

    # The other dynamic tokens that are kept: cluster centres, where some are asked for.
    num_contextual = [kept - top for kept, top in zip(num_kept, num_dominant)]
    num_others = [n - top for n, top in zip(num_dynamic, num_dominant)]
    for frames in _like_sized(num_others, num_contextual, features):
        sizes = [num_others[f] for f in frames]
        index, size = on_device([frames, sizes], device)
        positions = masked_positions((is_dynamic & ~is_dominant)[index], max(sizes))  # (S, N)
        is_token = torch.arange(max(sizes), device=device) < size[:, None]
        rows = (index[:, None] * tokens_per_frame + positions)[_ragged_rows(size, sum(sizes))]
        clusters = [num_contextual[f] for f in frames]
        add_clusters(rows, is_token.long(), positions, sizes, clusters, index, 2 * line[index] + 1, TokenKind.DYNAMIC)

    # Stage 2, static tokens: averaged over their segment's frames, then clustered.
    num_clusters = [round(n * ratio) for n in num_static]
    for chosen in _like_sized(num_static, num_clusters, features):
        sizes, clusters = [num_static[s] for s in chosen], [num_clusters[s] for s in chosen]
        index, size, start, length = on_device(
            [chosen, sizes, [segments[s][0] for s in chosen], [lengths[s] for s in chosen]], device
        )
        positions = masked_positions(is_static[index], max(sizes))  # (S, N)
        is_token = torch.arange(max(sizes), device=device) < size[:, None]
        num_frames_of = torch.where(is_token, length[:, None], 0)
        num_rows = sum(size * lengths[s] for size, s in zip(sizes, chosen))
        place, step = _ragged_rows(num_frames_of.flatten(), num_rows)
        rows = (start[:, None] * tokens_per_frame + positions).flatten()[place] + step * tokens_per_frame
        add_clusters(rows, num_frames_of, positions, sizes, clusters, start, 2 * (start + index), TokenKind.STATIC)

    # A cluster is its centre and the mean of its members, each a mean over the frames.
    shares = (config.cluster_center_weight, 1 - config.cluster_center_weight)
    return in_order(video, groups, assigned.view(num_frames, tokens_per_frame), segments, ratio, shares=shares)


def _like_sized(sizes: list[int], num_clusters: list[int], features: torch.Tensor) -> Iterator[list[int]]:
    """
    The sets that have clusters, in batches of like size: of as many as may exist at once, and little padding.

    Args:
        sizes: Number of tokens of every set.
        num_clusters: Number of clusters of every set.
        features: What tokens look like.
    """
    budget = CLUSTERED_BYTES.get(features.device.type, CLUSTERED_BYTES_ELSEWHERE)
    at_once = max(1, budget // (4 * features.shape[-1]))  # tokens
    batch = []
    for s in sorted((s for s, clusters in enumerate(num_clusters) if clusters), key=sizes.__getitem__):
        if batch and (len(batch) + 1) * sizes[s] > at_once:
            yield sorted(batch)
            batch = []
        batch.append(s)
    if batch:
        yield sorted(batch)


def _ragged_rows(sizes: torch.Tensor, total: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the first `sizes[s]` entries of every row s of a padded array, `total` in all, row after row."""
    row = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes, output_size=total)
    return row, torch.arange(total, device=sizes.device) - (sizes.cumsum(0) - sizes)[row]
