"""Stages 1 and 2 over one video: features and importance of every token -> fewer tokens, and where they came from."""

import math
from dataclasses import dataclass
from enum import IntEnum

import torch

from .configuration_holitom import HoliTomConfig
from .spatial_merging import cluster_tokens, masked_positions, mean_over_frames, select_tokens
from .temporal_segmentation import choose_segments, count_static_tokens, frame_similarity, similarity_runs
from .visionzip_merging import num_dominant_tokens, visionzip_frames


class TokenKind(IntEnum):
    """What an output token is."""

    STATIC = 0
    """Repeats over its segment; averaged over the frames, then clustered."""
    DYNAMIC = 1
    """Selected by attention, or the centre of a cluster of such tokens."""
    NEWLINE = 2
    """The model's newline embedding, after a row of the grid."""


@dataclass
class MergedVideo:
    """
    A video's tokens after stages 1 and 2.

    Attributes:
        embeddings: (N, D).
        segments: Half-open `(start, stop)` frame ranges.
        effective_ratio: Share that stage 2 kept of the tokens left by stage 1.
        frame: (N,) int64, the frame of each token; for a static one its segment's first.
        position: (N,) int64 in 0..T-1, its place in the frame's grid; a newline's is the last of its row.
        kind: (N,) int64, a [`TokenKind`].
        assignment: (F, T) int64, the output token that each input token was merged into; -1 where it was dropped.
    """

    embeddings: torch.Tensor
    segments: list[tuple[int, int]]
    effective_ratio: float
    frame: torch.Tensor
    position: torch.Tensor
    kind: torch.Tensor
    assignment: torch.Tensor

    @property
    def num_tokens(self) -> int:
        """Number of output tokens N."""
        return self.frame.shape[0]

    @property
    def num_input_tokens(self) -> int:
        """Number of input tokens F * T."""
        return self.assignment.numel()


def merge_video_tokens(
    features: torch.Tensor,
    importance: torch.Tensor,
    config: HoliTomConfig,
    newline: torch.Tensor | None = None,
    keys: torch.Tensor | None = None,
) -> MergedVideo:
    """
    Shortens one video before the decoder.

    Args:
        features: (F, T, D) pooled, projected features; T is the grid row by row.
        importance: (F, T), what each token receives of the vision tower's attention.
        config: The settings; `outer_method` picks the method.
        newline: (D,) embedding put after the rows of the grid with `newline_position="row"`; with `"end"` the model
            appends its newline itself.
        keys: (F, T, K) attention keys averaged over heads, for `outer_method="visionzip"`.

    Returns:
        A [`MergedVideo`].

    Raises:
        ValueError: If shapes don't fit each other, there is no frame, or what the method needs is missing.

    Source: sections 3.1 and 3.2.
    """
    if features.ndim != 3 or 0 in features.shape:
        raise ValueError(f"features must have shape (frames, tokens, dim) without a 0, got {tuple(features.shape)}")
    if importance.shape != features.shape[:2]:
        raise ValueError(
            f"importance must have shape {tuple(features.shape[:2])} as the features do, got {tuple(importance.shape)}"
        )
    if config.newline_position == "row":
        if newline is None:
            raise ValueError('newline_position="row" needs the newline embedding')
        if math.isqrt(features.shape[1]) ** 2 != features.shape[1]:
            raise ValueError(f'newline_position="row" needs a square grid, got {features.shape[1]} tokens a frame')
    if not config.has_outer_stage:
        return _keep_all(features, newline if config.newline_position == "row" else None)
    if config.outer_method == "visionzip":
        if keys is None:
            raise ValueError('outer_method="visionzip" needs the keys of the vision tower\'s attention')
        return _merge_visionzip(features, importance, keys, config, newline)
    return _merge_holitom(features, importance, config, newline)


def _merge_holitom(features, importance, config, newline) -> MergedVideo:
    num_frames, tokens_per_frame, dim = features.shape
    num_tokens = num_frames * tokens_per_frame
    device = features.device

    # Stage 1. The table of counts is all that the host needs to know: every size below follows from it.
    runs = similarity_runs(frame_similarity(features), config.similarity_threshold)
    static_counts = count_static_tokens(runs).cpu()
    segments, gain = choose_segments(static_counts, config.max_segment_frames)
    ratio = min(config.retention_ratio / ((num_tokens - gain) / num_tokens), 1)

    lengths = [stop - start for start, stop in segments]
    table = static_counts.numpy()
    num_static = [int(table[stop - 2, stop - start - 1]) if stop - start > 1 else 0 for start, stop in segments]
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
        _Tokens(
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
            _Tokens(merged[taken], frame, places.gather(1, centers)[taken], TokenKind.DYNAMIC, 2 * line[frame] + 1)
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
            _Tokens(
                merged[taken],
                starts[taken[0]],
                places.gather(1, centers)[taken],
                TokenKind.STATIC,
                2 * (starts[taken[0]] + index[taken[0]]),
            )
        )

    return _in_order(groups, assigned.view(num_frames, tokens_per_frame), segments, ratio, config, newline)


