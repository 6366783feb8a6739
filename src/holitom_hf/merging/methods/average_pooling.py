"""Coarser frames: every frame's grid averaged down to a smaller one, a control that knows nothing of the content."""

import torch
from torch.nn import functional

from ..merged_video import MergedVideo, TokenGroup, TokenKind, in_order
from ..video_tokens import VideoTokens


def pooled_size(grid: tuple[int, int], ratio: float) -> tuple[int, int]:
    """Rows and columns, in about the grid's proportion, whose product comes nearest to `ratio` of its tokens."""
    height, width = grid
    sizes = [
        (rows, columns)
        for rows in range(1, height + 1)
        for columns in (max(1, rows * width // height), rows * width // height + 1)
        if columns <= width
    ]
    return min(sizes, key=lambda size: abs(size[0] * size[1] - ratio * height * width))


def axis_means(length: int, num_areas: int) -> torch.Tensor:
    """(A, L) float32: the weights with which adaptive average pooling takes L places of an axis into A areas."""
    place = torch.arange(length)
    area = torch.arange(num_areas)[:, None]
    is_inside = (place >= area * length // num_areas) & (place < -(-(area + 1) * length // num_areas))
    return is_inside / is_inside.sum(1, keepdim=True)


def merge_average_pooling(video: VideoTokens, config) -> MergedVideo:
    """
    Averages every frame's grid down to the size of [`pooled_size`].

    An output token's `position` is the first that went into it; where areas overlap, `assignment` names the last of
    them.

    Args:
        video: Its tokens; nothing but their grid matters.
        config: The settings.

    Raises:
        ValueError: If the grid is unknown: none is given, and T is no square.
    """
    height, width = video.grid_for('outer_method="average_pooling"')
    features, num_frames, tokens_per_frame = video.features, video.num_frames, video.tokens_per_frame
    device = features.device
    rows, columns = pooled_size((height, width), config.retention_ratio)
    grid = features.float().view(num_frames, height, width, -1).permute(0, 3, 1, 2)
    pooled = functional.adaptive_avg_pool2d(grid, (rows, columns)).flatten(2).mT.to(features.dtype)  # (F, N, D)

    num_kept = rows * columns
    cell = torch.arange(num_kept, device=device)
    position = (cell // columns * height // rows) * width + cell % columns * width // columns
    frame = torch.arange(num_frames, device=device)
    frame_of_token = frame.repeat_interleave(num_kept)
    group = TokenGroup(
        pooled.flatten(0, 1), frame_of_token, position.repeat(num_frames), TokenKind.DYNAMIC, frame_of_token
    )
    place = torch.arange(tokens_per_frame, device=device)
    row, column = (
        (axis * count + count - 1) // length
        for axis, count, length in ((place // width, rows, height), (place % width, columns, width))
    )
    cell_of = row.clamp(max=rows - 1) * columns + column.clamp(max=columns - 1)
    assigned = cell_of + frame[:, None] * num_kept

    # Areas may overlap, so that an input token goes into several outputs: (N, T), and its entries in every frame.
    weights = torch.kron(axis_means(height, rows), axis_means(width, columns))
    cells, places = weights.nonzero(as_tuple=True)
    weights, cells, places = (values.to(device) for values in (weights[cells, places], cells, places))
    contributions = (
        (places + frame[:, None] * tokens_per_frame).flatten(),
        (cells + frame[:, None] * num_kept).flatten(),
        weights.repeat(num_frames),
    )
    segments = [(f, f + 1) for f in range(num_frames)]
    ratio = num_kept / tokens_per_frame
    return in_order(video, [group], assigned, segments, ratio, contributions=contributions)
