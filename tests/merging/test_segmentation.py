import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from holitom_hf.merging import segment_frames
from holitom_hf.merging.segmentation import (
    choose_segments,
    count_static_tokens,
    frame_similarity,
    similarity_runs,
)

from ..reference import best_gain, plain_segments


GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "outer.npz")
CASES = json.loads(str(GOLDEN["meta"]))


@st.composite
def similarities(draw, max_frames=8, max_tokens=6):
    """(F-1, T) values on a coarse grid, so that gains tie and values meet the threshold."""
    num_frames, num_tokens = draw(st.integers(1, max_frames)), draw(st.integers(1, max_tokens))
    size = (num_frames - 1) * num_tokens
    values = draw(st.lists(st.sampled_from([0.2, 0.5, 0.8, 0.9]), min_size=size, max_size=size))
    return torch.tensor(values).view(num_frames - 1, num_tokens)


def gain_of(segments, similarity, threshold) -> int:
    return sum(int((similarity[a : b - 1] > threshold).all(0).sum()) * (b - a - 1) for a, b in segments if b - a > 1)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_segments_and_similarity_are_those_of_the_published_code(case):
    meta = CASES[case]
    similarity = torch.from_numpy(GOLDEN[f"c{case}_similarity"])
    segments = segment_frames(similarity, meta["tau"], meta["maxw"])
    assert [[a, b - 1] for a, b in segments] == meta["segments"]
    features = torch.from_numpy(GOLDEN[f"c{case}_features"])
    torch.testing.assert_close(frame_similarity(features), similarity, atol=1e-5, rtol=0)


@given(similarities(), st.sampled_from([0.3, 0.5, 0.8]), st.sampled_from([None, 1, 2, 3]))
def test_no_partition_gains_more(similarity, threshold, longest):
    segments = segment_frames(similarity, threshold, longest)
    assert gain_of(segments, similarity, threshold) == best_gain(similarity, threshold, longest)


@given(similarities(max_frames=14), st.sampled_from([0.3, 0.5, 0.8]), st.sampled_from([None, 1, 2, 5]))
def test_ties_go_as_in_the_plain_dynamic_programme(similarity, threshold, longest):
    runs = similarity_runs(similarity, threshold)
    assert choose_segments(count_static_tokens(runs), longest) == plain_segments(similarity, threshold, longest)


@given(similarities(max_frames=14), st.sampled_from([None, 1, 2, 5]))
def test_ranges_cover_all_frames_in_order_and_none_is_too_long(similarity, longest):
    segments = segment_frames(similarity, 0.5, longest)
    assert [frame for a, b in segments for frame in range(a, b)] == list(range(len(similarity) + 1))
    assert longest is None or max(b - a for a, b in segments) <= longest


@given(similarities())
def test_counts_of_static_tokens_are_those_of_every_range(similarity):
    counts = count_static_tokens(similarity_runs(similarity, 0.5))
    for stop in range(2, len(similarity) + 2):
        for length in range(2, stop + 1):
            expected = (similarity[stop - length : stop - 1] > 0.5).all(0).sum()
            assert counts[stop - 2, length - 1] == expected


def test_a_similarity_equal_to_the_threshold_does_not_count_as_alike():
    assert segment_frames(torch.full((3, 5), 0.75), 0.75) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert segment_frames(torch.full((3, 5), 0.7500001), 0.75) == [(0, 4)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_similarity_is_computed_in_float32_whatever_the_dtype(dtype):
    features = torch.randn(130, 3, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = torch.nn.functional.cosine_similarity(features[:-1].double(), features[1:].double(), dim=-1)
    similarity = frame_similarity(features)
    assert similarity.dtype == torch.float32
    torch.testing.assert_close(similarity, expected.float(), atol=1e-6, rtol=0)


def test_a_zero_vector_is_like_nothing():
    assert not frame_similarity(torch.zeros(2, 3, 4)).any()


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"similarity must have shape \(frames - 1, tokens\), got \(3,\)"):
        segment_frames(torch.zeros(3), 0.5)
    with pytest.raises(ValueError, match="max_segment_frames must be at least 1 or None, got 0"):
        segment_frames(torch.zeros(3, 2), 0.5, 0)
