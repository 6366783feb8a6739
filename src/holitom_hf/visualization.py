"""Pictures of what stages 1 and 2 did to a video, drawn from a `MergedVideo` alone."""

import math
from enum import IntEnum

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from .token_merging import MergedVideo, TokenKind


class Fate(IntEnum):
    """What became of an input token."""

    DROPPED = 0
    STATIC_KEPT = 1
    STATIC_MERGED = 2
    DYNAMIC_KEPT = 3
    DYNAMIC_MERGED = 4


# Okabe and Ito's colours, told apart by the colour-blind; kept tokens also have an outline, merged ones a veil only.
COLORS = {
    Fate.STATIC_KEPT: "#0072B2",
    Fate.STATIC_MERGED: "#56B4E9",
    Fate.DYNAMIC_KEPT: "#D55E00",
    Fate.DYNAMIC_MERGED: "#E69F00",
    Fate.DROPPED: "#000000",
}
NAMES = {
    Fate.STATIC_KEPT: "static, kept for its segment",
    Fate.STATIC_MERGED: "static, merged into one of those",
    Fate.DYNAMIC_KEPT: "dynamic, selected",
    Fate.DYNAMIC_MERGED: "dynamic, merged by clustering",
    Fate.DROPPED: "dropped",
}
VEILS = {Fate.STATIC_KEPT: 0.35, Fate.STATIC_MERGED: 0.35, Fate.DYNAMIC_KEPT: 0.25, Fate.DYNAMIC_MERGED: 0.35}
DROPPED_VEIL = 0.72
FRAMES_PER_ROW = 8
LINES_PER_FRAME = 12


def token_fates(merged: MergedVideo) -> torch.Tensor:
    """
    What became of every input token.

    Returns:
        (F, T) int64 of [`Fate`].
    """
    assignment = merged.assignment.cpu()
    num_frames, tokens_per_frame = assignment.shape
    kind, frame, position = (
        values.cpu()[assignment.clamp_min(0)] for values in (merged.kind, merged.frame, merged.position)
    )
    is_itself = (frame == torch.arange(num_frames)[:, None]) & (position == torch.arange(tokens_per_frame))
    is_static = kind == TokenKind.STATIC
    fates = torch.where(is_static, int(Fate.STATIC_MERGED), int(Fate.DYNAMIC_MERGED))
    fates[is_static & is_itself] = Fate.STATIC_KEPT
    fates[~is_static & is_itself] = Fate.DYNAMIC_KEPT
    return fates.masked_fill(assignment < 0, Fate.DROPPED)


def paint_frame(frame: np.ndarray, fates: np.ndarray) -> np.ndarray:
    """
    A frame under a veil in the colours of its tokens' fates.

    Args:
        frame: (H, W, 3) uint8.
        fates: (T,) of [`Fate`], T a square.

    Returns:
        (H, W, 3) uint8.
    """
    height, width = frame.shape[:2]
    side = math.isqrt(len(fates))
    grid = fates.reshape(side, side)
    rows, columns = (np.arange(size) * side // size for size in (height, width))
    of_pixel = grid[rows[:, None], columns]  # (H, W)
    painted = frame.astype(np.float32) / 255
    grey = painted.mean(-1, keepdims=True)
    for fate in Fate:
        at = of_pixel == fate
        if fate == Fate.DROPPED:
            painted[at] = (1 - DROPPED_VEIL) * np.broadcast_to(grey, painted.shape)[at]
        else:
            veil = VEILS[fate]
            painted[at] = (1 - veil) * painted[at] + veil * np.array(to_rgb(COLORS[fate]), np.float32)
    return (painted * 255).round().clip(0, 255).astype(np.uint8)


def plot_merging(
    merged: MergedVideo,
    frames: np.ndarray | torch.Tensor,
    similarity: torch.Tensor | None = None,
    threshold: float | None = None,
) -> Figure:
    """
    Draws segments, the fate of every token, and the token budget.

    Args:
        merged: What `merge_video_tokens` or a model's output holds.
        frames: (F, H, W, 3) uint8 pictures of the frames, in any size.
        similarity: (F-1, T) cosine similarity of neighbouring frames' tokens; with it, the curve and the cuts.
        threshold: tau, drawn into the curve's legend and used for its share of repeating tokens.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: If the number of frames is not that of the video, or the grid is not square.
    """
    frames = frames.cpu().numpy() if isinstance(frames, torch.Tensor) else np.asarray(frames)
    num_frames, tokens_per_frame = merged.assignment.shape
    if frames.shape[:1] != (num_frames,) or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"expected ({num_frames}, height, width, 3) frames, got {frames.shape}")
    if math.isqrt(tokens_per_frame) ** 2 != tokens_per_frame:
        raise ValueError(f"tokens must form a square grid, got {tokens_per_frame} a frame")
    fates = token_fates(merged).numpy()

    rows = [
        (number, range(start, min(start + FRAMES_PER_ROW, stop)))
        for number, (first, stop) in enumerate(merged.segments)
        for start in range(first, stop, FRAMES_PER_ROW)
    ]
    has_curve = similarity is not None and num_frames > 1
    heights = [0.9] * has_curve + [1.25] * len(rows) + [1.0]
    figure = Figure(figsize=(11, 1.15 * sum(heights) + 1.0), layout="constrained")
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    if has_curve:
        _draw_curve(figure.add_subplot(grid[0]), merged, similarity, threshold)
    for number, (segment, shown) in enumerate(rows):
        inner = grid[has_curve + number].subgridspec(1, FRAMES_PER_ROW, wspace=0.04)
        for column, frame in enumerate(shown):
            axes = figure.add_subplot(inner[column])
            _draw_frame(axes, frames[frame], fates[frame], merged, frame)
            if column == 0:
                start, stop = merged.segments[segment]
                title = f"segment {segment + 1}\nframes {start}-{stop - 1}" if frame == start else "..."
                axes.set_ylabel(title, fontsize=8, rotation=0, ha="right", va="center", labelpad=6)
    _draw_budget(figure.add_subplot(grid[len(heights) - 1]), fates, merged)
    present = [fate for fate in Fate if (fates == fate).any()]
    handles = [Patch(facecolor=COLORS[fate], alpha=0.75, label=NAMES[fate]) for fate in reversed(present)]
    handles.append(Line2D([], [], color="white", markeredgecolor="black", marker="o", label="line: merged into"))
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return figure


