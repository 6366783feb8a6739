"""A merge is a linear map: a video's weights give the merge again, for any feature map of its tokens."""

import math

import pytest
import torch

from holitom_hf.merging import METHODS, MergingSettings, TokenKind, VideoTokens, merge_video_tokens
from holitom_hf.merging.merged_video import TokenGroup, in_order
from holitom_hf.merging.tensors import merge_tokens


FRAMES, DIM = 10, 24


def draw(grid=(7, 7), dtype=torch.float32, seed=0):
    """Features of a few still scenes with noise, importance, keys and a newline."""
    random = torch.Generator().manual_seed(seed)
    tokens = grid[0] * grid[1]
    scenes = torch.randn(3, tokens, DIM, generator=random)
    noise = torch.randn(FRAMES, tokens, DIM, generator=random) * torch.rand(tokens, 1, generator=random)
    features = (scenes[torch.arange(FRAMES) * 3 // FRAMES] + 0.7 * noise).to(dtype)
    importance = torch.rand(FRAMES, tokens, generator=random)
    return features, importance, torch.randn(FRAMES, tokens, 6, generator=random), torch.randn(DIM).to(dtype)


CASES = [
    {"retention_ratio": 0.2, "similarity_threshold": 0.5},
    {"retention_ratio": 0.4, "similarity_threshold": 0.3, "contextual_ratio": 0.5},
    {"retention_ratio": 0.7, "similarity_threshold": 0.6, "cluster_center_weight": 0.0},
    {"retention_ratio": 0.1, "similarity_threshold": -1.0, "cluster_center_weight": 1.0},
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("newline_position", ["end", "row"])
@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("exact", [False, True])
def test_applied_to_what_was_merged_it_gives_the_embeddings(method, newline_position, case, exact):
    features, importance, keys, newline = draw(seed=case)
    fields = CASES[case] | {"newline_position": newline_position, "exact_budget": exact}
    settings = MergingSettings(outer_method=method, **fields)
    merged = merge_video_tokens(features, importance, settings, newline, keys)
    assert 0 < merged.num_tokens < merged.num_input_tokens
    torch.testing.assert_close(merged.apply(features, newline), merged.embeddings, atol=2e-5, rtol=1e-5)


def test_of_a_merge_that_leaves_nothing_nothing_is_left():
    """Two frames of one still picture: the fewest tokens are below one half."""
    features = torch.randn(1, 8, DIM).expand(2, -1, -1)
    merged = merge_video_tokens(features, torch.rand(2, 8), MergingSettings(retention_ratio=0.02))
    assert merged.num_tokens == 0
    assert merged.apply(features).shape == (0, DIM)
    assert torch.equal(merged.weight, torch.zeros(2, 8))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("grid", [(4, 9), (8, 3)])
def test_it_holds_for_grids_that_are_not_square(method, grid):
    features, importance, keys, newline = draw(grid, seed=5)
    settings = MergingSettings(
        outer_method=method, retention_ratio=0.3, similarity_threshold=0.5, newline_position="row"
    )
    merged = merge_video_tokens(features, importance, settings, newline, keys, grid)
    torch.testing.assert_close(merged.apply(features, newline), merged.embeddings, atol=2e-5, rtol=1e-5)
    is_newline = merged.kind == TokenKind.NEWLINE
    assert ((merged.position[is_newline] + 1) % grid[1] == 0).all()
    rows = set(zip(merged.frame.tolist(), (merged.position // grid[1]).tolist()))
    assert int(is_newline.sum()) == (FRAMES * grid[0] if method == "visionzip" else len(rows))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("case", [0, 2])
def test_applied_to_one_hot_maps_it_shows_the_weights(method, case, exact):
    features, importance, keys, _ = draw(seed=2)
    settings = MergingSettings(outer_method=method, exact_budget=exact, **CASES[case])
    merged = merge_video_tokens(features, importance, settings, keys=keys)
    total = merged.num_input_tokens
    matrix = merged.apply(torch.eye(total).view(FRAMES, -1, total))  # (N, F*T)
    torch.testing.assert_close(matrix @ features.flatten(0, 1), merged.embeddings, atol=2e-5, rtol=1e-5)
    named = merged.assignment.flatten()
    kept = named >= 0
    weight = merged.weight.flatten()
    assert (weight[~kept] == 0).all()
    torch.testing.assert_close(matrix[named[kept], kept.nonzero()[:, 0]], weight[kept])
    if method not in ("average_pooling", "fastvid", "unicomp"):  # in which a token goes into several
        # What stands for itself again also stays in what it was merged into.
        assert ((matrix != 0).sum(0) <= (2 if exact else 1)).all()
    if method != "visionzip":  # which adds what a token absorbs
        torch.testing.assert_close(matrix.sum(1), torch.ones(merged.num_tokens))


def test_weights_are_those_of_the_paper():
    """Two frames alike but for noise: one segment, whose clusters' weights can be written down."""
    features, importance, _, _ = draw(seed=3)
    features = features[:1].expand(2, -1, -1).contiguous()
    settings = MergingSettings(retention_ratio=0.15, similarity_threshold=0.9)
    merged = merge_video_tokens(features, importance[:2], settings)
    assert merged.segments == [(0, 2)]
    for output in range(merged.num_tokens):
        members = (merged.assignment[0] == output).nonzero()[:, 0].tolist()
        others = [place for place in members if place != int(merged.position[output])]
        expected = {int(merged.position[output]): 0.6 if others else 1.0}
        expected |= {place: 0.4 / len(others) for place in others}
        for place in members:
            assert merged.weight[:, place].tolist() == pytest.approx([expected[place] / 2] * 2)


def test_gradients_reach_what_it_is_applied_to_and_its_dtype_is_kept():
    features, importance, _, _ = draw(seed=4)
    merged = merge_video_tokens(features, importance, MergingSettings(**CASES[1]))
    other = torch.randn(FRAMES, 49, 5, requires_grad=True)
    merged.apply(other).sum().backward()
    torch.testing.assert_close(other.grad, merged.weight[..., None].expand_as(other))
    assert merged.apply(other.detach().bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"must have shape \(10, 49, dim\)"):
        merged.apply(other[:3])


@pytest.mark.parametrize("method", METHODS)
def test_gradients_reach_the_features_that_are_merged(method):
    features, importance, keys, _ = draw(seed=8)
    features.requires_grad_()
    merged = merge_video_tokens(features, importance, MergingSettings(outer_method=method, **CASES[1]), keys=keys)
    merged.embeddings.sum().backward()
    matrix = merged.apply(torch.eye(merged.num_input_tokens).view(FRAMES, -1, merged.num_input_tokens))
    expected = matrix.sum(0).view(FRAMES, -1)
    torch.testing.assert_close(features.grad, expected[..., None].expand_as(features), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("exact", [False, True])
def test_another_order_is_the_same_merge(method, exact):
    features, importance, keys, _ = draw(seed=6)
    settings = MergingSettings(outer_method=method, exact_budget=exact, **CASES[0])
    merged = merge_video_tokens(features, importance, settings, keys=keys)
    order = torch.randperm(merged.num_tokens, generator=torch.Generator().manual_seed(0))
    shuffled = merged.in_order_of(order)
    assert torch.equal(shuffled.embeddings, merged.embeddings[order])
    assert torch.equal(shuffled.place, merged.place[order])
    torch.testing.assert_close(shuffled.apply(features), merged.apply(features)[order])
    for frame, place in ((0, 0), (3, 17), (9, 48)):
        before, after = int(merged.assignment[frame, place]), int(shuffled.assignment[frame, place])
        assert after == (-1 if before < 0 else int((order == before).nonzero()))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("case", [1, 2])
def test_tokens_stand_at_places_of_their_own(case, exact):
    """What lets a token take the placeholder and the position of the place it stands for."""
    features, importance, keys, _ = draw(seed=7)
    for method in METHODS:
        settings = MergingSettings(outer_method=method, exact_budget=exact, **CASES[case])
        merged = merge_video_tokens(features, importance, settings, keys=keys)
        assert len(merged.place.unique()) == merged.num_tokens
        named = merged.assignment.flatten()[merged.place]
        if method not in ("holitom", "fixed_windows"):
            continue
        assert torch.equal(named, torch.arange(merged.num_tokens)), "an output holds what lies at its own place"


def test_a_grid_must_have_a_frames_tokens():
    features, importance, _, _ = draw()
    with pytest.raises(ValueError, match="a grid of 5 x 10 does not have the 49 tokens"):
        merge_video_tokens(features, importance, MergingSettings(), grid=(5, 10))


def test_a_method_of_ones_own_is_one_function_and_one_entry(monkeypatch):
    """The registry is all that knows a method: settings, merging and the linear map follow."""
    from holitom_hf.merging import registry

    def merge_pairs(video: VideoTokens, config):
        """Means of neighbouring tokens."""
        num_frames, tokens = video.num_frames, video.tokens_per_frame
        pairs = video.features[:, ::2] / 2 + video.features[:, 1::2] / 2
        frame = torch.arange(num_frames).repeat_interleave(tokens // 2)
        position = (torch.arange(tokens // 2) * 2).repeat(num_frames)
        group = TokenGroup(pairs.flatten(0, 1), frame, position, TokenKind.DYNAMIC, frame)
        assigned = (torch.arange(num_frames * tokens) // 2).view(num_frames, tokens)
        return in_order(video, [group], assigned, [(0, num_frames)], 0.5, shares=(0.5, 0.5))

    monkeypatch.setitem(registry.METHODS, "pairs", registry.Method(merge_pairs, "pairs of neighbours"))
    features, _, _, _ = draw((4, 4))
    merged = merge_tokens(VideoTokens(features), MergingSettings(outer_method="pairs"))
    assert merged.num_tokens == FRAMES * 8
    torch.testing.assert_close(merged.apply(features), merged.embeddings)
    assert math.isclose(float(merged.weight.sum()), merged.num_tokens, rel_tol=1e-5)
