"""Drawn clips with exact ground truth: textured scenes with shapes that move, grow, appear, vanish or collide."""

from dataclasses import dataclass, field

import numpy as np


COLORS = {
    "red": (215, 35, 40),
    "green": (30, 160, 50),
    "blue": (35, 70, 220),
    "yellow": (245, 220, 40),
    "purple": (150, 40, 180),
    "cyan": (60, 210, 225),
    "white": (250, 250, 250),
    "black": (15, 15, 15),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
TEXTURES = ("stripes", "checks", "dots", "bricks", "waves", "plain")
BEHAVIORS = ("stays", "moves", "grows", "shrinks", "appears", "vanishes", "collides")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

# Never seen in training: what a model learned about colours and shapes must combine.
HELD_OUT = {("purple", "triangle"), ("yellow", "ring"), ("cyan", "cross"), ("white", "circle")}


@dataclass
class Shape:
    """
    A coloured shape. Lengths are shares of the picture's side, times shares of the clip.

    Attributes:
        color: A name of [`COLORS`].
        shape: One of [`SHAPES`].
        behavior: One of [`BEHAVIORS`].
        scene: Index of its scene.
        interval: When it is there: [start, stop).
        knots: (K, 4) rows of time, x, y, radius, in between interpolated linearly.
        direction: A name of [`DIRECTIONS`] if it moves.
        tilt: Angle by which it is turned, in radians.
        is_outlined: Whether only its edge is drawn.
    """

    color: str
    shape: str
    behavior: str
    scene: int
    interval: tuple[float, float]
    knots: np.ndarray
    direction: str | None = None
    tilt: float = 0.0
    is_outlined: bool = False

    @property
    def name(self) -> str:
        """As questions call it: "red circle"."""
        return f"{self.color} {self.shape}"

    def at(self, times: np.ndarray) -> np.ndarray:
        """(F, 3) x, y, radius at (F,) times."""
        return np.stack([np.interp(times, self.knots[:, 0], column) for column in self.knots.T[1:]], axis=-1)

    def is_visible(self, times: np.ndarray) -> np.ndarray:
        """(F,) whether it is there at (F,) times."""
        return (times >= self.interval[0]) & (times < self.interval[1])


@dataclass
class Scene:
    """
    A background and when it is shown.

    Attributes:
        texture: One of [`TEXTURES`].
        interval: [start, stop), shares of the clip.
        seed: Draws the texture's colours and scale.
    """

    texture: str
    interval: tuple[float, float]
    seed: int


@dataclass
class Clip:
    """
    A clip of one to three scenes.

    Attributes:
        scenes: In order, without gaps.
        shapes: All shapes; no two have the same colour and shape.
        specks: (S, 4) start x, y and end x, y of small grey specks, distractors that no question is about.
        pan: (x, y) by which the camera moves the picture from start to end.
        noise: Standard deviation of the pixels' noise, of 255.
        num_frames: Frames that its questions are asked about; `None`: as many as the set has.
        encoding: How a written set encodes it: a name of [`~video.encoding.ENCODINGS`].
    """

    scenes: list[Scene]
    shapes: list[Shape]
    specks: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)))
    pan: tuple[float, float] = (0.0, 0.0)
    noise: float = 0.0
    num_frames: int | None = None
    encoding: str = "h264"

    def scene_at(self, times: np.ndarray) -> np.ndarray:
        """(F,) index of the scene at (F,) times."""
        return np.searchsorted([scene.interval[1] for scene in self.scenes[:-1]], times, side="right")

    def positions(self, shape: Shape, times: np.ndarray) -> np.ndarray:
        """(F, 3) x, y, radius of a shape as the camera sees it at (F,) times."""
        return shape.at(times) + np.outer(times, (*self.pan, 0.0))

    def masks(self, times: np.ndarray, side: int) -> np.ndarray:
        """(F, K, side, side) float32: how much of each pixel each of the K shapes covers, 0 to 1."""
        covered = np.zeros((len(times), len(self.shapes), side, side), np.float32)
        for index, shape in enumerate(self.shapes):
            places = self.positions(shape, times) * side
            for frame in np.flatnonzero(shape.is_visible(times)):
                _stamp(covered[frame, index], shape.shape, *places[frame], shape.tilt, shape.is_outlined)
        return covered

    def rgb(self, shape: Shape) -> tuple[float, float, float]:
        """What a shape is painted with, of 255."""
        return COLORS[shape.color]

    def canvas(self, scene: Scene, side: int, margin: int) -> np.ndarray:
        """(side + 2 margin, side + 2 margin, 3) float32: a scene's background, with what the camera may move to."""
        return _texture(scene, side, margin)

    def backgrounds(self, times: np.ndarray, side: int) -> np.ndarray:
        """(F, side, side, 3) float32: what is behind the shapes at (F,) times."""
        scene_of = self.scene_at(times)
        margin = int(np.ceil(max(map(abs, self.pan)) * side)) + 1
        frames = np.empty((len(times), side, side, 3), np.float32)
        for scene in set(scene_of):
            canvas = self.canvas(self.scenes[scene], side, margin)
            for frame in np.flatnonzero(scene_of == scene):
                x, y = (margin - round(float(p * times[frame] * side)) for p in self.pan)
                frames[frame] = canvas[y : y + side, x : x + side]
        return frames

    def render(self, times: np.ndarray, side: int, masks: np.ndarray | None = None) -> np.ndarray:
        """
        Draws frames.

        Args:
            times: (F,) moments, shares of the clip in [0, 1).
            side: Width and height in pixels.
            masks: What `masks` gives, if it is at hand.

        Returns:
            (F, side, side, 3) uint8.
        """
        frames = self.drawn(times, side, self.masks(times, side) if masks is None else masks)
        if self.noise:
            frames += np.random.default_rng(self.scenes[0].seed).normal(0, self.noise, frames.shape).astype(np.float32)
        return frames.clip(0, 255).round().astype(np.uint8)

    def drawn(self, times: np.ndarray, side: int, masks: np.ndarray) -> np.ndarray:
        """(F, side, side, 3) float32, what [`render`] draws, before noise; not bounded to 0..255."""
        frames = self.backgrounds(times, side)
        for start_x, start_y, stop_x, stop_y in self.specks:
            for frame, time in enumerate(times):
                x, y = start_x + (stop_x - start_x) * time, start_y + (stop_y - start_y) * time
                speck = np.zeros((side, side), np.float32)
                _stamp(speck, "circle", x * side, y * side, 0.014 * side)
                frames[frame] += speck[..., None] * (90 - frames[frame])
        for index, shape in enumerate(self.shapes):
            for frame in np.flatnonzero(shape.is_visible(times)):
                rows, columns = _box(*(self.positions(shape, times[frame : frame + 1])[0] * side), side)
                alpha = masks[frame, index, rows, columns, None]
                frames[frame, rows, columns] += alpha * (np.float32(self.rgb(shape)) - frames[frame, rows, columns])
        return frames


