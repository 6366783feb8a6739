"""Questions about drawn clips: right, balanced, the same for the same seed, and readable from real files."""

import hashlib
import json
from collections import Counter, defaultdict

import numpy as np
import pytest

from holitom_hf import HoliTomVideoProcessor
from holitom_hf.bundled.questions import (
    NUM_FRAMES,
    NUMBERS,
    QUESTION_TYPES,
    SPLITS,
    DrawnVideoQuestions,
    ask,
    draw_set,
    read_set,
    uniform_times,
    write_set,
)
from holitom_hf.bundled.scenes import COLORS, HELD_OUT, Clip, Scene, Shape
from holitom_hf.video.decoding import read_video


TEST_SET = list(draw_set(600))
TIMES = uniform_times(NUM_FRAMES)


def still(color, shape, x, y, interval=(0.0, 1.0), behavior="stays", direction=None, to=None, scene=0):
    knots = np.array([[interval[0], x, y, 0.1], [interval[1], *(to or (x, y)), 0.1]])
    return Shape(color, shape, behavior, scene, interval, knots, direction)


def questions_of(shapes, kind, times=TIMES, scenes=None):
    """Every question of one type that is ever asked about the clip, with its answer."""
    clip = Clip(scenes or [Scene("dots", (0.0, 1.0), 0)], shapes)
    asked = [q for seed in range(40) for q in ask(clip, times, np.random.default_rng(seed))]
    return {question.text: question.answer for question in asked if question.type == kind}


def test_color_and_shape_are_asked_where_only_one_thing_can_be_meant():
    shapes = [still("red", "circle", 0.2, 0.2), still("blue", "circle", 0.8, 0.2), still("blue", "ring", 0.5, 0.8)]
    assert set(questions_of(shapes, "color").values()) == {"blue"}
    assert all("ring" in text for text in questions_of(shapes, "color"))
    assert set(questions_of(shapes, "shape").values()) == {"circle"}
    assert all("red" in text for text in questions_of(shapes, "shape"))


def test_motion_and_change():
    shapes = [
        still("red", "circle", 0.2, 0.2, behavior="moves", direction="right", to=(0.8, 0.2)),
        still("green", "ring", 0.5, 0.8),
        still("blue", "cross", 0.8, 0.5, (0.5, 1.0), "appears"),
        still("black", "square", 0.2, 0.5, (0.0, 0.5), "vanishes"),
    ]
    assert questions_of(shapes, "motion") == {
        "Which way does the red circle move?": "right",
        "In which direction does the red circle go?": "right",
    }
    answers = questions_of(shapes, "change")
    for name, answer in (("red circle", "moves"), ("green ring", "stays"), ("blue cross", "appears")):
        assert answers[f"What happens to the {name}?"] == answer
    assert answers["What does the black square do?"] == "vanishes"


def test_order_relation_count_and_existence():
    shapes = [still("red", "circle", 0.2, 0.2), still("blue", "cross", 0.8, 0.7, (0.5, 1.0), "appears")]
    assert set(questions_of(shapes, "appearance order").values()) == {"red circle"}
    relation = questions_of(shapes, "relation")
    assert relation["Is the red circle left or right of the blue cross?"] == "left"
    assert relation["Is the blue cross above or below the red circle?"] == "below"
    assert set(questions_of(shapes, "count").values()) == {"two"}
    existence = questions_of(shapes, "existence")
    assert existence["Is there a red circle?"] == "yes"
    denied = [text for text, answer in existence.items() if answer == "no"]
    assert any("red" in text or "cross" in text for text in denied)
    assert not any("red circle" in text or "blue cross" in text for text in denied)


def test_scene_order():
    scenes = [Scene("dots", (0.0, 0.5), 0), Scene("waves", (0.5, 1.0), 1)]
    answers = questions_of([still("red", "circle", 0.2, 0.2)], "scene order", scenes=scenes)
    assert answers["Which background comes first, waves or dots?"] == "dots"
    assert answers["What is the background at the end?"] == "waves"


@pytest.mark.parametrize("times", [[0.1], [0.6, 0.7, 0.8]])
def test_nothing_is_asked_that_the_frames_do_not_show(times):
    shapes = [
        still("red", "circle", 0.2, 0.2, (0.0, 0.5), "vanishes"),
        still("green", "ring", 0.5, 0.8, behavior="moves", direction="left", to=(0.1, 0.8)),
        still("blue", "cross", 0.8, 0.2, (0.55, 1.0), "appears"),
    ]
    times = np.array(times)
    assert questions_of(shapes, "appearance order", times) == {}
    assert questions_of(shapes, "motion", times) == {}
    assert not {"vanishes", "appears", "moves"} & set(questions_of(shapes, "change", times).values())
    asked = questions_of(shapes, "existence", times)
    assert not any(name in text for text in asked if asked[text] == "no" for name in ("red circle", "blue cross"))


def test_a_set_is_the_same_for_the_same_seed_and_another_for_another():
    texts = [(q.text, q.answer) for _, asked in TEST_SET for q in asked]
    assert texts == [(q.text, q.answer) for _, asked in draw_set(600) for q in asked]
    assert texts[:50] != [(q.text, q.answer) for _, asked in draw_set(50, seed=1) for q in asked]
    assert texts[:50] != [(q.text, q.answer) for _, asked in draw_set(50, split="train") for q in asked]


