"""Endless drawn clips to train on, in many layouts; the same ones for the same step."""

from dataclasses import dataclass, field

import numpy as np
from torch.utils.data import IterableDataset

from ..questions import Question, ask, uniform_times
from ..scenes import random_clip
from .labels import GRID, SIDE, PatchLabels, patch_labels, trend_labels


# Numbers of frames, and how often each is met until that share of the steps: looking something up in a picture is
# learned first, and many short clips teach it faster than a few long ones.
FRAMES = (1, 2, 3, 4, 6, 8, 10, 12, 16, 24, 32)
CURRICULUM = (
    (0.15, (0.4, 0.3, 0.2, 0.1, 0, 0, 0, 0, 0, 0, 0)),
    (0.6, (0.05, 0.15, 0.15, 0.25, 0.2, 0.2, 0, 0, 0, 0, 0)),
    (1.01, (0.03, 0.05, 0.05, 0.1, 0.14, 0.2, 0.1, 0.1, 0.18, 0.03, 0.02)),
)
TRAIN_SEEDS = 7  # first number of every training seed; written sets use others (questions.SPLITS)


@dataclass
class Batch:
    """
    Clips in one layout.

    Attributes:
        frames: (B, F, 112, 112, 3) uint8.
        labels: Per clip.
        trends: Per clip, as [`trend_labels`] gives them.
        questions: Per clip, as many for each.
        layout: "video" or "images".
        stretch: Factor on the visual tokens' positions, or on the times before them.
    """

    frames: np.ndarray
    labels: list[PatchLabels]
    trends: list[tuple] = field(default_factory=list)
    questions: list[list[Question]] = field(default_factory=list)
    layout: str = "video"
    stretch: float = 1.0


def told_frames(num_frames: int, frames_per_token: int) -> np.ndarray:
    """Which frames labels tell about: the last of those that share tokens."""
    return np.minimum(
        np.arange(frames_per_token - 1, num_frames + frames_per_token - 1, frames_per_token), num_frames - 1
    )


class SingleFrames(IterableDataset):
    """Frames of random clips for the vision tower, two of a clip."""

    frames_per_token = 1

    def __init__(self, batch_size: int, start: int, rank: int = 0):
        self.batch_size, self.start, self.rank = batch_size, start, rank

    def __iter__(self):
        step = self.start
        while True:
            random = np.random.default_rng((TRAIN_SEEDS, 0, step, self.rank))
            frames, labels = [], []
            for _ in range(self.batch_size // 2):
                clip = random_clip(random)
                times = self.times(random)
                told = told_frames(len(times), self.frames_per_token)
                masks = clip.masks(times, SIDE)
                frames.append(clip.render(times, SIDE, masks))
                labels.append(tuple(patch_labels(clip, times[told], masks[told], grid) for grid in (GRID, GRID // 2)))
            yield Batch(np.stack(frames), labels)
            step += 1

    def times(self, random: np.random.Generator) -> np.ndarray:
        """When the frames of a clip are, ascending."""
        return np.sort(random.uniform(0, 1, 2))


class PairedFrames(SingleFrames):
    """Two pairs of frames of every clip, those of a pair near each other or the same, for towers that see pairs."""

    frames_per_token = 2

    def times(self, random: np.random.Generator) -> np.ndarray:
        """Overrides SingleFrames.times."""
        first = np.sort(random.uniform(0, 1, 2))
        return np.stack([first, np.minimum(first + random.choice((0, 1 / 32, 1 / 16, 1 / 8)), 1)], 1).flatten()


class QuestionedClips(IterableDataset):
    """
    Clips with questions; batches hold about as many tokens each, whatever their layout.

    Attributes:
        frames_per_token: Frames that share tokens.
        image_grid: Tokens of a side of an image.
        frame_text: About as many tokens of text stand with every frame's.
    """

    frames_per_token, image_grid, frame_text = 1, GRID, 0

    def __init__(self, start: int, num_steps: int, rank: int = 0, num_tokens: int = 2600, num_questions: int = 10):
        self.start, self.num_steps, self.rank = start, num_steps, rank
        self.num_tokens, self.num_questions = num_tokens, num_questions

    def __iter__(self):
        for step in range(self.start, self.num_steps):
            yield self.draw(step)

    def layout(self, step: int) -> tuple[str, int, float]:
        """ "video" or "images", their number of frames (few at first, then up to 32), the stretch of positions."""
        random, progress = np.random.default_rng((TRAIN_SEEDS, 1, step)), step / self.num_steps
        layout = "images" if random.random() < 0.06 else "video"
        if layout == "images":
            num_frames = int(random.integers(1, 5))
        else:
            number = random.random()
            stage = next(weights for end, weights in CURRICULUM if progress < end)
            num_frames = FRAMES[int(np.searchsorted(np.cumsum(stage)[:-1], number, side="right"))]
        is_stretched = random.random() < 0.25 and progress > 0.5
        stretch = float(np.exp(random.uniform(np.log(0.25), np.log(1.3)))) if is_stretched else 1.0
        return layout, num_frames, stretch

    def draw(self, step: int) -> Batch:
        """One batch. All ranks have the same layout and their own clips."""
        layout, num_frames, stretch = self.layout(step)
        grid = self.image_grid if layout == "images" else GRID // 2
        per_token = 1 if layout == "images" else self.frames_per_token
        num_visual = len(told_frames(num_frames, per_token)) * (grid**2 + self.frame_text)
        size = max(2, round(self.num_tokens / (num_visual + 18 * self.num_questions)))
        batch = Batch(np.empty(0), [], layout=layout, stretch=stretch)
        random = np.random.default_rng((TRAIN_SEEDS, 2, step, self.rank))
        frames = []
        while len(frames) < size:
            clip = random_clip(random)
            times = uniform_times(num_frames)
            if num_frames > 1 and random.random() < 0.4:  # frames dropped at random from a longer clip
                longer = uniform_times(int(num_frames * random.choice((1.25, 1.5, 2))) + 1)
                times = np.sort(random.choice(longer, num_frames, replace=False))
            questions = ask(clip, times, random)
            if len(questions) < 3:
                continue
            # Types that not every clip has come first.
            rare = {"motion": 0.5, "count": 0.5, "change": 0.7, "scene order": 0.6, "appearance order": 0.7}
            questions.sort(key=lambda question: random.random() * rare.get(question.type, 1.0))
            repeats = -(-self.num_questions // len(questions))
            batch.questions.append((questions * repeats)[: self.num_questions])
            masks = clip.masks(times, SIDE)
            frames.append(clip.render(times, SIDE, masks))
            labels, told = patch_labels(clip, times, masks, grid), told_frames(num_frames, per_token)
            batch.trends.append(tuple(part[told] for part in trend_labels(clip, times, labels.index)))
            batch.labels.append(labels.at(told))
        batch.frames = np.stack(frames)
        return batch


class PairedClips(QuestionedClips):
    """Clips for models whose tokens are of two frames each, with a time before them, and of images as many."""

    frames_per_token, image_grid, frame_text = 2, GRID // 2, 9

    def layout(self, step: int) -> tuple[str, int, float]:
        """Overrides QuestionedClips.layout: times are stretched, always."""
        layout, num_frames, _ = super().layout(step)
        stretch = np.random.default_rng((TRAIN_SEEDS, 4, step)).uniform(np.log(0.25), np.log(4))
        return layout, num_frames, float(np.exp(stretch))
