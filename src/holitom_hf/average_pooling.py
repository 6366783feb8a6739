"""Coarser frames: every frame's grid averaged down to a smaller one, a control that knows nothing of the content."""

import math

import torch
from torch.nn import functional

from .merged_video import MergedVideo, TokenGroup, TokenKind, in_order


def pooled_size(side: int, ratio: float) -> tuple[int, int]:
    """Rows and columns, at most one apart, whose product comes nearest to `ratio` of a square grid's tokens."""
    sizes = [(rows, columns) for rows in range(1, side + 1) for columns in (rows, rows + 1) if columns <= side]
    return min(sizes, key=lambda size: abs(size[0] * size[1] - ratio * side * side))


def merge_average_pooling(features, importance, config, newline=None, keys=None) -> MergedVideo:
    """
    Averages every frame's square grid down to the size of [`pooled_size`].

    Takes the arguments of `merge_video_tokens`; `importance` and `keys` are not needed. An output token's `position`
    is the first that went into it; where areas overlap, `assignment` names the last of them.

    Raises:
        ValueError: If the grid is not square.
    """
    num_frames, tokens_per_frame, dim = features.shape
    side, device = math.isqrt(tokens_per_frame), features.device
    if side * side != tokens_per_frame:
        raise ValueError(f'outer_method="average_pooling" needs a square grid, got {tokens_per_frame} tokens a frame')
    rows, columns = pooled_size(side, config.retention_ratio)
    grid = features.float().view(num_frames, side, side, dim).permute(0, 3, 1, 2)
    pooled = functional.adaptive_avg_pool2d(grid, (rows, columns)).flatten(2).mT.to(features.dtype)  # (F, N, D)

    num_kept = rows * columns
    cell = torch.arange(num_kept, device=device)
    position = (cell // columns * side // rows) * side + cell % columns * side // columns
    frame = torch.arange(num_frames, device=device).repeat_interleave(num_kept)
    group = TokenGroup(pooled.flatten(0, 1), frame, position.repeat(num_frames), TokenKind.DYNAMIC, frame)
    place = torch.arange(tokens_per_frame, device=device)
    row, column = (
        (axis * count + count - 1) // side for axis, count in ((place // side, rows), (place % side, columns))
    )
    cell_of = row.clamp(max=rows - 1) * columns + column.clamp(max=columns - 1)
    assigned = cell_of + torch.arange(num_frames, device=device)[:, None] * num_kept
    segments = [(f, f + 1) for f in range(num_frames)]
    return in_order(features, [group], assigned, segments, num_kept / tokens_per_frame, newline)