def test_the_test_set_is_the_one_that_published_figures_are_about():
    drawn = list(draw_set(1000))
    assert len(drawn) == 213
    lines = [
        (
            [(scene.texture, round(float(scene.interval[1]), 6), scene.seed) for scene in clip.scenes],
            [(shape.name, shape.behavior, shape.knots.round(6).tolist()) for shape in clip.shapes],
            [(question.text, question.answer) for question in asked],
        )
        for clip, asked in drawn
    ]
    digest = hashlib.sha256(json.dumps(lines).encode()).hexdigest()
    assert digest == "c263addeceb456744c3ea6ecbfd05720f2e9fd8fb2aa6f658eba2a0b49bcd98e"


def test_no_clip_of_one_split_is_in_another():
    clips = {
        split: {clip.render(TIMES[:1], 112).tobytes() for seed in (0, 1) for clip, _ in draw_set(200, split, seed)}
        for split in SPLITS
    }
    assert all(len(found) > 40 for found in clips.values())
    assert sum(map(len, clips.values())) == len(set().union(*clips.values()))


def test_held_out_combinations_are_kept_from_training_alone():
    for split in SPLITS:
        names = {(s.color, s.shape) for clip, _ in draw_set(300, split) for s in clip.shapes}
        assert bool(names & HELD_OUT) == (split != "train"), split


def test_types_are_balanced_and_no_answer_is_the_rule():
    counts = Counter(q.type for _, asked in TEST_SET for q in asked)
    assert sum(counts.values()) == 600
    assert set(counts) == set(QUESTION_TYPES)
    assert min(counts.values()) > 0.7 * 600 / len(QUESTION_TYPES)
    answers = defaultdict(Counter)
    for _, asked in TEST_SET:
        for question in asked:
            answers[question.type][question.answer] += 1
    for kind, found in answers.items():
        assert found.most_common(1)[0][1] <= 0.65 * sum(found.values()), kind


def test_counts_are_those_of_the_colored_areas():
    checked = 0
    for clip, asked in TEST_SET:
        count = [q for q in asked if q.type == "count"]
        if not count or len({s.color for s in clip.shapes}) < len(clip.shapes):
            continue
        frames = clip.render(TIMES, 112).astype(int)
        found = [color for color in COLORS if (np.abs(frames - COLORS[color]).max(-1) < 20).sum((1, 2)).max() > 15]
        assert NUMBERS.index(count[0].answer) == len(found)
        checked += 1
    assert checked > 10


def test_a_written_set_is_read_through_the_real_decoder(tmp_path):
    written = write_set(tmp_path, 9, side=112, num_frames=16)
    assert read_set(tmp_path) == written
    assert not list(tmp_path.glob("*.part"))
    clips = [clip for clip, _ in draw_set(9)]
    names = list(dict.fromkeys(question.video for question in written))
    assert len(clips) == len(names)
    for clip, name in zip(clips, names):
        frames, _ = read_video(tmp_path / name, lambda metadata: np.arange(16))
        drawn = clip.render(TIMES, 112)
        frames = frames.permute(0, 2, 3, 1).numpy()
        assert np.abs(frames.astype(int) - drawn).mean() < 8
    pixels = HoliTomVideoProcessor(size={"height": 112, "width": 112}, num_frames=16)(
        str(tmp_path / names[0]), return_tensors="pt"
    )["pixel_values_videos"]
    assert pixels.shape == (1, 16, 3, 112, 112)


def test_a_set_without_its_last_file_is_not_a_set(tmp_path):
    write_set(tmp_path, 2, side=112, num_frames=16)
    (tmp_path / "questions.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="write a set with"):
        read_set(tmp_path)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"split": "dev"}, "split must be one of train, test, validation, unseen, unseen-turns, got 'dev'"),
        ({"num_questions": 0}, "num_questions must be positive"),
        ({"side": 113}, "side must be even and at least 112"),
        ({"side": 64}, "side must be even and at least 112"),
        ({"num_frames": 20}, "num_frames must be a multiple of 16"),
    ],
)
def test_arguments_that_make_no_set(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        write_set(tmp_path, **{"num_questions": 3} | kwargs)
    assert not list(tmp_path.iterdir())


def test_json_lines_hold_what_a_reader_needs(tmp_path):
    write_set(tmp_path, 3, side=112, num_frames=16)
    first = json.loads((tmp_path / "questions.jsonl").read_text().splitlines()[0])
    assert set(first) == {"type", "question", "answer", "video", "id"}
    assert (tmp_path / first["video"]).is_file()


def test_drawn_questions_are_those_of_the_written_set(tmp_path):
    drawn = DrawnVideoQuestions(7)
    assert len(drawn) == 7
    examples = list(drawn)
    written = write_set(tmp_path, 7, side=112, num_frames=16)
    assert [(e["id"], e["question"], e["answer"], e["type"]) for e in examples] == [
        (q.id, q.text, q.answer, q.type) for q in written
    ]
    assert {example["video"].shape for example in examples} == {(16, 112, 112, 3)}
    assert [example["id"] for example in drawn] == [example["id"] for example in examples]
