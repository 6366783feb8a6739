"""
A second family of test clips, that nothing was trained or chosen on: known things in other renderings, motions, light.

The words stay those that the bundled model knows. What they name looks otherwise than in training: shapes tilted, as
outlines, small, in other shades; backgrounds at other scales, tinted, or without a name; motion on curves, diagonal,
back and forth or accelerating; a camera that pans and zooms; dissolves; noise and low light; 4 to 32 frames; other
encoders.
"""

from dataclasses import dataclass, field

import numpy as np

from ..video.encoding import ENCODINGS
from .scenes import COLORS, DIRECTIONS, SHAPES, TEXTURES, Clip, Scene, Shape


NUM_FRAMES = (4, 6, 8, 12, 16, 24, 32)
UNNAMED_TEXTURES = ("clouds", "circles", "rays")  # in clips of one scene, whose background is not asked for
PATHS = ("diagonal", "curved", "accelerating", "back and forth")


@dataclass
class UnseenClip(Clip):
    """
    A clip of the second family.

    Attributes:
        shades: By shape's name: its RGB, of 255.
        tints: Per scene: (3,) what is added to its background, of 255.
        scales: Per scene: size of its pattern against the usual.
        zoom: How much larger the camera shows the scene at the end.
        dissolve: How long one scene fades into the next, as a share of the clip; 0 for a cut.
        light: Factor on every pixel.
    """

    shades: dict[str, np.ndarray] = field(default_factory=dict)
    tints: list[np.ndarray] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    zoom: float = 1.0
    dissolve: float = 0.0
    light: float = 1.0

    def rgb(self, shape: Shape) -> np.ndarray:
        """Overrides Clip.rgb: the clip's shade of the colour."""
        return self.shades[shape.name]

    def positions(self, shape: Shape, times: np.ndarray) -> np.ndarray:
        """Overrides Clip.positions: the camera zooms about the picture's centre before it pans."""
        zoom = 1 + (self.zoom - 1) * times[:, None]
        centre = np.array([0.5, 0.5, 0.0])
        return centre + zoom * (shape.at(times) - centre) + np.outer(times, (*self.pan, 0.0))

    def canvas(self, scene: Scene, side: int, margin: int) -> np.ndarray:
        """Overrides Clip.canvas: tinted, at another scale, or of a texture that has no name."""
        index = self.scenes.index(scene)
        size = side + 2 * margin
        if scene.texture in TEXTURES:
            usual = super().canvas(scene, side, margin)
            places = ((np.arange(size) - size / 2) / self.scales[index] + size / 2) % size
            picture = usual[places.astype(int)[:, None], places.astype(int)]
        else:
            picture = _unnamed_texture(scene, size)
        return picture + self.tints[index].astype(np.float32)

    def backgrounds(self, times: np.ndarray, side: int) -> np.ndarray:
        """Overrides Clip.backgrounds: the camera zooms, and scenes dissolve."""
        margin = side // 4
        canvases = [self.canvas(scene, side, margin) for scene in self.scenes]
        cuts = [scene.interval[1] for scene in self.scenes[:-1]]
        frames = []
        for time in times:
            zoom = 1 + (self.zoom - 1) * time
            x, y = (
                ((np.arange(side) + 0.5 - pan * time * side - side / 2) / zoom + side / 2 + margin).astype(int)
                for pan in self.pan
            )
            scene = int(self.scene_at(np.array([time]))[0])
            picture = canvases[scene][y[:, None], x]
            for number, cut in enumerate(cuts):
                if abs(time - cut) < self.dissolve / 2:
                    share = np.float32((time - cut) / self.dissolve + 0.5)
                    picture = (1 - share) * canvases[number][y[:, None], x] + share * canvases[number + 1][
                        y[:, None], x
                    ]
            frames.append(picture)
        return np.stack(frames)

    def render(self, times: np.ndarray, side: int, masks: np.ndarray | None = None) -> np.ndarray:
        """Overrides Clip.render: then it gets dark; the noise is the camera's, so as strong in the dark."""
        masks = self.masks(times, side) if masks is None else masks
        frames = self.drawn(times, side, masks).clip(0, 255).round() * np.float32(self.light)
        random = np.random.default_rng(self.scenes[0].seed)
        return (frames + random.normal(0, self.noise, frames.shape)).clip(0, 255).round().astype(np.uint8)


def _unnamed_texture(scene: Scene, size: int) -> np.ndarray:
    """(size, size, 3) float32 background in two dull tones."""
    random = np.random.default_rng(scene.seed)
    base = random.uniform(95, 165)
    tone = base + random.choice((-1, 1)) * random.uniform(22, 34)
    centre = random.uniform(0.2, 0.8, 2)
    x, y = ((np.arange(size) + 0.5) / size - c for c in centre)
    if scene.texture == "clouds":
        coarse, places = random.uniform(0, 1, (10, 10)), np.linspace(0, 9, size)
        along = np.stack([np.interp(places, np.arange(10), row) for row in coarse])
        share = np.stack([np.interp(places, np.arange(10), column) for column in along.T], axis=-1)
    elif scene.texture == "circles":
        share = 0.5 + 0.5 * np.sin(np.hypot(x[None], y[:, None]) * random.uniform(50, 80))
    else:
        share = 0.5 + 0.5 * np.sin(np.arctan2(y[:, None], x[None]) * random.integers(9, 16))
    return np.repeat((base + share * (tone - base))[..., None], 3, -1).astype(np.float32)


