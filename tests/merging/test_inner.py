import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from holitom_hf.merging.hidden_states import merge_hidden_states

from ..reference import plain_inner_merge


GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "inner.npz")
CASES = json.loads(str(GOLDEN["meta"]))


@pytest.mark.parametrize("case", range(len(CASES)))
def test_the_hidden_states_are_those_of_the_published_code(case):
    meta = CASES[case]
    hidden, importance, expected, keep = (
        torch.from_numpy(GOLDEN[f"c{case}_{name}"]) for name in ("hidden", "attention", "merged", "keep")
    )
    merged, kept = merge_hidden_states(hidden, importance, meta["start"], meta["length"], meta["merge_ratio"])
    torch.testing.assert_close(merged, expected, atol=1e-5, rtol=0)
    assert torch.equal(kept, keep)


@settings(deadline=None)
@given(
    st.integers(0, 5),
    st.integers(0, 40),
    st.integers(0, 5),
    st.sampled_from([0.0, 0.1, 0.5, 0.75, 0.97, 0.999]),
    st.booleans(),
    st.integers(0, 10),
)
def test_folding_is_that_of_the_plain_loop(before, length, after, ratio, fold, seed):
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(1, before + length + after, 8, generator=random)
    importance = torch.randint(0, 4, hidden.shape[1:2], generator=random).float()  # with ties
    merged, keep = merge_hidden_states(hidden, importance, before, length, ratio, fold)
    expected, expected_keep, _ = plain_inner_merge(
        hidden[0], importance, list(range(before, before + length)), ratio, fold
    )
    assert keep.tolist() == expected_keep
    torch.testing.assert_close(merged[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize(("length", "ratio"), [(1, 0.5), (1, 0.99), (3, 0.9), (40, 0.999)])
def test_one_visual_token_stays_at_least(length, ratio, fold):
    random = torch.Generator().manual_seed(0)
    hidden, importance = torch.randn(1, 4 + length, 8, generator=random), torch.rand(4 + length, generator=random)
    merged, keep = merge_hidden_states(hidden, importance, 2, length, ratio, fold)
    best = 2 + int(importance[2 : 2 + length].argmax())
    assert keep.tolist() == [0, 1, best, 2 + length, 3 + length]
    if length == 1 or not fold:
        assert torch.equal(merged[0], hidden[0, keep])


def test_a_video_without_tokens_stays_without():
    hidden = torch.randn(1, 4, 8)
    merged, keep = merge_hidden_states(hidden, torch.rand(4), 2, 0, 0.5)
    assert torch.equal(merged, hidden)
    assert keep.tolist() == [0, 1, 2, 3]


def test_many_tokens_may_fold_into_one():
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 300, 4, generator=random)
    importance = torch.rand(300, generator=random)
    merged, keep = merge_hidden_states(hidden, importance, 0, 300, 0.997)
    expected, _, _ = plain_inner_merge(hidden[0], importance, list(range(300)), 0.997, fold=True)
    assert len(keep) == 1
    torch.testing.assert_close(merged[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_dtype_and_the_choice(dtype):
    random = torch.Generator().manual_seed(1)
    hidden, importance = torch.randn(1, 40, 16, generator=random).to(dtype), torch.rand(40, generator=random)
    merged, keep = merge_hidden_states(hidden, importance, 4, 30, 0.5)
    expected, expected_keep, _ = plain_inner_merge(hidden[0].float(), importance, list(range(4, 34)), 0.5, fold=True)
    assert merged.dtype == dtype
    assert keep.tolist() == expected_keep
    torch.testing.assert_close(merged[0].float(), expected, atol=0.02, rtol=0.02)


def test_bad_arguments_are_named():
    hidden = torch.randn(1, 10, 4)
    with pytest.raises(ValueError, match=r"expected hidden \(1, N, D\) and importance \(N,\)"):
        merge_hidden_states(hidden.expand(2, -1, -1), torch.rand(10), 0, 5, 0.5)
    with pytest.raises(ValueError, match=r"visual positions 8\.\.13 don't lie within the 10"):
        merge_hidden_states(hidden, torch.rand(10), 8, 5, 0.5)
