"""What is to be told about every place of a frame, and about its past."""

from dataclasses import dataclass

import numpy as np

from ..scenes import COLORS, DIRECTIONS, SHAPES, TEXTURES, Clip


SIDE, GRID = 112, 14  # pixels of a frame, patches of a row
TRENDS = ("background", "still", *DIRECTIONS, "larger", "smaller", "collided")


@dataclass
class PatchLabels:
    """
    What is seen at every place of a grid in every frame.

    Attributes:
        colors, shapes, textures: (F, N) class indices; 0 for no shape.
        geometry: (F, N, 3) centre and radius of the shape there.
        present: (F, K) which of the K pairs of colour and shape are in the frame.
        index: (F, N) the shape's index in the clip, -1 for none.
        covered: (F, N, 64) how much of the place's 8x8 parts shapes cover.
        names: The clip's shapes' names.
    """

    colors: np.ndarray
    shapes: np.ndarray
    textures: np.ndarray
    geometry: np.ndarray
    present: np.ndarray
    index: np.ndarray
    covered: np.ndarray
    names: list[str]

    def at(self, frames: np.ndarray) -> "PatchLabels":
        """Of some frames only."""
        values = {name: value if name == "names" else value[frames] for name, value in vars(self).items()}
        return PatchLabels(**values)


def patch_labels(clip: Clip, times: np.ndarray, masks: np.ndarray, grid: int) -> PatchLabels:
    """Labels of a (grid, grid) raster from the shapes' (F, K, side, side) coverage."""
    num_frames, num_shapes, side, _ = masks.shape
    cell = side // grid
    share = masks.reshape(num_frames, num_shapes, grid, cell, grid, cell).mean((3, 5))
    share = share.reshape(num_frames, num_shapes, grid * grid)
    index = (
        np.where(share.max(1, initial=0) > (0.2 if grid == GRID else 0.1), share.argmax(1), -1)
        if num_shapes
        else (np.full((num_frames, grid * grid), -1))
    )
    colors = np.array([list(COLORS).index(s.color) + 1 for s in clip.shapes] + [0])
    shapes = np.array([SHAPES.index(s.shape) + 1 for s in clip.shapes] + [0])
    places = np.stack([clip.positions(s, times) for s in clip.shapes] + [np.zeros((num_frames, 3))], 1)
    present = np.zeros((num_frames, len(COLORS) * len(SHAPES)), np.float32)
    for number, shape in enumerate(clip.shapes):
        present[shape.is_visible(times), (colors[number] - 1) * len(SHAPES) + shapes[number] - 1] = 1
    part = cell // 8
    parts = (
        masks.max(1, initial=0).reshape(num_frames, grid, 8, part, grid, 8, part).mean((3, 6)).transpose(0, 1, 3, 2, 4)
    )
    textures = np.array([TEXTURES.index(scene.texture) for scene in clip.scenes])[clip.scene_at(times)]
    return PatchLabels(
        colors[index],
        shapes[index],
        np.repeat(textures[:, None], grid * grid, 1),
        np.take_along_axis(places, (index % len(places[0]))[..., None], 1).astype(np.float32),
        present,
        index,
        parts.reshape(num_frames, grid * grid, 64),
        [shape.name for shape in clip.shapes],
    )


def places_of(name: str, kind: str, labels: PatchLabels) -> np.ndarray:
    """
    Where to look for an answer.

    Args:
        name: Of a shape or of a background.
        kind: The question's type; what happens to a shape is seen in the later half of the frames that show it.
        labels: Of the clip.

    Returns:
        (F, N) bool; nowhere where it is not seen.
    """
    if name in TEXTURES:
        return (labels.textures == TEXTURES.index(name)) & (labels.index < 0)
    places = labels.index == labels.names.index(name)
    frames = np.flatnonzero(places.any(1))
    if kind in ("motion", "change") and len(frames):
        places = places & (np.arange(len(places)) >= frames[len(frames) // 2])[:, None]
    return places


def trend_labels(clip: Clip, times: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    What a video's past tells about each place: (F, N) entries of [`TRENDS`], -100 where it is too early to tell; how
    many shapes had come before the one here, -100 for background; the scene's number.
    """
    seen = (
        np.stack([shape.is_visible(times) for shape in clip.shapes])
        if clip.shapes
        else np.zeros((0, len(times)), bool)
    )
    first = [int(row.argmax()) if row.any() else len(times) for row in seen]
    trend = np.zeros((len(times), len(clip.shapes) + 1), int)
    rank = np.full((len(times), len(clip.shapes) + 1), -100)
    for number, shape in enumerate(clip.shapes):
        rank[:, number] = sum(other < first[number] for other in first)
        if any(clip.pan):
            trend[:, number] = -100
            continue
        frames = np.flatnonzero(seen[number])
        places = shape.at(times)
        for order, frame in enumerate(frames):
            dx, dy, _ = places[frame] - places[frames[0]]
            growth = places[frame, 2] / places[frames[0], 2]
            if order == 0:
                label = -100
            elif shape.behavior == "collides":
                gone = np.abs(places[frames[: order + 1], :2] - places[frames[0], :2]).sum(1)
                label = TRENDS.index("collided") if gone[-1] < 0.7 * gone.max() and gone.max() > 0.1 else -100
            elif max(abs(dx), abs(dy)) > 0.08:
                horizontal = abs(dx) > abs(dy)
                word = ("right" if dx > 0 else "left") if horizontal else ("down" if dy > 0 else "up")
                label = TRENDS.index(word)
            elif growth > 1.2 or growth < 1 / 1.2:
                label = TRENDS.index("larger" if growth > 1 else "smaller")
            else:
                label = -100 if shape.behavior in ("moves", "grows", "shrinks") else TRENDS.index("still")
            trend[frame, number] = label
    frames = np.arange(len(times))[:, None]
    scene = np.repeat(clip.scene_at(times)[:, None], index.shape[1], 1)
    return trend[frames, index], rank[frames, index], scene