def _box(x: float, y: float, radius: float, side: int) -> tuple[slice, slice]:
    """Rows and columns that a shape may touch."""
    reach = radius * 1.1 + 1
    return tuple(slice(max(0, int(center - reach)), min(side, int(center + reach) + 2)) for center in (y, x))


def _stamp(
    target: np.ndarray, shape: str, x: float, y: float, radius: float, tilt: float = 0.0, is_outlined: bool = False
) -> None:
    """Writes a shape's coverage into a (side, side) picture; edges are one pixel wide."""
    rows, columns = _box(x, y, radius, len(target))
    dx = np.arange(columns.start, columns.stop, dtype=np.float32)[None] + 0.5 - x
    dy = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] + 0.5 - y
    if tilt:
        dx, dy = dx * np.cos(tilt) + dy * np.sin(tilt), dy * np.cos(tilt) - dx * np.sin(tilt)
    if shape == "circle":
        distance = np.hypot(dx, dy) - radius
    elif shape == "ring":
        distance = np.abs(np.hypot(dx, dy) - 0.75 * radius) - 0.27 * radius
    elif shape == "square":
        distance = np.maximum(np.abs(dx), np.abs(dy)) - 0.85 * radius
    elif shape == "triangle":
        distance = np.maximum(dy - 0.7 * radius, 0.87 * np.abs(dx) - 0.5 * dy - 0.5 * radius)
    else:
        arm = 0.33 * radius
        distance = np.minimum(
            np.maximum(np.abs(dx) - radius, np.abs(dy) - arm), np.maximum(np.abs(dy) - radius, np.abs(dx) - arm)
        )
    if is_outlined:
        distance = np.abs(distance + 0.14 * radius) - 0.14 * radius
    target[rows, columns] = np.clip(0.5 - distance, 0, 1)


