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
from matplotlib.patheffects import withStroke

from ..merging.merged_video import MergedVideo, TokenKind


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
    Fate.DROPPED: "#3A3A3A",
}
NAMES = {
    Fate.STATIC_KEPT: "static, kept for its segment",
    Fate.STATIC_MERGED: "static, merged into a kept one",
    Fate.DYNAMIC_KEPT: "dynamic, selected",
    Fate.DYNAMIC_MERGED: "dynamic, merged by clustering",
    Fate.DROPPED: "dropped",
}
KEPT = (Fate.STATIC_KEPT, Fate.DYNAMIC_KEPT)
VEIL, DROPPED_VEIL = 0.35, 0.72
COLUMNS = 8
LINES_PER_FRAME = 12
GAP, HEADER = 0.05, 0.2  # of a frame's width: between frames, and for the bar that names a segment


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
    fates[is_static & is_itself] = int(Fate.STATIC_KEPT)
    fates[~is_static & is_itself] = int(Fate.DYNAMIC_KEPT)
    return fates.masked_fill(assignment < 0, int(Fate.DROPPED))


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
    grey = np.broadcast_to(painted.mean(-1, keepdims=True), painted.shape)
    veils = np.array([to_rgb(COLORS[fate]) for fate in Fate], np.float32)[of_pixel]
    painted = (1 - VEIL) * painted + VEIL * veils
    is_dropped = of_pixel == Fate.DROPPED
    painted[is_dropped] = (1 - DROPPED_VEIL) * grey[is_dropped]
    return (painted * 255).round().clip(0, 255).astype(np.uint8)


