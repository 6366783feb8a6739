import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from holitom_hf import HoliTomConfig
from holitom_hf.merging import TokenKind, merge_video_tokens

from ..reference import plain_clusters, plain_merge


GOLDEN = Path(__file__).parents[1] / "golden"
OUTER, VISIONZIP = np.load(GOLDEN / "outer.npz"), np.load(GOLDEN / "visionzip.npz")
OUTER_CASES, VISIONZIP_CASES = json.loads(str(OUTER["meta"])), json.loads(str(VISIONZIP["meta"]))
NEWLINE = {"one_token": "end", "grid": "row"}


def make_features(num_frames, num_tokens, dim, seed, still=0.6, scene=4, dtype=torch.float32):
    """Features of which a share stays nearly the same within scenes of a few frames, and their importance."""
    random = torch.Generator().manual_seed(seed)
    features = torch.randn(num_frames, num_tokens, dim, generator=random)
    for start in range(0, num_frames, scene):
        frames = slice(start, start + scene)
        is_still = torch.rand(num_tokens, generator=random) < still
        features[frames, is_still] = features[start, is_still] + 0.1 * features[frames, is_still]
    return features.to(dtype), torch.rand(num_frames, num_tokens, generator=random)


@pytest.mark.parametrize("case", range(len(OUTER_CASES)))
def test_the_tokens_are_those_of_the_published_code(case):
    meta = OUTER_CASES[case]
    features, importance, newline, expected = (
        torch.from_numpy(OUTER[f"c{case}_{name}"]) for name in ("features", "attention", "newline", "merged")
    )
    config = HoliTomConfig(
        retention_ratio=meta["retain_ratio"],
        similarity_threshold=meta["tau"],
        cluster_neighbors=meta["K"],
        cluster_center_weight=meta["Beta"],
        contextual_ratio=meta["D"],
        max_segment_frames=meta["maxw"],
        newline_position=NEWLINE[meta["position"]],
    )
    merged = merge_video_tokens(features, importance, config, newline)
    assert [[a, b - 1] for a, b in merged.segments] == meta["segments"]
    assert merged.effective_ratio == meta["effective_ratio"]
    torch.testing.assert_close(merged.embeddings, expected, atol=1e-5, rtol=0)
    in_segment = [int(((merged.frame >= a) & (merged.frame < b)).sum()) for a, b in merged.segments]
    assert in_segment == meta["tokens_per_segment"]


@pytest.mark.parametrize("case", range(len(VISIONZIP_CASES)))
def test_visionzip_is_that_of_the_published_code(case):
    meta = VISIONZIP_CASES[case]
    features, importance, keys, newline, expected = (
        torch.from_numpy(VISIONZIP[f"c{case}_{name}"])
        for name in ("features", "attention", "keys", "newline", "merged")
    )
    config = HoliTomConfig(
        outer_method="visionzip",
        retention_ratio=meta["tokens_per_frame_kept"] / meta["tokens_per_frame"],
        newline_position=NEWLINE[meta["position"]],
    )
    merged = merge_video_tokens(features, importance, config, newline, keys)
    torch.testing.assert_close(merged.embeddings, expected, atol=1e-5, rtol=0)
    assert (merged.assignment >= 0).all()


SIZES = st.tuples(st.integers(1, 9), st.sampled_from([1, 4, 9, 15, 25]), st.sampled_from([1, 8]))
CONFIGS = st.builds(
    HoliTomConfig,
    retention_ratio=st.sampled_from([0.01, 0.1, 0.15, 0.3, 0.5, 0.9, 0.99]),
    similarity_threshold=st.sampled_from([-1.0, 0.3, 0.65, 0.8, 1.0]),
    max_segment_frames=st.sampled_from([None, 1, 2, 3]),
    cluster_neighbors=st.sampled_from([1, 3, 7]),
    cluster_center_weight=st.sampled_from([0.0, 0.6, 1.0]),
    contextual_ratio=st.sampled_from([0.0, 0.25, 1.0]),
)


@settings(deadline=None)
@given(SIZES, CONFIGS, st.booleans(), st.integers(0, 10), st.sampled_from([0.0, 0.6, 1.0]))
def test_the_tokens_are_those_of_the_plain_loop(size, config, exact, seed, still):
    config = replace(config, exact_budget=exact)
    features, importance = make_features(*size, seed, still)
    merged = merge_video_tokens(features, importance, config)
    embeddings, places, _ = plain_merge(features, importance, config)
    assert list(zip(merged.frame.tolist(), merged.position.tolist())) == places
    torch.testing.assert_close(merged.embeddings, embeddings, atol=1e-4, rtol=1e-4)