def unseen_clip(random: np.random.Generator) -> UnseenClip:
    """
    Draws a clip of the second family.

    Args:
        random: Source of everything random.
    """
    num_scenes = int(random.choice((1, 2, 3), p=(0.6, 0.25, 0.15)))
    num_frames = int(random.choice(NUM_FRAMES[2 * (num_scenes > 1) :]))  # every scene in a few frames
    cuts = [0.0, *(np.arange(1, num_scenes) / num_scenes + random.uniform(-0.06, 0.06, num_scenes - 1)), 1.0]
    textures = [TEXTURES[t] for t in random.permutation(len(TEXTURES))]
    if num_scenes == 1 and random.random() < 0.5:
        textures = [str(random.choice(UNNAMED_TEXTURES))]
    clip = UnseenClip(
        [Scene(textures[s], (cuts[s], cuts[s + 1]), int(random.integers(2**31))) for s in range(num_scenes)],
        [],
        noise=float(random.uniform(3, 12)),
        num_frames=num_frames,
        encoding=str(random.choice(list(ENCODINGS))),
        tints=[random.uniform(-18, 18, 3) for _ in range(num_scenes)],
        scales=[float(random.uniform(0.8, 1.25)) for _ in range(num_scenes)],
        dissolve=float(random.choice((0.0, 0.12))),
        light=float(random.choice((1.0, random.uniform(0.5, 0.8)))),
    )
    if num_scenes == 1 and random.random() < 0.25:
        clip.pan = tuple(random.uniform(-0.12, 0.12, 2))
        clip.zoom = float(random.uniform(0.85, 1.2))
    times = np.linspace(0, 1, 33, endpoint=False)
    for index, scene in enumerate(clip.scenes):
        wanted = len(clip.shapes) + int(random.integers(1, 6 if num_scenes == 1 else 3))
        for _ in range(60):
            if len(clip.shapes) >= wanted:
                break
            shape = _unseen_shape(random, index, scene.interval, is_camera_still=not any(clip.pan))
            if shape.name not in clip.shades and _is_apart(clip, shape, times):
                clip.shapes.append(shape)
                shade = np.array(COLORS[shape.color]) + random.uniform(-22, 22, 3)
                clip.shades[shape.name] = shade.clip(0, 255)
    return clip


def _unseen_shape(random, scene: int, interval: tuple[float, float], is_camera_still: bool) -> Shape:
    begin, end = interval
    behaviors = ("stays", "moves", "appears", "vanishes", *(("grows", "shrinks") if is_camera_still else ()))
    behavior = str(random.choice(behaviors))
    radius = random.uniform(0.055, 0.075) if random.random() < 0.4 else random.uniform(0.09, 0.15)
    x, y = random.uniform(radius + 0.03, 0.97 - radius, 2)
    knots = np.array([[begin, x, y, radius], [end, x, y, radius]])
    shape = Shape(str(random.choice(list(COLORS))), str(random.choice(SHAPES)), behavior, scene, interval, knots)
    shape.tilt = float(random.uniform(-0.3, 0.3))
    shape.is_outlined = shape.shape not in ("circle", "ring") and radius > 0.08 and random.random() < 0.25
    if behavior == "moves":
        shape.knots, shape.direction = _path(random, interval, x, y, radius)
    elif behavior in ("grows", "shrinks"):
        sizes = (0.06, random.uniform(0.12, 0.15))
        shape.knots[:, 3] = sizes if behavior == "grows" else sizes[::-1]
    elif behavior == "appears":
        shape.interval = (begin + random.uniform(0.3, 0.6) * (end - begin), end)
    elif behavior == "vanishes":
        shape.interval = (begin, begin + random.uniform(0.4, 0.7) * (end - begin))
    return shape


def _path(random, interval, x: float, y: float, radius: float) -> tuple[np.ndarray, str | None]:
    """(17, 4) knots of one of [`PATHS`], and the direction that a question may ask for: none for a way and back."""
    kind, direction = str(random.choice(PATHS)), str(random.choice(list(DIRECTIONS)))
    share = np.linspace(0, 1, 17)
    along, across = share, np.zeros(17)
    if kind == "diagonal":
        across = 0.4 * share * random.choice((-1, 1))
    elif kind == "curved":
        across = 0.3 * np.sin(np.pi * share) * random.choice((-1, 1))
    elif kind == "accelerating":
        along = share**2
    else:
        along = np.sin(np.pi * share)
    forward = np.array(DIRECTIONS[direction])
    steps = np.outer(along, forward) + np.outer(across, forward[::-1])
    places = np.array([x, y]) + random.uniform(0.35, 0.6) * steps
    knots = np.column_stack([interval[0] + share * (interval[1] - interval[0]), places, np.full(17, radius)])
    return knots, None if kind == "back and forth" else direction


def _is_apart(clip: UnseenClip, shape: Shape, times: np.ndarray) -> bool:
    """Whether a shape is all in the picture whenever it is there, and never touches another."""
    visible = shape.is_visible(times)
    places = clip.positions(shape, times)
    reach = 1.1 * places[:, 2:] + 0.01
    if ((places[:, :2] < reach) | (places[:, :2] > 1 - reach))[visible].any():
        return False
    for other in clip.shapes:
        there = clip.positions(other, times)
        gap = np.hypot(*(places - there)[:, :2].T) - 1.05 * (places[:, 2] + there[:, 2]) - 0.02
        if (gap[visible & other.is_visible(times)] < 0).any():
            return False
    return True
