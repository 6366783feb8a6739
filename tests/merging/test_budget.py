"""`exact_budget`: as many tokens as the sizes say, one after another; HoliTom's are in test_outer.py, too."""

from dataclasses import fields, replace

import pytest
import torch

from holitom_hf.benchmarking.measuring import count_operations
from holitom_hf.merging import METHODS, MergingSettings, TokenKind, merge_video_tokens
from holitom_hf.merging.budget import newline_budget, token_budget

from ..reference import plain_budget
from .test_linear_map import draw


LOOKING = [name for name, method in METHODS.items() if method.needs_importance]
RATIOS = [0.001, 0.0099, 0.1, 0.25, 0.6, 0.97]


def still(num_frames: int, grid: tuple[int, int], seed: int = 0):
    """As `draw`, of a picture that does not change: nearly all is merged, and what is left is far below the budget."""
    features, importance, keys, newline = draw(grid, seed=seed)
    some = slice(num_frames)
    return features[:1].repeat(num_frames, 1, 1), importance[some], keys[some], newline


def stills():
    """Four pictures of two frames each: at 0.99 % none of their tokens is left, and two dropped ones come back."""
    _, importance, keys, newline = draw((5, 5), seed=3)
    pictures = torch.randn(4, 25, newline.shape[0], generator=torch.Generator().manual_seed(3))
    return pictures.repeat_interleave(2, 0), importance[:8], keys[:8], newline, (5, 5)


def spread(num_frames: int, tokens_per_frame: int) -> torch.Tensor:
    """What methods without importance go by, written once more."""
    return torch.tensor([-(i * 2654435769 % 2**32) for i in range(num_frames * tokens_per_frame)]).view(num_frames, -1)


def outputs_of(merged) -> list[tuple]:
    members = [set() for _ in range(merged.num_tokens)]
    for frame, outputs in enumerate(merged.assignment.tolist()):
        for position, output in enumerate(outputs):
            if output >= 0:
                members[output].add((frame, position))
    return [
        (embedding, frame, position, of, kind == TokenKind.STATIC)
        for embedding, frame, position, of, kind in zip(
            merged.embeddings, merged.frame.tolist(), merged.position.tolist(), members, merged.kind.tolist()
        )
    ]


