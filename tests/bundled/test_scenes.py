"""Drawn clips: what is drawn is what the ground truth says, judged by the pixels alone."""

import numpy as np
import pytest

from holitom_hf.bundled.questions import uniform_times
from holitom_hf.bundled.scenes import (
    BEHAVIORS,
    COLORS,
    DIRECTIONS,
    HELD_OUT,
    SHAPES,
    TEXTURES,
    Clip,
    Scene,
    Shape,
    random_clip,
)


CLIPS = [random_clip(np.random.default_rng((5, seed))) for seed in range(300)]
TIMES = uniform_times(16)


def area(frames, color):
    """(F, H, W) where a colour is seen."""
    return np.abs(frames.astype(int) - COLORS[color]).max(-1) < 24


def alone(behavior, **fields):
    """A clip with one shape of that behaviour out of random ones."""
    for clip in CLIPS:
        for shape in clip.shapes:
            if shape.behavior == behavior and all(getattr(shape, k) == v for k, v in fields.items()):
                return Clip([Scene("plain", (0, 1), 0)], [shape]), shape
    raise LookupError(behavior)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_shape_moves_where_it_says(direction):
    clip, shape = alone("moves", direction=direction)
    frames = clip.render(TIMES, 112)
    centers = [np.argwhere(a).mean(0) for a in area(frames, shape.color) if a.any()]
    down, right = centers[-1] - centers[0]
    expected = DIRECTIONS[direction]
    assert np.sign(right) * (abs(right) > 15) == expected[0]
    assert np.sign(down) * (abs(down) > 15) == expected[1]


@pytest.mark.parametrize(("behavior", "grows"), [("grows", True), ("shrinks", False)])
def test_a_shape_changes_its_size(behavior, grows):
    clip, shape = alone(behavior)
    sizes = [a.sum() for a in area(clip.render(TIMES, 112), shape.color) if a.any()]
    assert bool(sizes[-1] > 1.8 * sizes[0]) is grows
    assert bool(sizes[0] > 1.8 * sizes[-1]) is not grows


@pytest.mark.parametrize(("behavior", "first", "last"), [("appears", False, True), ("vanishes", True, False)])
def test_a_shape_comes_and_goes(behavior, first, last):
    clip, shape = alone(behavior, scene=0)
    seen = area(clip.render(TIMES * shape.knots[-1, 0], 112), shape.color).any((1, 2))
    assert (seen[0], seen[-1]) == (first, last)
    assert np.abs(np.diff(seen.astype(int))).sum() == 1


def test_two_shapes_that_collide_meet_and_part():
    for clip in CLIPS:
        pair = [shape for shape in clip.shapes if shape.behavior == "collides"]
        if len(pair) == 2:
            times = np.linspace(*pair[0].interval, 101, endpoint=False)
            first, second = pair[0].at(times), pair[1].at(times)
            gap = np.hypot(*(first - second)[:, :2].T) - (first[:, 2] + second[:, 2])
            assert 20 < gap.argmin() < 80
            assert abs(gap.min()) < 0.03
            assert min(gap[0], gap[-1]) > 0.1


def test_shapes_that_do_not_collide_never_touch():
    times = np.linspace(0, 1, 60, endpoint=False)
    for clip in CLIPS:
        for i, shape in enumerate(clip.shapes):
            for other in clip.shapes[:i]:
                if shape.behavior == other.behavior == "collides":
                    continue
                both = shape.is_visible(times) & other.is_visible(times)
                gap = shape.at(times) - other.at(times)
                distance = np.hypot(*gap[:, :2].T) - (shape.at(times) + other.at(times))[:, 2]
                assert (distance[both] > -0.01).all()


def test_shapes_stay_in_the_picture():
    for clip in CLIPS:
        for shape in clip.shapes:
            places = clip.positions(shape, np.linspace(*shape.interval, 30, endpoint=False))
            assert (places[:, :2] > places[:, 2:] * 0.7).all()
            assert (places[:, :2] < 1 - places[:, 2:] * 0.7).all()


def test_everything_that_can_happen_happens():
    shapes = [shape for clip in CLIPS for shape in clip.shapes]
    assert {shape.behavior for shape in shapes} == set(BEHAVIORS)
    assert {shape.color for shape in shapes} == set(COLORS)
    assert {shape.shape for shape in shapes} == set(SHAPES)
    assert {scene.texture for clip in CLIPS for scene in clip.scenes} == set(TEXTURES)
    assert {len(clip.scenes) for clip in CLIPS} == {1, 2, 3}
    assert any(any(clip.pan) for clip in CLIPS)
    assert any(len(clip.specks) for clip in CLIPS)


def test_held_out_combinations_are_not_in_training_clips_but_in_test_clips():
    assert not any((s.color, s.shape) in HELD_OUT for clip in CLIPS for s in clip.shapes)
    tests = [random_clip(np.random.default_rng((6, seed)), held_out=True) for seed in range(100)]
    assert {(s.color, s.shape) for clip in tests for s in clip.shapes} >= HELD_OUT
    assert all(len({shape.name for shape in clip.shapes}) == len(clip.shapes) for clip in CLIPS + tests)


def test_backgrounds_are_still_and_change_at_cuts_only():
    clip = next(clip for clip in CLIPS if len(clip.scenes) == 3)
    bare = Clip(clip.scenes, [])
    changed = (np.diff(bare.render(TIMES, 112).astype(int), axis=0) != 0).any((1, 2, 3))
    assert changed.sum() == 2
    assert (changed == (np.diff(clip.scene_at(TIMES)) != 0)).all()


def test_the_camera_moves_everything_alike():
    clip = Clip([Scene("dots", (0, 1), 3)], [], pan=(0.125, 0.0))
    first, last = clip.render(np.array([0.0, 1.0]), 112)
    np.testing.assert_array_equal(first[:, :-14], last[:, 14:])


@pytest.mark.parametrize("shape", SHAPES)
def test_a_picture_of_any_size_shows_the_same_shape(shape):
    still = Shape("red", shape, "stays", 0, (0.0, 1.0), np.array([[0.0, 0.5, 0.5, 0.2], [1.0, 0.5, 0.5, 0.2]]))
    clip = Clip([Scene("plain", (0, 1), 0)], [still])
    small, large = (clip.masks(TIMES[:1], side)[0, 0] for side in (112, 336))
    difference = np.abs(small - large.reshape(112, 3, 112, 3).mean((1, 3)))
    assert difference.max() < 0.3  # at corners
    assert difference.sum() < 0.02 * small.sum()