def check_frames(merged: MergedVideo, frames: np.ndarray | torch.Tensor) -> np.ndarray:
    """
    The frames as an array.

    Raises:
        ValueError: If they are not the video's, or its tokens do not form a square grid.
    """
    frames = frames.cpu().numpy() if isinstance(frames, torch.Tensor) else np.asarray(frames)
    num_frames, tokens_per_frame = merged.assignment.shape
    if frames.shape[:1] != (num_frames,) or frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise ValueError(
            f"expected ({num_frames}, height, width, 3) frames of uint8, got {frames.shape} of {frames.dtype}"
        )
    if math.isqrt(tokens_per_frame) ** 2 != tokens_per_frame:
        raise ValueError(f"tokens must form a square grid, got {tokens_per_frame} a frame")
    return frames


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
        threshold: tau, drawn into the curve.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: If the frames are not the video's, or its grid is not square.
    """
    frames = check_frames(merged, frames)
    fates = token_fates(merged).numpy()
    num_frames = len(frames)
    columns = min(COLUMNS, num_frames)
    num_rows = -(-num_frames // columns)
    row_height = frames.shape[1] / frames.shape[2] + HEADER + GAP
    has_curve = similarity is not None and num_frames > 1

    width = 11.0
    frames_height = num_rows * row_height * (width - 0.6) / (columns * (1 + GAP))
    heights = [1.1] * has_curve + [frames_height, 0.9]
    figure = Figure(figsize=(width, sum(heights) + 0.9), layout="constrained")
    axes = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    if has_curve:
        draw_similarity(axes[0], merged, similarity, threshold)
    _draw_frames(axes[-2], frames, fates, merged, columns, row_height)
    draw_budget(axes[-1], fates, merged)
    present = [fate for fate in (1, 2, 3, 4, 0) if (fates == fate).any()]
    handles = [
        Patch(facecolor=COLORS[fate], edgecolor="black" if fate in KEPT else "none", label=NAMES[fate])
        for fate in map(Fate, present)
    ]
    handles.append(
        Line2D(
            [], [], color="#999999", marker="o", markerfacecolor="white", markeredgecolor="black", label="went into"
        )
    )
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, fontsize=8)
    return figure


def _draw_frames(
    axes: Axes, frames: np.ndarray, fates: np.ndarray, merged: MergedVideo, columns: int, row_height: float
) -> None:
    """All frames in rows, as time goes; above them bars that name the segments."""
    num_frames = len(frames)
    segment_of = {
        frame: number for number, (start, stop) in enumerate(merged.segments) for frame in range(start, stop)
    }
    for frame in range(num_frames):
        left, top = frame % columns * (1 + GAP), frame // columns * row_height + HEADER
        _draw_frame(axes, frames[frame], fates[frame], merged, frame, (left, top))
        segment = segment_of[frame]
        is_first_here = frame % columns == 0 or segment_of[frame - 1] != segment
        is_last_here = frame == num_frames - 1 or segment_of[frame + 1] != segment
        axes.add_patch(
            Rectangle(
                (left, top - 0.75 * HEADER),
                1 + (0 if is_last_here else GAP),
                0.6 * HEADER,
                facecolor="#444444" if segment % 2 == 0 else "#8A8A8A",
            )
        )
        if is_first_here:
            start, stop = merged.segments[segment]
            is_alone = is_last_here or frame % columns == columns - 1
            span = f"frame {start}" if stop - start == 1 else f"frames {start}-{stop - 1}"
            text = f"{segment + 1}: {span}" if is_alone else f"segment {segment + 1}: {span}"
            axes.text(left + 0.03, top - 0.45 * HEADER, text, color="white", fontsize=7, va="center")
    axes.set(xlim=(-GAP, columns * (1 + GAP)), ylim=(-(-num_frames // columns) * row_height, 0), aspect="equal")
    axes.axis("off")


def _draw_frame(
    axes: Axes, picture: np.ndarray, fates: np.ndarray, merged: MergedVideo, frame: int, corner: tuple[float, float]
) -> None:
    """One frame: veils, outlines around kept tokens, lines from merged tokens to where they went."""
    side = math.isqrt(len(fates))
    left, top = corner
    height = picture.shape[0] / picture.shape[1]
    cell_x, cell_y = 1 / side, height / side
    axes.imshow(paint_frame(picture, fates), extent=(left, left + 1, top + height, top), interpolation="antialiased")
    outline = [withStroke(linewidth=1.5, foreground="black")]
    axes.text(left + 0.03, top + height - 0.03, frame, color="white", fontsize=6, path_effects=outline)
    for position in np.flatnonzero(np.isin(fates, KEPT)):
        place = (left + position % side * cell_x, top + position // side * cell_y)
        color = COLORS[Fate(fates[position])]
        axes.add_patch(Rectangle(place, cell_x, cell_y, fill=False, linewidth=1.1, edgecolor=color))
    moved = [
        (position, int(merged.position[target]))
        for position, target in enumerate(merged.assignment[frame].tolist())
        if target >= 0 and int(merged.position[target]) != position
    ]
    for places in moved[:: max(1, -(-len(moved) // LINES_PER_FRAME))]:
        xs = [left + (place % side + 0.5) * cell_x for place in places]
        ys = [top + (place // side + 0.5) * cell_y for place in places]
        axes.plot(xs, ys, color="white", linewidth=0.7, alpha=0.9)
        axes.plot(
            xs[1:], ys[1:], marker="o", markersize=2.2, color="white", markeredgecolor="black", markeredgewidth=0.4
        )


def draw_similarity(axes: Axes, merged: MergedVideo, similarity: torch.Tensor, threshold: float | None) -> None:
    """How alike neighbouring frames are, and where the video was cut; arguments as of `plot_merging`."""
    values = similarity.float().cpu().numpy()
    between = np.arange(len(values)) + 0.5
    axes.fill_between(between, *np.percentile(values, (10, 90), axis=1), color="#999999", alpha=0.3, label="10-90 %")
    axes.plot(between, np.median(values, axis=1), color="black", linewidth=1.2, label="median of a frame's tokens")
    if threshold is not None:
        axes.axhline(threshold, color="#009E73", linewidth=1, linestyle=":", label=f"threshold {threshold:g}")
    for number, (start, _) in enumerate(merged.segments[1:]):
        axes.axvline(start - 0.5, color="#CC79A7", linewidth=1.4, linestyle="--", label="cut" if number == 0 else None)
    axes.set(xlim=(0, len(values)), xlabel="frame", ylim=(min(0.0, values.min()), 1.02))
    axes.set_ylabel("similarity to\nthe next frame", fontsize=8)
    axes.xaxis.label.set_fontsize(8)
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=7, frameon=False, ncols=4, loc="lower left")
    axes.spines[["top", "right"]].set_visible(False)


def draw_budget(axes: Axes, fates: np.ndarray, merged: MergedVideo) -> None:
    """Two bars: what the video's (F, T) tokens were, and what is left of them."""
    before = [(fate, int((fates == fate).sum())) for fate in (1, 2, 3, 4, 0)]
    kinds = merged.kind.cpu().numpy()
    after = [
        (Fate.STATIC_KEPT, int((kinds == TokenKind.STATIC).sum())),
        (Fate.DYNAMIC_KEPT, int((kinds == TokenKind.DYNAMIC).sum())),
    ]
    for place, parts in ((1, before), (0, after)):
        left = 0
        for fate, count in parts:
            axes.barh(place, count, left=left, color=COLORS[Fate(fate)], height=0.7)
            if count > 0.03 * fates.size:
                axes.text(left + count / 2, place, f"{count}", ha="center", va="center", fontsize=7, color="white")
            left += count
        if place == 0:
            share = merged.num_tokens / merged.num_input_tokens
            axes.text(left + 0.01 * fates.size, 0, f"{merged.num_tokens} tokens, {share:.1%}", va="center", fontsize=8)
    axes.set(yticks=[0, 1], yticklabels=["to the decoder", "all tokens"], xlim=(0, fates.size), xticks=[])
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
