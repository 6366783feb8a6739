"""Pictures of what was done to a video, drawn from a `MergedVideo` and what stage 3 left of it."""

import math
import textwrap
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from ..merging.merged_video import MergedVideo, TokenKind


class Fate(IntEnum):
    """What became of an input token."""

    DROPPED = 0
    STATIC_KEPT = 1
    STATIC_MERGED = 2
    DYNAMIC_KEPT = 3
    DYNAMIC_MERGED = 4


# Okabe and Ito's colours, told apart by the colour-blind. In frames only kept tokens have theirs, and an outline;
# merged ones are pale, dropped ones dark.
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
COUNTED = {
    Fate.STATIC_KEPT: "static",
    Fate.STATIC_MERGED: "static, merged",
    Fate.DYNAMIC_KEPT: "dynamic",
    Fate.DYNAMIC_MERGED: "dynamic, merged",
    Fate.DROPPED: "dropped",
}
ORDER = (Fate.STATIC_KEPT, Fate.STATIC_MERGED, Fate.DYNAMIC_KEPT, Fate.DYNAMIC_MERGED, Fate.DROPPED)
KEPT = (Fate.STATIC_KEPT, Fate.DYNAMIC_KEPT)
MERGED = (Fate.STATIC_MERGED, Fate.DYNAMIC_MERGED)
PALE, MERGED_NAME = "#E6E6E6", "merged into a kept one"
COUNTS_NAME = "counts for so many tokens"
VEIL, MERGED_VEIL, DROPPED_VEIL = 0.4, 0.6, 0.75
COLUMNS = 8
LINES_PER_FRAME = 12
# Of a frame's width: between frames, for the bar that names a segment, for the names of the rows.
GAP, HEADER, MARGIN = 0.05, 0.2, 0.2
WIDTH = 11.0  # of the figure, inches
LETTER_WIDTH = 4.2  # of the rows' names, points
DIGIT_WIDTH = 0.65  # of a digit, in sizes of its font
MAX_DIGIT_SIZE, MIN_DIGIT_SIZE = 7.0, 4.5  # points
STAGES = "stages 1, 2"


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


def fates_after_stage_3(merged: MergedVideo, fates: np.ndarray, survives: np.ndarray, fold: bool) -> np.ndarray:
    """
    What became of every token in the end.

    Args:
        merged: The video.
        fates: (F, T), those of [`token_fates`].
        survives: (N,) bool, the output tokens that stage 3 left.
        fold: Whether the others were folded into those.

    Returns:
        (F, T) of [`Fate`].
    """
    assignment = merged.assignment.cpu().numpy()
    is_gone = np.isin(fates, KEPT) & ~survives[assignment.clip(0)]
    folded = np.where(fates == Fate.STATIC_KEPT, int(Fate.STATIC_MERGED), int(Fate.DYNAMIC_MERGED))
    return np.where(is_gone, folded if fold else int(Fate.DROPPED), fates)


def frame_spans(num_frames: int, temporal_patch_size: int = 1) -> list[tuple[int, int]]:
    """Half-open ranges of a video's frames that have their tokens together; the last one may be short."""
    starts = range(0, num_frames, temporal_patch_size)
    return [(start, min(start + temporal_patch_size, num_frames)) for start in starts]


def numbers_text(start: int, stop: int) -> str:
    """Frames [start, stop), counted from 1 as people do."""
    return f"{stop}" if stop - start == 1 else f"{start + 1}-{stop}"


def frames_text(start: int, stop: int) -> str:
    """As [`numbers_text`], with the word."""
    return f"frame{'s' * (stop - start > 1)} {numbers_text(start, stop)}"


def segment_text(segment: tuple[int, int], spans: list[tuple[int, int]]) -> str:
    """The frames of a segment of [`frame_spans`]."""
    return frames_text(spans[segment[0]][0], spans[segment[1] - 1][1])