def _texture(scene: Scene, side: int, margin: int) -> np.ndarray:
    """(side + 2 margin, ...) float32 background in two dull tones."""
    random = np.random.default_rng(scene.seed)
    base = random.uniform(95, 165) + random.uniform(-14, 14, 3)
    tone = base + random.choice((-1, 1)) * random.uniform(22, 34) + random.uniform(-8, 8, 3)
    period = random.uniform(0.10, 0.16)
    phase = random.uniform(0, 1, 2)
    grid = (np.arange(-margin, side + margin, dtype=np.float32) + 0.5) / side
    x, y = grid[None] / period + phase[0], grid[:, None] / period + phase[1]
    soft = np.float32(period * side / 2)  # pixels of half a period: edges one pixel wide
    if scene.texture == "stripes":
        angle = random.choice((0, 1))
        pattern = np.sin(2 * np.pi * (x + y * (0.7 if angle else -0.7))) * soft
    elif scene.texture == "checks":
        pattern = np.sin(np.pi * x) * np.sin(np.pi * y) * soft
    elif scene.texture == "dots":
        pattern = (0.28 - np.hypot((x % 1) - 0.5, (y % 1) - 0.5)) * 2 * soft
    elif scene.texture == "bricks":
        row = np.floor(y)
        along = (x / 2 + row / 2) % 1
        pattern = (0.09 - np.minimum(0.5 - np.abs((y % 1) - 0.5), np.minimum(along, 1 - along) * 2)) * 2 * soft
    elif scene.texture == "waves":
        pattern = np.sin(2 * np.pi * (y + 0.35 * np.sin(np.pi * x))) * soft
    else:
        pattern = (grid[None] + grid[:, None] - 1) * 0.5
    share = np.clip(0.5 + pattern, 0, 1) * np.ones((len(grid), len(grid)), np.float32)
    return (base + share[..., None] * (tone - base)).astype(np.float32)


def random_clip(random: np.random.Generator, held_out: bool = False) -> Clip:
    """
    Draws a clip.

    Args:
        random: Source of everything random.
        held_out: Whether colours and shapes may meet as in [`HELD_OUT`]: never in training.
    """
    num_scenes = int(random.choice((1, 2, 3), p=(0.6, 0.25, 0.15)))
    cuts = [0.0, *(np.arange(1, num_scenes) / num_scenes + random.uniform(-0.06, 0.06, num_scenes - 1)), 1.0]
    textures = random.permutation(len(TEXTURES))
    scenes = [
        Scene(TEXTURES[textures[s]], (cuts[s], cuts[s + 1]), int(random.integers(2**31))) for s in range(num_scenes)
    ]
    pan = (0.0, 0.0)
    if num_scenes == 1 and random.random() < 0.15:
        pan = tuple(random.uniform(0.08, 0.16) * np.array(list(DIRECTIONS.values())[random.integers(4)]))

    shapes: list[Shape] = []
    names: set[tuple[str, str]] = set()
    arrivals = num_scenes == 1 and random.random() < 0.2  # shapes come one after the other
    for index, scene in enumerate(scenes):
        num_shapes = int(random.integers(1, 6 if num_scenes == 1 else 3))
        wanted = len(shapes) + num_shapes
        slots = random.permutation(num_shapes)
        for _ in range(40):
            number = len(shapes) - (wanted - num_shapes)
            if len(shapes) >= wanted:
                break
            name = (str(random.choice(list(COLORS))), str(random.choice(SHAPES)))
            if name in names or (not held_out and name in HELD_OUT):
                continue
            if arrivals:
                behavior = "appears"
                start = max(0.0, slots[number] / num_shapes + random.uniform(0.0, 0.4) / num_shapes - 0.05)
            else:
                weights = (0.14, 0.29, 0.12, 0.12, 0.08, 0.12, 0.13)
                behavior = str(random.choice(BEHAVIORS, p=weights))
                start = None
            made = _random_shapes(random, name, behavior, index, scene.interval, pan, start)
            if behavior == "collides":
                other = (str(random.choice(list(COLORS))), str(random.choice(SHAPES)))
                if other == name or other in names or (not held_out and other in HELD_OUT) or number > 3:
                    continue
                made[1].color, made[1].shape = other
            if _are_apart(shapes, made):
                shapes += made
                names |= {(shape.color, shape.shape) for shape in made}
    specks = random.uniform(0.05, 0.95, (int(random.choice((0, 1, 2), p=(0.6, 0.25, 0.15))), 4))
    return Clip(scenes, shapes, specks, pan, noise=float(random.uniform(0, 3)))