@settings(deadline=None)
@given(CONFIGS, st.booleans(), st.integers(0, 10), st.sampled_from([1, 9, 16]))
def test_newlines_stand_after_every_row_that_kept_a_token(config, exact, seed, num_tokens):
    config = replace(config, newline_position="row", exact_budget=exact)
    features, importance = make_features(5, num_tokens, 8, seed)
    newline = torch.full((8,), 7.0)
    merged = merge_video_tokens(features, importance, config, newline)
    embeddings, places, _ = plain_merge(features, importance, config, newline)
    assert list(zip(merged.frame.tolist(), merged.position.tolist())) == places
    torch.testing.assert_close(merged.embeddings, embeddings, atol=1e-4, rtol=1e-4)
    assert torch.equal((merged.embeddings == 7).all(1), merged.kind == TokenKind.NEWLINE)


@settings(deadline=None)
@given(SIZES, CONFIGS, st.integers(0, 10))
def test_counts_follow_the_formulas(size, config, seed):
    num_frames, num_tokens, _ = size
    features, importance = make_features(*size, seed)
    merged = merge_video_tokens(features, importance, config)
    similarity = torch.nn.functional.cosine_similarity(features[:-1], features[1:], dim=-1)
    gain = num_static = num_kept = 0
    static_of = []
    for a, b in merged.segments:
        static = int((similarity[a : b - 1] > config.similarity_threshold).all(0).sum()) if b - a > 1 else 0
        static_of.append(static)
        gain += static * (b - a - 1)
    total = num_frames * num_tokens
    assert merged.effective_ratio == min(config.retention_ratio / ((total - gain) / total), 1)
    for static, (a, b) in zip(static_of, merged.segments):
        num_static += round(static * merged.effective_ratio)
        num_kept += (b - a) * math.ceil((num_tokens - static) * merged.effective_ratio)
    assert int((merged.kind == TokenKind.STATIC).sum()) == num_static
    assert int((merged.kind == TokenKind.DYNAMIC).sum()) == num_kept
    assert merged.num_tokens == num_static + num_kept == len(merged.embeddings)