VIDEOS = {
    "scenes": lambda: (*draw((6, 6), seed=1), (6, 6)),
    "no square": lambda: (*draw((3, 8), seed=2), (3, 8)),
    "still": lambda: (*still(9, (5, 5)), (5, 5)),
    "stills": stills,
    "one frame": lambda: (*still(1, (6, 6)), (6, 6)),
    "two frames of one token": lambda: (*still(2, (1, 1)), (1, 1)),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("video", VIDEOS)
def test_every_method_fills_it_as_one_token_after_another_does(method, ratio, video):
    features, importance, keys, _, grid = VIDEOS[video]()
    free = MergingSettings(outer_method=method, retention_ratio=ratio, similarity_threshold=0.5, contextual_ratio=0.3)
    settings = replace(free, exact_budget=True)
    budget = token_budget(settings, *importance.shape)
    assert budget == max(1, round(ratio * importance.numel()))
    merged = merge_video_tokens(features, importance, settings, keys=keys, grid=grid)
    assert merged.num_tokens == budget
    if method not in LOOKING:
        importance = spread(*importance.shape)
    before = merge_video_tokens(features, importance, free, keys=keys, grid=grid)
    expected = plain_budget(outputs_of(before), features, importance, ratio)
    found = outputs_of(merged)
    assert [(token[1:]) for token in found] == [(token[1:]) for token in expected]
    assert torch.equal(merged.embeddings, torch.stack([token[0] for token in expected]))


@pytest.mark.parametrize("method", METHODS)
def test_what_has_the_right_number_stays_as_it_is(method):
    """Noise of 8 frames of 10 x 10 tokens, of which every method leaves a quarter exactly."""
    random = torch.Generator().manual_seed(0)
    features, keys = (torch.randn(8, 100, dim, generator=random) for dim in (16, 6))
    importance = torch.rand(8, 100, generator=random)
    free = MergingSettings(outer_method=method, retention_ratio=0.25, proportional_attention=True)
    before, after = (
        merge_video_tokens(features, importance, settings, keys=keys)
        for settings in (free, replace(free, exact_budget=True))
    )
    assert before.num_tokens == 200
    for field in fields(before):
        old, new = getattr(before, field.name), getattr(after, field.name)
        pairs = zip(old, new) if field.name == "contributions" and old is not None else [(old, new)]
        for one, other in pairs:
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ratio", [0.03, 0.25, 0.97])
def test_sizes_are_of_all_tokens(method, ratio):
    for features, importance, keys, _, grid in (make() for make in VIDEOS.values()):
        settings = MergingSettings(
            outer_method=method, retention_ratio=ratio, exact_budget=True, proportional_attention=True
        )
        sizes = merge_video_tokens(features, importance, settings, keys=keys, grid=grid).sizes
        assert sizes.sum() == importance.numel()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_with_rows_the_number_of_newlines_is_fixed_as_well(method, ratio):
    settings = MergingSettings(
        outer_method=method, retention_ratio=ratio, exact_budget=True, newline_position="row", similarity_threshold=0.5
    )
    for features, importance, keys, newline, grid in (make() for make in VIDEOS.values()):
        merged = merge_video_tokens(features, importance, settings, newline, keys, grid)
        num_frames, (height, width) = len(features), grid
        budget = token_budget(settings, *importance.shape)
        assert merged.num_tokens == budget + newline_budget(budget, num_frames, height)
        rows, order = {}, []
        for frame, position, kind in zip(merged.frame.tolist(), merged.position.tolist(), merged.kind.tolist()):
            is_newline = kind == TokenKind.NEWLINE
            rows.setdefault((frame, position // width), []).append(is_newline)
            order.append((frame, position, is_newline))
        assert order == sorted(order)
        assert all(row.count(True) == 1 and row[-1] for row in rows.values())
        empty = [row for row, tokens in rows.items() if len(tokens) == 1]
        left_out = [(f, r) for f in range(num_frames) for r in range(height) if (f, r) not in rows]
        assert not empty or not left_out or max(empty) < min(left_out)
        alone = merge_video_tokens(features, importance, replace(settings, newline_position="end"), None, keys, grid)
        assert sorted(merged.place[merged.kind != TokenKind.NEWLINE].tolist()) == sorted(alone.place.tolist())


def test_of_equally_important_ones_the_earlier_stay_and_come_back():
    features, importance, _, _ = draw((4, 4))
    settings = MergingSettings(retention_ratio=0.1, similarity_threshold=0.5, exact_budget=True)
    alike = torch.full_like(importance, 0.5)
    free = merge_video_tokens(features, alike, replace(settings, exact_budget=False))
    merged = merge_video_tokens(features, alike, settings)
    assert free.num_tokens > merged.num_tokens
    assert torch.equal(merged.place, free.place[: merged.num_tokens])

    features, importance, *_ = stills()
    settings = replace(settings, retention_ratio=0.0099)
    assert merge_video_tokens(features, importance, replace(settings, exact_budget=False)).num_tokens == 0
    assert merge_video_tokens(features, torch.full_like(importance, 0.5), settings).place.tolist() == [0, 1]
    best = importance.flatten().topk(2).indices.sort().values
    assert torch.equal(merge_video_tokens(features, importance, settings).place, best)


def test_where_nothing_is_shortened_the_budget_is_all_there_is():
    features, importance, _, newline = draw((4, 4))
    for settings in (MergingSettings(retention_ratio=1.0), MergingSettings(outer_method="none")):
        settings = replace(settings, exact_budget=True)
        assert token_budget(settings, 10, 16) == 160
        assert torch.equal(merge_video_tokens(features, importance, settings).embeddings, features.flatten(0, 1))
        rows = merge_video_tokens(features, importance, replace(settings, newline_position="row"), newline)
        assert rows.num_tokens == 160 + newline_budget(160, 10, 4) == 200


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.5, 0.9])
def test_methods_without_importance_lose_and_gain_evenly(share):
    """Of any number of places the ones that are taken leave gaps of at most three lengths, none twice the mean."""
    order = spread(1, 3136)[0].argsort(descending=True, stable=True)
    taken = order[: round(share * 3136)].sort().values
    gaps = taken.diff()
    assert len(gaps.unique()) <= 3
    assert gaps.max() < 2 * 3136 / len(taken)


@pytest.mark.parametrize("ratio", [0.02, 0.1, 0.9])
@pytest.mark.parametrize("newline_position", ["end", "row"])
def test_gradients_pass_and_the_device_is_asked_for_nothing(ratio, newline_position):
    features, importance, _, newline = draw((6, 6), seed=3)
    settings = MergingSettings(retention_ratio=ratio, similarity_threshold=0.5, newline_position=newline_position)
    features.requires_grad_()
    importance.requires_grad_()

    def waits(exact: bool) -> int:
        used = replace(settings, exact_budget=exact)
        return count_operations(lambda: merge_video_tokens(features.detach(), importance, used, newline)).waits

    # Without a budget, which rows hold a token is asked.
    assert waits(True) == 0
    assert waits(False) == (newline_position == "row")
    merged = merge_video_tokens(features, importance, replace(settings, exact_budget=True), newline)
    merged.embeddings[merged.kind != TokenKind.NEWLINE].sum().backward()
    assert features.grad.abs().sum() > 0