def grid_of(num_cells: int, grid: tuple[int, int] | None = None) -> tuple[int, int]:
    """
    Rows and columns of a frame's tokens or patches.

    Args:
        num_cells: How many a frame has.
        grid: Rows and columns; `None`: a square.

    Raises:
        ValueError: If they are not as many, or no square.
    """
    if grid is None:
        side = math.isqrt(num_cells)
        if side * side != num_cells:
            raise ValueError(f"{num_cells} tokens a frame are no square: pass grid=(rows, columns)")
        return side, side
    if len(grid) != 2 or min(grid) < 1 or grid[0] * grid[1] != num_cells:
        raise ValueError(f"grid must be (rows, columns) of {num_cells} tokens a frame, got {tuple(grid)}")
    return int(grid[0]), int(grid[1])


def cell(position: int, grid: tuple[int, int]) -> tuple[float, float, float, float]:
    """Left, top, width and height of a token's cell, in widths and heights of its frame."""
    row, column = divmod(int(position), grid[1])
    return column / grid[1], row / grid[0], 1 / grid[1], 1 / grid[0]


def of_pixels(of_cells: np.ndarray, size: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
    """(H, W): for every pixel of a frame of `size` (H, W) what its cell has among the (T,) of a grid."""
    rows, columns = (np.arange(length) * cells // length for length, cells in zip(size, grid))
    return of_cells.reshape(grid)[rows[:, None], columns]


def paint_frame(frame: np.ndarray, fates: np.ndarray, grid: tuple[int, int] | None = None) -> np.ndarray:
    """
    A frame whose kept tokens are tinted; what was merged into them is pale, what was dropped dark.

    Args:
        frame: (H, W, 3) uint8.
        fates: (T,) of [`Fate`].
        grid: Rows and columns; `None`: a square.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ValueError: If the grid has other than T cells.
    """
    of_pixel = of_pixels(fates, frame.shape[:2], grid_of(len(fates), grid))
    painted = frame.astype(np.float32) / 255
    grey = np.broadcast_to(painted.mean(-1, keepdims=True), painted.shape)
    is_kept, is_merged, is_dropped = (np.isin(of_pixel, some) for some in (KEPT, MERGED, (Fate.DROPPED,)))
    tints = np.array([to_rgb(COLORS[fate]) for fate in Fate], np.float32)[of_pixel]
    painted[is_kept] = (1 - VEIL) * painted[is_kept] + VEIL * tints[is_kept]
    painted[is_merged] = (1 - MERGED_VEIL) * painted[is_merged] + MERGED_VEIL
    painted[is_dropped] = (1 - DROPPED_VEIL) * grey[is_dropped]
    return (painted * 255).round().clip(0, 255).astype(np.uint8)


def paint_computed(frame: np.ndarray, computed: np.ndarray, grid: tuple[int, int] | None = None) -> np.ndarray:
    """
    A frame in which patches that the vision tower took over from their segment's first frame are pale.

    Args:
        frame: (H, W, 3) uint8.
        computed: (P,) bool.
        grid: Rows and columns of patches; `None`: a square.

    Raises:
        ValueError: If the grid has other than P cells.
    """
    is_computed = of_pixels(computed, frame.shape[:2], grid_of(len(computed), grid))
    pale = (1 - MERGED_VEIL) * frame.astype(np.float32) + MERGED_VEIL * 255
    return np.where(is_computed[..., None], frame, pale.round().astype(np.uint8))


def check_frames(
    merged: MergedVideo, frames: np.ndarray | torch.Tensor, temporal_patch_size: int = 1
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """
    The frames that are drawn, as an array, the first of every temporal patch; and the patches' [`frame_spans`].

    Raises:
        ValueError: If they are not the video's.
    """
    if temporal_patch_size < 1:
        raise ValueError(f"temporal_patch_size must be at least 1, got {temporal_patch_size}")
    frames = frames.cpu().numpy() if isinstance(frames, torch.Tensor) else np.asarray(frames)
    is_rgb = frames.ndim == 4 and frames.shape[-1] == 3 and frames.dtype == np.uint8
    spans = frame_spans(len(frames), temporal_patch_size) if is_rgb else []
    num_patches = len(merged.assignment)
    if not is_rgb or len(spans) != num_patches:
        most = num_patches * temporal_patch_size
        fewest = most - temporal_patch_size + 1
        raise ValueError(
            f"expected ({most if fewest == most else f'{fewest} to {most}'}, height, width, 3) frames of uint8, "
            f"got {frames.shape} of {frames.dtype}"
        )
    return frames[::temporal_patch_size], spans


def plot_merging(
    merged: MergedVideo,
    frames: np.ndarray | torch.Tensor,
    similarity: torch.Tensor | None = None,
    threshold: float | None = None,
    survives: torch.Tensor | None = None,
    fold: bool = True,
    question: str | None = None,
    computed: np.ndarray | None = None,
    grid: tuple[int, int] | None = None,
    temporal_patch_size: int = 1,
    method: str = STAGES,
    sizes: torch.Tensor | None = None,
    patch_grid: tuple[int, int] | None = None,
) -> Figure:
    """
    Draws segments, the fate of every token, and the token budget: every row of frames untouched, after stages 1 and 2,
    and, if it is known, after stage 3.

    Args:
        merged: What `merge_video_tokens` or a model's output holds.
        frames: (M, H, W, 3) uint8 pictures of the frames that the model saw, in any size.
        similarity: (F-1, T) cosine similarity of neighbouring frames' tokens; with it, the curve and the cuts.
        threshold: tau, drawn into the curve.
        survives: (N,) bool, the output tokens that stage 3 left.
        fold: Whether stage 3 folded the others into those.
        question: Which stage 3 was asked.
        computed: (F, P) bool, the patches that the vision tower computed in its later layers; in the untouched row
            the others are pale.
        grid: Rows and columns of a frame's T tokens; `None`: a square.
        temporal_patch_size: How many frames have their T tokens together: F is M divided by it, rounded up. The first
            of them is drawn, and all of them are named.
        method: What came before the decoder, the name of the second row.
        sizes: (N,), for how many tokens each output counts in the attention; kept ones that count for several have
            their number in the second row, if there is room for it.
        patch_grid: Rows and columns of a frame's P patches; `None`: a square.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: If the frames are not the video's, or its tokens not the grid's.
    """
    frames, spans = check_frames(merged, frames, temporal_patch_size)
    grid = grid_of(merged.assignment.shape[1], grid)
    fates = token_fates(merged).numpy()
    rows = [("video", None), (method, fates)]
    if survives is not None:
        survives = survives.cpu().numpy()
        rows.append(("stage 3", fates_after_stage_3(merged, fates, survives, fold)))
    layout = _Layout(len(frames), len(rows), frames.shape[1] / frames.shape[2])
    has_curve = similarity is not None and len(frames) > 1

    heights = [1.1] * has_curve + [layout.size[1] * layout.inches, 0.45 * len(rows)]
    figure = Figure(figsize=(WIDTH, sum(heights) + 1.0), layout="constrained")
    axes = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    if has_curve:
        draw_similarity(axes[0], merged, similarity, threshold, spans)
    originals = frames
    if computed is not None:
        originals = [paint_computed(frame, of_frame, patch_grid) for frame, of_frame in zip(frames, computed)]
    _draw_frames(axes[-2], layout, frames, originals, rows, merged, grid, spans)
    numbers = shown_sizes(merged, fates, sizes)
    has_numbers = _draw_numbers(axes[-2], layout, numbers, grid)
    draw_budget(axes[-1], fates, merged, survives)
    if question is not None:
        axes[-1].set_xlabel(
            f"stage 3 keeps what the last token of the prompt attends to; asked: {question}", fontsize=8
        )
    handles = _legend_handles([of_row for _, of_row in rows[1:]], computed, has_numbers)
    figure.legend(handles=handles, loc="outside upper center", ncols=5, frameon=False, fontsize=8)
    return figure


def _legend_handles(fates: list[np.ndarray], computed: np.ndarray | None, has_numbers: bool) -> list[Artist]:
    """What is named above a figure whose rows are painted by these fates, the first with moves."""
    handles = [
        Patch(facecolor=color, edgecolor="#555555", label=name) for color, name in frame_legend(np.stack(fates))
    ]
    if np.isin(fates[0], MERGED).any():
        went = {"color": "#999999", "marker": "o", "markerfacecolor": "white", "markeredgecolor": "black"}
        handles.append(Line2D([], [], label="went into", **went))
    if has_numbers:
        digits = {"color": "none", "marker": "$12$", "markersize": 8, "markerfacecolor": "black", "markeredgewidth": 0}
        handles.append(Line2D([], [], label=COUNTS_NAME, **digits))
    if computed is not None:
        name = f"patch taken over in the vision tower ({computed.mean():.0%} are computed)"
        handles.insert(0, Patch(facecolor="white", edgecolor="#555555", label=name))
    return handles


def frame_legend(fates: np.ndarray) -> list[tuple[str, str]]:
    """Colour and name of everything that occurs in frames that are painted by fates."""
    shown = [(COLORS[fate], NAMES[fate]) for fate in KEPT if (fates == fate).any()]
    if np.isin(fates, MERGED).any():
        shown.append((PALE, MERGED_NAME))
    if (fates == Fate.DROPPED).any():
        shown.append((COLORS[Fate.DROPPED], NAMES[Fate.DROPPED]))
    return shown


def shown_sizes(merged: MergedVideo, fates: np.ndarray, sizes: torch.Tensor | None) -> dict[tuple[int, int], int]:
    """
    For how many tokens kept ones count that count for several, by frame and position.

    Args:
        merged: The video.
        fates: (F, T) of [`Fate`].
        sizes: (N,); `None`: all count for one.
    """
    if sizes is None:
        return {}
    assignment, sizes = merged.assignment.cpu().numpy(), sizes.cpu().round().int().tolist()
    kept = np.argwhere(np.isin(fates, KEPT)).tolist()
    numbers = {(frame, position): sizes[assignment[frame, position]] for frame, position in kept}
    return {place: number for place, number in numbers.items() if number > 1}


def digit_size(numbers: dict[tuple[int, int], int], grid: tuple[int, int], width: float, height: float) -> float:
    """Size of the font in which all numbers fit into the cells of frames of so many points or pixels."""
    num_digits = max((len(str(number)) for number in numbers.values()), default=1)
    return min(0.75 * height / grid[0], 0.9 * width / grid[1] / (DIGIT_WIDTH * num_digits))


@dataclass
class _Layout:
    """
    Where frames stand: in blocks, as time goes; in each a row for every state, and a bar above. In widths of a frame.

    Attributes:
        num_frames: How many there are.
        num_rows: States of each.
        height: Of a frame.
    """

    num_frames: int
    num_rows: int
    height: float

    @property
    def columns(self) -> int:
        """Frames beside each other."""
        return min(COLUMNS, self.num_frames)

    @property
    def block_height(self) -> float:
        """From one block to the next."""
        return self.num_rows * (self.height + GAP) + HEADER + GAP

    @property
    def size(self) -> tuple[float, float]:
        """Width and height of all, without the names of the rows."""
        return self.columns * (1 + GAP), -(-self.num_frames // self.columns) * self.block_height

    @property
    def inches(self) -> float:
        """Width of a frame."""
        return (WIDTH - 0.6) / (self.size[0] + MARGIN)

    def corner(self, frame: int, row: int = 0) -> tuple[float, float]:
        """Left and top of a frame."""
        block, column = divmod(frame, self.columns)
        return column * (1 + GAP), block * self.block_height + HEADER + row * (self.height + GAP)

    def middle(self, frame: int, row: int, position: int, grid: tuple[int, int]) -> tuple[float, float]:
        """Of a token's cell."""
        (left, top), (x, y, width, height) = self.corner(frame, row), cell(position, grid)
        return left + x + width / 2, top + (y + height / 2) * self.height


def _draw_frames(
    axes: Axes,
    layout: _Layout,
    frames: np.ndarray,
    originals: np.ndarray | list[np.ndarray],
    rows: list[tuple[str, np.ndarray | None]],
    merged: MergedVideo,
    grid: tuple[int, int],
    spans: list[tuple[int, int]],
) -> None:
    """All frames in all states; above them bars that name the segments."""
    for frame in range(layout.num_frames):
        for number, (name, fates) in enumerate(rows):
            corner = layout.corner(frame, number)
            if fates is None:
                _draw_original(axes, originals[frame], numbers_text(*spans[frame]), corner)
            else:
                _draw_frame(axes, frames[frame], fates[frame], grid, corner)
            if number == 1:
                _draw_moves(axes, layout, fates[frame], grid, merged, frame)
            if frame % layout.columns == 0:
                lines = textwrap.wrap(name, max(len(STAGES), int(72 * layout.height * layout.inches / LETTER_WIDTH)))
                size = 8 if len(lines) == 1 else 7
                place = -0.06, corner[1] + layout.height / 2
                axes.text(*place, "\n".join(lines), fontsize=size, rotation=90, ha="right", va="center")
    _draw_segments(axes, layout, merged.segments, spans)
    axes.set(xlim=(-MARGIN, layout.size[0]), ylim=(layout.size[1], 0), aspect="equal")
    axes.axis("off")


def _draw_segments(axes: Axes, layout: _Layout, segments: list[tuple[int, int]], spans: list[tuple[int, int]]) -> None:
    """Bars above the frames that name the segments."""
    segment_of = [number for number, (start, stop) in enumerate(segments) for _ in range(start, stop)]
    for frame, segment in enumerate(segment_of):
        left, top = layout.corner(frame)
        is_first_here = frame % layout.columns == 0 or segment_of[frame - 1] != segment
        is_last_here = frame == layout.num_frames - 1 or segment_of[frame + 1] != segment
        axes.add_patch(
            Rectangle(
                (left, top - 0.75 * HEADER),
                1 + (0 if is_last_here else GAP),
                0.6 * HEADER,
                facecolor="#444444" if segment % 2 == 0 else "#8A8A8A",
            )
        )
        if is_first_here:
            is_alone = is_last_here or frame % layout.columns == layout.columns - 1
            text = f"{segment + 1}: {segment_text(segments[segment], spans)}"
            text = text if is_alone else f"segment {text}"
            axes.text(left + 0.03, top - 0.45 * HEADER, text, color="white", fontsize=7, va="center")


def _draw_original(axes: Axes, picture: np.ndarray, name: str, corner: tuple[float, float]) -> None:
    """One frame, untouched, with its number."""
    left, top = corner
    height = picture.shape[0] / picture.shape[1]
    axes.imshow(picture, extent=(left, left + 1, top + height, top), interpolation="antialiased")
    outline = [withStroke(linewidth=1.5, foreground="black")]
    axes.text(left + 0.03, top + height - 0.03, name, color="white", fontsize=7, path_effects=outline)


def _draw_frame(
    axes: Axes, picture: np.ndarray, fates: np.ndarray, grid: tuple[int, int], corner: tuple[float, float]
) -> None:
    """One frame, painted, with outlines around kept tokens."""
    left, top = corner
    height = picture.shape[0] / picture.shape[1]
    painted = paint_frame(picture, fates, grid)
    axes.imshow(painted, extent=(left, left + 1, top + height, top), interpolation="antialiased")
    for position in np.flatnonzero(np.isin(fates, KEPT)):
        x, y, cell_width, cell_height = cell(position, grid)
        place, color = (left + x, top + y * height), COLORS[Fate(fates[position])]
        axes.add_patch(Rectangle(place, cell_width, cell_height * height, fill=False, linewidth=1.1, edgecolor=color))


def _draw_moves(
    axes: Axes, layout: _Layout, fates: np.ndarray, grid: tuple[int, int], merged: MergedVideo, frame: int
) -> None:
    """Lines from merged tokens to where they went, for some of them."""
    moved = [
        (position, int(merged.position[target]))
        for position, target in enumerate(merged.assignment[frame].tolist())
        if target >= 0 and int(merged.position[target]) != position and fates[position] in MERGED
    ]
    for places in moved[:: max(1, -(-len(moved) // LINES_PER_FRAME))]:
        xs, ys = zip(*(layout.middle(frame, 1, place, grid) for place in places))
        axes.plot(xs, ys, color="#555555", linewidth=0.6)
        axes.plot(
            xs[1:], ys[1:], marker="o", markersize=2.2, color="white", markeredgecolor="black", markeredgewidth=0.4
        )


def _draw_numbers(axes: Axes, layout: _Layout, numbers: dict[tuple[int, int], int], grid: tuple[int, int]) -> bool:
    """
    Into cells by frame and position, if there is room. In the second row alone: for how many those count that stage 3
    left is not known.

    Returns:
        Whether there are any.
    """
    size = digit_size(numbers, grid, 72 * layout.inches, 72 * layout.inches * layout.height)
    if not numbers or size < MIN_DIGIT_SIZE:
        return False
    style = {"color": "white", "fontsize": min(size, MAX_DIGIT_SIZE), "ha": "center", "va": "center_baseline"}
    outline = [withStroke(linewidth=1.0, foreground="black")]
    for (frame, position), number in numbers.items():
        axes.text(*layout.middle(frame, 1, position, grid), number, path_effects=outline, **style)
    return True


def draw_similarity(
    axes: Axes,
    merged: MergedVideo,
    similarity: torch.Tensor,
    threshold: float | None,
    spans: list[tuple[int, int]] | None = None,
) -> None:
    """
    How alike neighbouring frames are, and where the video was cut; arguments as of `plot_merging`, and the frames'
    [`frame_spans`], if it is not each by itself.
    """
    values = similarity.float().cpu().numpy()
    spans = spans or frame_spans(len(values) + 1)
    between = np.array([stop for _, stop in spans[:-1]]) + 0.5  # frames are counted from 1
    axes.fill_between(between, *np.percentile(values, (10, 90), axis=1), color="#999999", alpha=0.3, label="10-90 %")
    axes.plot(between, np.median(values, axis=1), color="black", linewidth=1.2, label="median of the tokens")
    if threshold is not None:
        axes.axhline(threshold, color="#009E73", linewidth=1, linestyle=":", label=f"threshold {threshold:g}")
    cuts = merged.segments[1:] if len(merged.segments) < len(merged.assignment) else []  # not where nothing was joined
    for number, (start, _) in enumerate(cuts):
        label = "cut" if number == 0 else None
        axes.axvline(spans[start][0] + 0.5, color="#CC79A7", linewidth=1.4, linestyle="--", label=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set(xlim=(1, spans[-1][1]), xlabel="frame", ylim=(min(0.0, values.min()), 1.02))
    following = "frame" if all(stop - start == 1 for start, stop in spans) else "frames"
    axes.set_ylabel(f"similarity to\nthe next {following}", fontsize=8)
    axes.xaxis.label.set_fontsize(8)
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=7, frameon=False, ncols=4, loc="lower left")
    axes.spines[["top", "right"]].set_visible(False)


def draw_budget(axes: Axes, fates: np.ndarray, merged: MergedVideo, survives: np.ndarray | None = None) -> None:
    """Bars: what the video's (F, T) tokens were, what is left of them, and what stage 3 left; as `plot_merging`."""
    kinds = merged.kind.cpu().numpy()
    bars = [("all tokens", {fate: int((fates == fate).sum()) for fate in ORDER})]
    for name, kept in (("to the decoder", np.ones_like(kinds, bool)), ("after stage 3", survives)):
        if kept is not None:
            counts = {
                fate: int((kept & (kinds == kind)).sum())
                for fate, kind in zip(KEPT, (TokenKind.STATIC, TokenKind.DYNAMIC))
            }
            bars.append((name, counts))
    for place, (_, counts) in enumerate(bars):
        left = 0
        for fate, count in counts.items():
            color = "black" if fate in MERGED else "white"
            axes.barh(place, count, left=left, color=COLORS[fate], height=0.7)
            if count > 0.03 * fates.size:
                text = (
                    f"{count} {COUNTED[fate]}"
                    if count > 0.013 * len(f"{count} {COUNTED[fate]}") * fates.size
                    else count
                )
                axes.text(left + count / 2, place, text, ha="center", va="center", fontsize=7, color=color)
            left += count
        if place > 0:
            total = f"{left} tokens, {left / merged.num_input_tokens:.1%}"
            axes.text(left + 0.01 * fates.size, place, total, va="center", fontsize=8)
    axes.set(yticks=range(len(bars)), yticklabels=[name for name, _ in bars], xlim=(0, fates.size), xticks=[])
    axes.invert_yaxis()
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