@settings(deadline=None)
@given(SIZES, CONFIGS, st.integers(0, 10))
def test_the_assignment_accounts_for_every_input_token(size, config, seed):
    num_frames, num_tokens, _ = size
    features, importance = make_features(*size, seed)
    merged = merge_video_tokens(features, importance, config)
    assert merged.assignment.shape == (num_frames, num_tokens)
    assert set(merged.assignment.unique().tolist()) - {-1} == set(range(merged.num_tokens))
    # Each output stands where one of its inputs stood, and every token of its kind is made of its inputs alone.
    for token in range(merged.num_tokens):
        frame, position = int(merged.frame[token]), int(merged.position[token])
        assert merged.assignment[frame, position] == token
        members = (merged.assignment == token).nonzero()
        if merged.kind[token] == TokenKind.STATIC:
            start, stop = next((a, b) for a, b in merged.segments if a == frame)
            assert set(members[:, 0].tolist()) == set(range(start, stop))
            means = torch.stack([features[start:stop, t].mean(0) for t in members[:, 1].unique()])
            others = [i for i, t in enumerate(members[:, 1].unique().tolist()) if t != position]
            center = features[start:stop, position].mean(0)
        else:
            assert set(members[:, 0].tolist()) == {frame}
            means = features[frame, members[:, 1]]
            others = [i for i, t in enumerate(members[:, 1].tolist()) if t != position]
            center = features[frame, position]
        weight = config.cluster_center_weight
        expected = weight * center + (1 - weight) * means[others].mean(0) if others else center
        torch.testing.assert_close(merged.embeddings[token], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("newline_position", ["end", "row"])
def test_half_precision_decides_as_float32_does_on_the_same_values(dtype, newline_position):
    config = HoliTomConfig(retention_ratio=0.2, newline_position=newline_position, contextual_ratio=0.2)
    features, importance = make_features(12, 49, 64, seed=1, dtype=dtype)
    half = merge_video_tokens(features, importance, config, features[0, 0])
    full = merge_video_tokens(features.float(), importance, config, features[0, 0].float())
    assert half.embeddings.dtype == dtype
    assert half.segments == full.segments
    assert half.num_tokens == full.num_tokens
    assert torch.equal(half.kind, full.kind)
    torch.testing.assert_close(half.embeddings.float(), full.embeddings, atol=0.05, rtol=0.05)


def test_frames_that_are_all_equal_become_one_segment_of_static_tokens():
    features = torch.randn(1, 49, 32, generator=torch.Generator().manual_seed(0)).expand(8, -1, -1)
    merged = merge_video_tokens(features.contiguous(), torch.rand(8, 49), HoliTomConfig(retention_ratio=0.1))
    assert merged.segments == [(0, 8)]
    assert set(merged.kind.tolist()) == {TokenKind.STATIC}
    assert merged.num_tokens == round(49 * min(0.1 * 8, 1))


def test_tokens_that_are_all_equal_are_merged_without_an_error():
    merged = merge_video_tokens(torch.ones(4, 16, 8), torch.ones(4, 16), HoliTomConfig(retention_ratio=0.1))
    torch.testing.assert_close(merged.embeddings, torch.ones(merged.num_tokens, 8))


def test_frames_that_are_all_different_stay_single_and_are_selected_from():
    features, importance = make_features(6, 49, 64, seed=2, still=0.0)
    merged = merge_video_tokens(features, importance, HoliTomConfig(retention_ratio=0.1))
    assert merged.segments == [(f, f + 1) for f in range(6)]
    for f in range(6):
        expected = importance[f].topk(math.ceil(4.9)).indices.sort().values
        assert torch.equal(merged.position[merged.frame == f], expected)


@pytest.mark.parametrize("config", [HoliTomConfig(retention_ratio=1.0), HoliTomConfig(outer_method="none")])
def test_keeping_everything_is_the_identity(config):
    features, importance = make_features(3, 16, 8, seed=3)
    merged = merge_video_tokens(features, importance, config)
    assert torch.equal(merged.embeddings, features.flatten(0, 1))
    assert torch.equal(merged.assignment.flatten(), torch.arange(48))


def test_clustering_a_set_gives_the_same_beside_other_sets():
    """Sets of different size in one call against the plain loop over each."""
    from holitom_hf.merging.spatial import cluster_tokens

    random = torch.Generator().manual_seed(4)
    sizes, clusters = [3, 17, 9, 1], [2, 5, 9, 1]
    tokens = torch.randn(4, 17, 12, generator=random)
    merged, centers, cluster = cluster_tokens(tokens, sizes, clusters, 7, 0.6)
    for s, (n, m) in enumerate(zip(sizes, clusters)):
        expected, expected_centers, expected_cluster = plain_clusters(tokens[s, :n], m, 7, 0.6)
        torch.testing.assert_close(merged[s, :m], expected, atol=1e-5, rtol=1e-5)
        assert centers[s, :m].tolist() == expected_centers
        assert cluster[s, :n].tolist() == expected_cluster


def test_the_result_is_the_same_every_time():
    features, importance = make_features(16, 49, 32, seed=5)
    config = HoliTomConfig(retention_ratio=0.2, contextual_ratio=0.3)
    first = merge_video_tokens(features, importance, config)
    again = merge_video_tokens(features.clone(), importance.clone(), config)
    assert torch.equal(first.embeddings, again.embeddings)
    assert torch.equal(first.assignment, again.assignment)


def test_gradients_reach_every_kept_token():
    features, importance = make_features(6, 16, 8, seed=6)
    features.requires_grad_()
    merged = merge_video_tokens(features, importance, HoliTomConfig(retention_ratio=0.4))
    merged.embeddings.sum().backward()
    has_gradient = features.grad.abs().sum(-1) > 0
    assert torch.equal(has_gradient, merged.assignment >= 0)


def test_bad_arguments_are_named():
    features, importance = make_features(3, 15, 8, seed=7)
    config = HoliTomConfig()
    with pytest.raises(ValueError, match=r"features must have shape \(frames, tokens, dim\)"):
        merge_video_tokens(features[0], importance, config)
    with pytest.raises(ValueError, match=r"features must have shape .* got \(0, 15, 8\)"):
        merge_video_tokens(features[:0], importance[:0], config)
    with pytest.raises(ValueError, match=r"importance must have shape \(3, 15\)"):
        merge_video_tokens(features, importance[:2], config)
    with pytest.raises(ValueError, match="needs the newline embedding"):
        merge_video_tokens(features, importance, HoliTomConfig(newline_position="row"))
    with pytest.raises(ValueError, match="needs a square grid, got 15 tokens a frame"):
        merge_video_tokens(features, importance, HoliTomConfig(newline_position="row"), newline=features[0, 0])
    with pytest.raises(ValueError, match="needs the keys"):
        merge_video_tokens(features, importance, HoliTomConfig(outer_method="visionzip"))
