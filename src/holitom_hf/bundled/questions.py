"""Questions with exact answers about drawn clips, in memory or as a folder of H.264 files."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from ..video.encoding import ENCODINGS, write_video
from .scenes import COLORS, DIRECTIONS, SHAPES, TEXTURES, Clip, Shape, random_clip
from .unseen import unseen_clip


QUESTION_TYPES = (
    "color",
    "shape",
    "motion",
    "count",
    "appearance order",
    "scene order",
    "existence",
    "relation",
    "change",
)
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
NUM_FRAMES = 16  # that the questions about a written clip can be answered from, uniformly sampled
# First number of every clip's seed. Whatever is chosen is chosen on validation, which is drawn as test is; unseen is
# of another family (unseen.py), and so is unseen-turns, whose questions come second in their conversation.
SPLITS = {"train": 0, "test": 1, "validation": 2, "unseen": 3, "unseen-turns": 4}

TEMPLATES = {
    "color": ("What color is the {shape}?", "Which color does the {shape} have?"),
    "shape": ("What shape is {color}?", "Which shape is the {color} object?"),
    "motion": ("Which way does the {name} move?", "In which direction does the {name} go?"),
    "count": ("How many shapes are there?", "How many objects are in the video?"),
    "appearance order": ("Which appears first, the {first} or the {second}?",),
    "scene order": ("Which background comes first, {first} or {second}?", "What is the background at the {when}?"),
    "existence": ("Is there a {name}?", "Does a {name} appear in the video?"),
    "relation": ("Is the {first} left or right of the {second}?", "Is the {first} above or below the {second}?"),
    "change": ("What happens to the {name}?", "What does the {name} do?"),
}


@dataclass
class Question:
    """
    A question about a clip.

    Attributes:
        type: One of [`QUESTION_TYPES`].
        text: The question.
        answer: The only right answer, in lower case.
        about: Names of the shapes or backgrounds it is about, in the text's order; not written to files.
        before: The question that is asked, and answered, before it in the same conversation, if any.
    """

    type: str
    text: str
    answer: str
    about: tuple[str, ...] = field(default=(), compare=False, kw_only=True)
    before: str | None = field(default=None, kw_only=True)


@dataclass
class VideoQuestion(Question):
    """
    A question about a video file, `video`, relative to the set's folder; `id` is unique in the set, `num_frames` how
    many frames to take (`None`: what the model's processor takes).
    """

    video: str
    id: str
    num_frames: int | None = None


def uniform_times(num_frames: int) -> np.ndarray:
    """(F,) moments in the middle of F equal parts of a clip."""
    return (np.arange(num_frames) + 0.5) / num_frames


def is_countable(clip: Clip) -> bool:
    """Whether there is a word for the number of a clip's shapes: whoever sees the clip may well ask for it."""
    return len(clip.shapes) < len(NUMBERS)


def ask(clip: Clip, times: np.ndarray, random: np.random.Generator) -> list[Question]:
    """
    All sorts of questions that the frames at `times` answer.

    Args:
        clip: The clip.
        times: (F,) moments of the frames, ascending.
        random: Chooses among templates and pairs.

    Returns:
        At most three questions of each type, in random order.
    """
    seen = [shape for shape in clip.shapes if shape.is_visible(times).any()]
    asked: list[Question] = []

    def add(kind: str, answer: str, *about: Shape | str, template: int | None = None, **values: str) -> None:
        templates = TEMPLATES[kind]
        text = templates[random.integers(len(templates)) if template is None else template].format(**values)
        names = tuple(thing if isinstance(thing, str) else thing.name for thing in about)
        asked.append(Question(kind, text, answer, about=names))

    def some(items: list, number: int) -> list:
        return [items[i] for i in random.permutation(len(items))[:number]]

    is_whole = len(seen) == len(clip.shapes)
    for shape in some([s for s in seen if is_whole and _is_only(s, clip.shapes, "shape")], 2):
        add("color", shape.color, shape, shape=shape.shape)
    for shape in some([s for s in seen if is_whole and _is_only(s, clip.shapes, "color")], 2):
        add("shape", shape.shape, shape, color=shape.color)
    for shape in some([s for s in seen if s.direction and _travelled(s, times) > 0.17 and not any(clip.pan)], 2):
        add("motion", shape.direction, shape, name=shape.name)
    if len(clip.scenes) == 1 and is_whole:
        add("count", NUMBERS[len(seen)])
    pairs = [(a, b) for a in seen for b in seen if _first_seen(a, times) < _first_seen(b, times)]
    for first, second in some(pairs, 2):
        pair = some([first, second], 2)
        add("appearance order", first.name, *pair, first=pair[0].name, second=pair[1].name)
    _ask_scenes(clip, times, random, add)
    for name, answer in _existence(seen, clip.shapes, random):
        add("existence", answer, *(shape for shape in seen if shape.name == name), name=name)
    relations = [
        (a, b, axis) for a in seen for b in seen for axis in (0, 1) if a is not b and _side(a, b, axis, times)
    ]
    for first, second, axis in some(relations, 2):
        words = (("left", "right"), ("above", "below"))[axis]
        answer = words[_side(first, second, axis, times) > 0]
        add("relation", answer, first, second, template=axis, first=first.name, second=second.name)
    for shape in some([s for s in seen if _changes_visibly(s, clip, times)], 3):
        add("change", shape.behavior, shape, name=shape.name)
    return some(asked, len(asked))


def second_turns(questions: list[Question]) -> list[Question]:
    """Every question of a clip after the one before it, the first after the last; none where there is but one."""
    befores = questions[-1:] + questions[:-1]
    return [replace(q, before=before.text) for q, before in zip(questions, befores) if before is not q]


def _is_only(shape: Shape, shapes: list[Shape], attribute: str) -> bool:
    return sum(getattr(other, attribute) == getattr(shape, attribute) for other in shapes) == 1


def _first_seen(shape: Shape, times: np.ndarray) -> int:
    return int(shape.is_visible(times).argmax())


def _travelled(shape: Shape, times: np.ndarray) -> float:
    places = shape.at(times[shape.is_visible(times)])
    return float(np.hypot(*(places[-1] - places[0])[:2]))


def _side(first: Shape, second: Shape, axis: int, times: np.ndarray) -> int:
    """-1 or 1 if the first is clearly on that side of the second whenever both are there; else 0."""
    both = first.is_visible(times) & second.is_visible(times)
    if not both.any():
        return 0
    gaps = (first.at(times) - second.at(times))[both, axis]
    return int(np.sign(gaps[0])) if (gaps > 0.15).all() or (gaps < -0.15).all() else 0


def _changes_visibly(shape: Shape, clip: Clip, times: np.ndarray) -> bool:
    """Whether the frames show what the shape does."""
    visible = shape.is_visible(times)
    in_scene = clip.scene_at(times) == shape.scene
    places = shape.at(times[visible])
    if in_scene.sum() < 3 or visible.sum() < 2:
        return False
    if shape.behavior in ("stays", "moves", "collides") and any(clip.pan):
        return False
    if shape.behavior == "moves":
        return _travelled(shape, times) > 0.17
    if shape.behavior in ("grows", "shrinks"):
        sizes = places[[0, -1], 2]
        return sizes.max() / sizes.min() > 1.3
    if shape.behavior == "appears":
        return not visible[in_scene][0]
    if shape.behavior == "vanishes":
        return not visible[in_scene][-1]
    if shape.behavior == "collides":
        gone = np.hypot(*(places - places[0])[:, :2].T)
        return gone.max() > 0.1 and gone[-1] < 0.6 * gone.max()
    return True


def _ask_scenes(clip: Clip, times: np.ndarray, random: np.random.Generator, add) -> None:
    shown = list(dict.fromkeys(clip.scene_at(times).tolist()))
    if len(clip.scenes) == 1 or len(shown) < len(clip.scenes):
        return
    textures = [scene.texture for scene in clip.scenes]
    first, second = sorted(random.permutation(len(textures))[:2])
    names = [textures[i] for i in random.permutation((first, second))]
    add("scene order", textures[first], *names, template=0, first=names[0], second=names[1])
    when = str(random.choice(("start", "end")))
    asked_for = textures[0 if when == "start" else -1]
    add("scene order", asked_for, asked_for, template=1, when=when)


def _existence(seen: list[Shape], shapes: list[Shape], random: np.random.Generator) -> list[tuple[str, str]]:
    """Up to one shape that is there, and as often one that is not, mostly one that shares a colour or a shape."""
    if not seen:
        return []
    chosen = seen[random.integers(len(seen))]
    names = {shape.name for shape in shapes}
    color, shape = str(random.choice(list(COLORS))), str(random.choice(SHAPES))
    absent = [f"{chosen.color} {shape}", f"{color} {chosen.shape}", f"{color} {shape}"]
    absent = [absent[i] for i in random.permutation(3) if absent[i] not in names]
    return [(chosen.name, "yes"), *((name, "no") for name in absent[:1])]


def vocabulary_texts() -> list[str]:
    """Texts that between them hold every word of questions and answers, as often as they need to become tokens."""
    words = [*COLORS, *SHAPES, *TEXTURES, *DIRECTIONS, *NUMBERS, "yes", "no", "above", "below", "start", "end"]
    words += ["stays", "moves", "grows", "shrinks", "appears", "vanishes", "collides"]
    texts = [template for templates in TEMPLATES.values() for template in templates]
    fields = {
        "shape": "circle",
        "color": "red",
        "name": "red circle",
        "first": "dots",
        "second": "waves",
        "when": "end",
    }
    return [text.format(**fields) for text in texts] + [f"{word} {word}" for word in words]


def draw_set(num_questions: int, split: str = "test", seed: int = 0) -> Iterator[tuple[Clip, list[Question]]]:
    """
    Draws clips and questions, the same ones for the same arguments.

    Args:
        num_questions: Total number; types are balanced as far as a clip's questions allow.
        split: One of [`SPLITS`], whose seeds never meet; no clip of `"train"` has held-out combinations.
        seed: Another seed, another set.

    Yields:
        Clips, each with one to six questions that its number of uniform frames answers, or else [`NUM_FRAMES`].

    Raises:
        ValueError: If `split` is not known or `num_questions` is not positive.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if num_questions < 1:
        raise ValueError(f"num_questions must be positive, got {num_questions}")
    counts = dict.fromkeys(QUESTION_TYPES, 0)
    number = 0
    while (total := sum(counts.values())) < num_questions:
        random = np.random.default_rng((SPLITS[split], seed, number))
        number += 1
        is_unseen = split in ("unseen", "unseen-turns")
        clip = unseen_clip(random) if is_unseen else random_clip(random, held_out=split != "train")
        questions = ask(clip, uniform_times(clip.num_frames or NUM_FRAMES), random)
        if split == "unseen-turns":
            questions = second_turns(questions)
        limit = min(counts.values()) + max(2, num_questions // 100)
        chosen: list[Question] = []
        for question in questions:
            if counts[question.type] < limit and len(chosen) < min(6, num_questions - total):
                chosen.append(question)
                counts[question.type] += 1
        if chosen:
            yield clip, chosen


def write_set(
    folder: Path,
    num_questions: int = 1000,
    split: str = "test",
    seed: int = 0,
    side: int = 224,
    num_frames: int = 32,
    progress=iter,
) -> list[VideoQuestion]:
    """
    Writes a set of [`draw_set`] as video files and `questions.jsonl`, which is written last: a set with it is whole.

    Args:
        folder: Made if missing.
        num_questions, split, seed: As in [`draw_set`].
        side: Width and height of the videos in pixels.
        num_frames: Their length, a multiple of [`NUM_FRAMES`], where a clip has none of its own.
        progress: Wraps the list of clips, e.g. to show a bar.

    Returns:
        The questions, in the file's order.

    Raises:
        ValueError: If the length or the side does not fit.
    """
    if num_frames % NUM_FRAMES or num_frames < NUM_FRAMES:
        raise ValueError(f"num_frames must be a multiple of {NUM_FRAMES}, got {num_frames}")
    if side < 112 or side % 2:
        raise ValueError(f"side must be even and at least 112, got {side}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written: list[VideoQuestion] = []
    for number, (clip, questions) in enumerate(progress(list(draw_set(num_questions, split, seed)))):
        name = f"{split}-{seed}-{number:04d}"
        file = name + ENCODINGS[clip.encoding].suffix
        write_video(
            folder / file, clip.render(uniform_times(clip.num_frames or num_frames), side), encoding=clip.encoding
        )
        written += [
            VideoQuestion(**asdict(question), video=file, id=f"{name}-{index}", num_frames=clip.num_frames)
            for index, question in enumerate(questions)
        ]
    partial = folder / "questions.jsonl.part"
    partial.write_text("".join(json.dumps(_to_line(question)) + "\n" for question in written))
    partial.rename(folder / "questions.jsonl")
    return written


def read_set(folder: Path) -> list[VideoQuestion]:
    """
    Reads what [`write_set`] wrote.

    Raises:
        FileNotFoundError: If `folder` holds no whole set.
    """
    path = Path(folder) / "questions.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: write a set with `holitom-hf questions {folder}`")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    return [VideoQuestion(text=line.pop("question"), **line) for line in lines]


def _to_line(question: VideoQuestion) -> dict:
    """The fields as `holitom-hf batch` and most data sets name them."""
    line = {
        "id": question.id,
        "video": question.video,
        "question": question.text,
        "answer": question.answer,
        "type": question.type,
    }
    some = {"num_frames": question.num_frames, "before": question.before}
    return line | {name: value for name, value in some.items() if value is not None}


class DrawnVideoQuestions:
    """
    The questions of [`draw_set`] one by one, as `datasets` has them: dictionaries with `id`, `video` (F, H, W, 3)
    uint8, `question`, `answer` and `type`, and `before` in a split whose questions come second.
    `datasets.IterableDataset.from_generator` takes an instance's `__iter__`.
    """

    def __init__(
        self,
        num_questions: int = 1000,
        split: str = "test",
        seed: int = 0,
        side: int = 112,
        num_frames: int = NUM_FRAMES,
    ):
        """
        Args:
            num_questions, split, seed: As in [`draw_set`].
            side: Width and height in pixels.
            num_frames: Frames of every video whose clip has no number of its own.
        """
        self.num_questions, self.split, self.seed = num_questions, split, seed
        self.side, self.num_frames = side, num_frames

    def __len__(self) -> int:
        return self.num_questions

    def __iter__(self) -> Iterator[dict]:
        for number, (clip, questions) in enumerate(draw_set(self.num_questions, self.split, self.seed)):
            video = clip.render(uniform_times(clip.num_frames or self.num_frames), self.side)
            for index, question in enumerate(questions):
                line = {
                    "id": f"{self.split}-{self.seed}-{number:04d}-{index}",
                    "video": video,
                    "question": question.text,
                    "answer": question.answer,
                    "type": question.type,
                }
                yield line if question.before is None else line | {"before": question.before}