def _random_shapes(random, name, behavior, scene, interval, pan, start) -> list[Shape]:
    """One shape, or two that collide."""
    begin, end = interval
    radius = random.uniform(0.075, 0.13)
    low, high = radius + 0.02, 1 - radius - 0.02
    low_x, high_x = low - min(0.0, pan[0]), high - max(0.0, pan[0])
    low_y, high_y = low - min(0.0, pan[1]), high - max(0.0, pan[1])
    x, y = random.uniform(low_x, high_x), random.uniform(low_y, high_y)
    still = np.array([[begin, x, y, radius], [end, x, y, radius]])
    shape = Shape(*name, behavior, scene, (begin, end), still)
    if behavior == "moves":
        shape.direction = str(random.choice(list(DIRECTIONS)))
        length = random.uniform(0.35, 0.7)
        dx, dy = DIRECTIONS[shape.direction]
        first = np.array([random.uniform(low_x, high_x), random.uniform(low_y, high_y)])
        if dx:
            first[0] = (
                random.uniform(low_x, max(low_x, high_x - length))
                if dx > 0
                else high_x - random.uniform(0, max(0.0, high_x - low_x - length))
            )
        else:
            first[1] = (
                random.uniform(low_y, max(low_y, high_y - length))
                if dy > 0
                else high_y - random.uniform(0, max(0.0, high_y - low_y - length))
            )
        last = (first + length * np.array([dx, dy])).clip([low_x, low_y], [high_x, high_y])
        shape.knots = np.array([[begin, *first, radius], [end, *last, radius]])
    elif behavior in ("grows", "shrinks"):
        small, large = random.uniform(0.06, 0.075), random.uniform(0.13, 0.16)
        x = min(max(x, low_x + large - radius), high_x - large + radius)
        y = min(max(y, low_y + large - radius), high_y - large + radius)
        sizes = (small, large) if behavior == "grows" else (large, small)
        shape.knots = np.array([[begin, x, y, sizes[0]], [end, x, y, sizes[1]]])
    elif behavior == "appears":
        shape.interval = (begin + random.uniform(0.25, 0.65) * (end - begin) if start is None else start, end)
        if start == 0.0:
            shape.behavior = "stays"
    elif behavior == "vanishes":
        shape.interval = (begin, begin + random.uniform(0.35, 0.75) * (end - begin))
    elif behavior == "collides":
        other_radius = random.uniform(0.075, 0.12)
        is_flat = random.random() < 0.5
        meet = begin + random.uniform(0.4, 0.6) * (end - begin)
        reach = random.uniform(0.18, 0.3)
        along, across = random.uniform(0.42, 0.58), random.uniform(0.16, 0.84)
        spread = (radius + other_radius) / 2 + 0.005
        knots = []
        for sign, size in ((-1, radius), (1, other_radius)):
            near, far = along + sign * spread, along + sign * (spread + reach)
            far = min(max(far, size + 0.01), 0.99 - size)
            points = [(far, across), (near, across), (far, across)]
            points = points if is_flat else [(b, a) for a, b in points]
            knots.append(np.array([[t, *p, size] for t, p in zip((begin, meet, end), points)]))
        shape.knots = knots[0]
        return [shape, Shape("", "", behavior, scene, (begin, end), knots[1])]
    return [shape]


def _are_apart(shapes: list[Shape], new: list[Shape]) -> bool:
    """Whether no new shape ever touches one of the others."""
    for shape in new:
        times = np.linspace(*shape.interval, 24, endpoint=False)
        place = shape.at(times)
        for other in shapes:
            there = other.at(times)
            gap = np.hypot(*(place - there)[:, :2].T) - 1.05 * (place[:, 2] + there[:, 2]) - 0.02
            if (gap[other.is_visible(times)] < 0).any():
                return False
    return True
