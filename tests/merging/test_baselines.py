"""The baselines of the evaluation: each against a plain description of what it keeps."""

import pytest
import torch

from holitom_hf import HoliTomConfig
from holitom_hf.merging import METHODS, TokenKind, merge_video_tokens
from holitom_hf.merging.methods.average_pooling import pooled_size

from ..conftest import make_prompt, make_video


BASELINES = ("frame_subsampling", "random_tokens", "average_pooling")


def merge(method, ratio, num_frames=16, tokens=49, dim=8, **kwargs):
    features = torch.randn(num_frames, tokens, dim, generator=torch.Generator().manual_seed(0))
    config = HoliTomConfig(outer_method=method, retention_ratio=ratio, **kwargs)
    newline = torch.full((dim,), 7.0)
    return features, merge_video_tokens(features, features.new_zeros(num_frames, tokens), config, newline=newline)


@pytest.mark.parametrize("method", BASELINES)
@pytest.mark.parametrize("ratio", [0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.5, 0.9])
def test_as_many_tokens_as_asked_for_within_one_step_of_the_method(method, ratio):
    _, merged = merge(method, ratio)
    step = {"frame_subsampling": 49, "random_tokens": 1, "average_pooling": 16 * 8}[method]
    assert abs(merged.num_tokens - ratio * 16 * 49) <= step
    assert merged.num_tokens == len(merged.embeddings) == len(merged.frame) == len(merged.position)
    assert merged.assignment.max() == merged.num_tokens - 1
    assert set(merged.assignment.unique().tolist()) - {-1} == set(range(merged.num_tokens))


def test_frames_are_those_in_the_middle_of_equal_parts():
    features, merged = merge("frame_subsampling", 0.25)
    assert merged.frame.unique().tolist() == [2, 6, 10, 14]
    torch.testing.assert_close(merged.embeddings, features[[2, 6, 10, 14]].flatten(0, 1), rtol=0, atol=0)
    assert (merged.assignment[2] == torch.arange(49)).all()
    assert (merged.assignment[3] == -1).all()


def test_random_tokens_are_spread_over_the_video_and_the_same_in_every_call():
    features, merged = merge("random_tokens", 0.5, num_frames=64)
    _, again = merge("random_tokens", 0.5, num_frames=64)
    assert (merged.position == again.position).all()
    per_frame = merged.frame.bincount(minlength=64)
    assert per_frame.min() > 10
    assert per_frame.max() < 40
    torch.testing.assert_close(merged.embeddings, features[merged.frame, merged.position], rtol=0, atol=0)
    order = merged.frame * 49 + merged.position
    assert (order.diff() > 0).all()


@pytest.mark.parametrize(("ratio", "size"), [(0.25, (3, 4)), (0.1, (2, 2)), (0.02, (1, 1)), (1.0, (7, 7))])
def test_pooling_takes_the_grid_nearest_to_the_ratio(ratio, size):
    assert pooled_size((7, 7), ratio) == size


def test_pooling_averages_areas_of_the_grid():
    features, merged = merge("average_pooling", 0.25)
    for frame in (0, 9):
        grid = features[frame].view(7, 7, 8)
        own = merged.embeddings[merged.frame == frame]
        for row, (top, bottom) in enumerate(((0, 3), (2, 5), (4, 7))):
            for column, (left, right) in enumerate(((0, 2), (1, 4), (3, 6), (5, 7))):
                area = grid[top:bottom, left:right].reshape(-1, 8).mean(0)
                torch.testing.assert_close(own[row * 4 + column], area)
    covered = merged.assignment[0].view(7, 7)
    for cell, position in enumerate(merged.position[:12].tolist()):
        assert covered[position // 7, position % 7] <= cell


@pytest.mark.parametrize("method", [*BASELINES, "fixed_windows"])
def test_newlines_end_the_rows_that_kept_a_token(method):
    _, merged = merge(method, 0.2, newline_position="row")
    newline = (merged.kind == TokenKind.NEWLINE).nonzero()[:, 0]
    assert (merged.embeddings[newline] == 7).all()
    rows = {(f, p // 7) for f, p in zip(merged.frame.tolist(), merged.position.tolist())}
    assert len(newline) == len(rows)


def test_pooling_needs_a_square_grid():
    with pytest.raises(ValueError, match="needs a square grid, got 48"):
        merge("average_pooling", 0.5, tokens=48)


@pytest.mark.parametrize("window", [None, 1, 5, 16, 40])
def test_fixed_windows_cut_where_the_clock_says(window):
    _, merged = merge("fixed_windows", 0.5, max_segment_frames=window)
    size = window or 4
    assert merged.segments == [(start, min(start + size, 16)) for start in range(0, 16, size)]


def test_fixed_windows_are_holitom_where_both_cut_alike():
    still = torch.randn(1, 49, 8, generator=torch.Generator().manual_seed(1)).expand(8, -1, -1)
    importance = torch.rand(8, 49, generator=torch.Generator().manual_seed(2))
    global_, fixed = (
        merge_video_tokens(still, importance, HoliTomConfig(outer_method=method, max_segment_frames=8))
        for method in ("holitom", "fixed_windows")
    )
    assert global_.segments == fixed.segments == [(0, 8)]
    torch.testing.assert_close(global_.embeddings, fixed.embeddings, rtol=0, atol=0)
    assert global_.effective_ratio == fixed.effective_ratio


def test_the_model_takes_every_method(model):
    inputs = {
        "input_ids": make_prompt(3, "video:8", 4)[None],
        "pixel_values_videos": make_video(8, seed=3)[None],
        "logits_to_keep": 1,
    }
    full = model(**inputs, holitom_config={"outer_method": "none", "inner_method": "none"}).logits
    for method in METHODS:
        settings = HoliTomConfig(outer_method=method, retention_ratio=0.3, inner_merge_layer=2)
        outputs = model(**inputs, holitom_config=settings)
        merged = outputs.merged_videos[0][0]
        assert merged.num_tokens < 0.6 * merged.num_input_tokens
        assert len(outputs.inner_keep[0]) < merged.num_tokens + 8
        assert not torch.equal(outputs.logits, full)