def _draw_frame(axes: Axes, picture: np.ndarray, fates: np.ndarray, merged: MergedVideo, frame: int) -> None:
    """One frame: veils, outlines around kept tokens, lines from merged tokens to where they went."""
    side = math.isqrt(len(fates))
    height, width = picture.shape[:2]
    cell_x, cell_y = width / side, height / side
    axes.imshow(paint_frame(picture, fates), extent=(0, width, height, 0))
    for position in np.flatnonzero(np.isin(fates, (Fate.STATIC_KEPT, Fate.DYNAMIC_KEPT))):
        corner = (position % side * cell_x, position // side * cell_y)
        axes.add_patch(
            Rectangle(corner, cell_x, cell_y, fill=False, linewidth=1.1, edgecolor=COLORS[Fate(fates[position])])
        )
    moved = [
        (position, int(merged.position[target]))
        for position, target in enumerate(merged.assignment[frame].tolist())
        if target >= 0 and int(merged.position[target]) != position and int(merged.kind[target]) != TokenKind.NEWLINE
    ]
    for position, target in moved[:: max(1, len(moved) // LINES_PER_FRAME)]:
        xs = [(p % side + 0.5) * cell_x for p in (position, target)]
        ys = [(p // side + 0.5) * cell_y for p in (position, target)]
        axes.plot(xs, ys, color="white", linewidth=0.7, alpha=0.9)
        axes.plot(
            xs[1:], ys[1:], marker="o", markersize=2.2, color="white", markeredgecolor="black", markeredgewidth=0.4
        )
    axes.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))
    axes.set_title(f"{frame}", fontsize=7, pad=2)


def _draw_curve(axes: Axes, merged: MergedVideo, similarity: torch.Tensor, threshold: float | None) -> None:
    values = similarity.float().cpu().numpy()
    between = np.arange(len(values)) + 0.5
    axes.fill_between(between, *np.percentile(values, (10, 90), axis=1), color="#999999", alpha=0.3, label="10-90 %")
    axes.plot(between, np.median(values, axis=1), color="black", linewidth=1.2, label="median similarity")
    if threshold is not None:
        axes.axhline(threshold, color="#009E73", linewidth=1, linestyle=":", label=f"threshold {threshold:g}")
    for number, (start, _) in enumerate(merged.segments[1:]):
        axes.axvline(start - 0.5, color="#CC79A7", linewidth=1.4, linestyle="--", label="cut" if number == 0 else None)
    axes.set(xlim=(0, len(values)), xlabel="frame", ylim=(min(0.0, values.min()), 1.02))
    axes.set_ylabel("similarity to\nthe next frame", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=7, frameon=False, ncols=4, loc="lower left")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_budget(axes: Axes, fates: np.ndarray, merged: MergedVideo) -> None:
    """Two bars: what the video's tokens were, and what is left of them."""
    before = [(fate, int((fates == fate).sum())) for fate in (4, 3, 2, 1, 0)]
    kinds = merged.kind.cpu().numpy()
    after = [
        (Fate.DYNAMIC_KEPT, int((kinds == TokenKind.DYNAMIC).sum())),
        (Fate.STATIC_KEPT, int((kinds == TokenKind.STATIC).sum())),
    ]
    for place, parts in ((1, before), (0, after)):
        left = 0
        for fate, count in parts:
            axes.barh(place, count, left=left, color=COLORS[Fate(fate)], alpha=0.75, height=0.7)
            if count > 0.03 * fates.size:
                axes.text(left + count / 2, place, f"{count}", ha="center", va="center", fontsize=7, color="white")
            left += count
        if place == 0:
            share = merged.num_tokens / merged.num_input_tokens
            axes.text(left + 0.01 * fates.size, 0, f"{merged.num_tokens} tokens, {share:.1%}", va="center", fontsize=8)
    axes.set(yticks=[0, 1], yticklabels=["to the decoder", "all tokens"], xlim=(0, fates.size), xticks=[])
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