def _merge_visionzip(features, importance, keys, config, newline) -> MergedVideo:
    num_frames, tokens_per_frame, _ = features.shape
    num_kept = max(1, round(tokens_per_frame * config.retention_ratio))
    embeddings, positions, places, slot = visionzip_frames(features, importance, keys, num_kept)
    frame = torch.arange(num_frames, device=features.device)[:, None]
    is_contextual = torch.arange(num_kept, device=features.device) >= num_dominant_tokens(num_kept)
    group = _Tokens(
        embeddings.flatten(0, 1),
        frame.expand(-1, num_kept).flatten(),
        positions.flatten(),
        TokenKind.DYNAMIC,
        (2 * frame + is_contextual).flatten(),
        places.flatten(),
    )
    assigned = torch.where(slot >= 0, slot + frame * num_kept, -1)
    segments = [(f, f + 1) for f in range(num_frames)]
    return _in_order([group], assigned, segments, num_kept / tokens_per_frame, config, newline, newline_if_empty=True)


def _keep_all(features, newline) -> MergedVideo:
    num_frames, tokens_per_frame, _ = features.shape
    index = torch.arange(num_frames * tokens_per_frame, device=features.device)
    frame, position = index // tokens_per_frame, index % tokens_per_frame
    group = _Tokens(features.flatten(0, 1), frame, position, TokenKind.DYNAMIC, frame)
    segments = [(f, f + 1) for f in range(num_frames)]
    config = HoliTomConfig(newline_position="end" if newline is None else "row")
    return _in_order([group], index.view(num_frames, tokens_per_frame), segments, 1.0, config, newline)


@dataclass
class _Tokens:
    """
    Output tokens of one sort. Where no newlines order them, they stand by line, then by position; in a grid with
    newlines by frame, then by place, which is the position unless said otherwise.
    """

    embeddings: torch.Tensor  # (n, D)
    frame: torch.Tensor  # (n,)
    position: torch.Tensor  # (n,)
    kind: TokenKind
    line: torch.Tensor  # (n,)
    place: torch.Tensor | None = None  # (n,)


def _in_order(groups, assigned, segments, ratio, config, newline, newline_if_empty=False) -> MergedVideo:
    """Puts the groups, which `assigned` numbers, into the sequence's order, with newlines after the grid's rows."""
    num_frames, tokens_per_frame = assigned.shape
    embeddings = torch.cat([group.embeddings for group in groups])
    frame = torch.cat([group.frame for group in groups])
    position = torch.cat([group.position for group in groups])
    kind = torch.cat([torch.full_like(group.frame, group.kind) for group in groups])

    if config.newline_position == "row":
        width = math.isqrt(tokens_per_frame)
        has_newline = torch.full((num_frames, width), newline_if_empty, device=frame.device)
        place = torch.cat([group.position if group.place is None else group.place for group in groups])
        has_newline[frame, place // width] = True
        newline_frame, newline_row = has_newline.nonzero(as_tuple=True)
        embeddings = torch.cat([embeddings, newline.to(embeddings).expand(len(newline_frame), -1)])
        frame = torch.cat([frame, newline_frame])
        last_in_row = (newline_row + 1) * width - 1
        position, place = torch.cat([position, last_in_row]), torch.cat([place, last_in_row])
        kind = torch.cat([kind, torch.full_like(newline_frame, TokenKind.NEWLINE)])
        key = 2 * (frame * tokens_per_frame + place) + (kind == TokenKind.NEWLINE)
    else:
        key = torch.cat([group.line for group in groups]) * tokens_per_frame + position

    order = key.argsort(stable=True)
    number = torch.full((len(order) + 1,), -1, device=order.device)  # the last one answers for dropped tokens, -1
    number[order] = torch.arange(len(order), device=order.device)
    assignment = number[assigned]
    return MergedVideo(embeddings[order], segments, ratio, frame[order], position[order], kind[order], assignment)


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
