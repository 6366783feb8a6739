"""DivPrune against its algorithm step by step, and what a choice by distance must do."""

import pytest
import torch

from holitom_hf.merging import MergingSettings, merge_video_tokens
from holitom_hf.merging.methods import divprune

from .drawn import draw_video


def plain_divprune(features: torch.Tensor, num_kept: int) -> list[int]:
    tokens = features.flatten(0, 1).double()
    num = len(tokens)

    def distance(i, j):
        return 1 - float(tokens[i] @ tokens[j] / (tokens[i].norm() * tokens[j].norm()))

    table = [[distance(i, j) for j in range(num)] for i in range(num)]
    kept = [max(range(num), key=lambda i: min((table[i][j] for j in range(num) if j != i), default=0.0))]
    while len(kept) < num_kept:
        left = [i for i in range(num) if i not in kept]
        kept.append(max(left, key=lambda i: min(table[i][k] for k in kept)))
    return sorted(kept)


def merge(features, ratio):
    settings = MergingSettings(outer_method="divprune", retention_ratio=ratio)
    return merge_video_tokens(features, features.new_zeros(features.shape[:2]), settings)


@pytest.mark.parametrize("ratio", [0.02, 0.2, 0.6])
@pytest.mark.parametrize("block", [1, 10**6])
def test_the_tokens_are_those_of_the_plain_loop(ratio, block, monkeypatch):
    monkeypatch.setattr(divprune, "BLOCK_BYTES", block)
    for seed, size in enumerate([(1, 5), (3, 9), (5, 10)]):
        features, _ = draw_video(*size, seed=seed)
        merged = merge(features, ratio)
        assert merged.place.tolist() == plain_divprune(features, merged.num_tokens)
        assert merged.num_tokens == max(1, round(size[0] * size[1] * ratio))


def test_of_frames_that_are_alike_every_picture_is_kept_once():
    picture = torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(0))
    merged = merge(picture.expand(5, -1, -1).contiguous(), 0.2)
    assert sorted(merged.position.tolist()) == list(range(12))


def test_no_token_is_kept_twice_where_all_are_alike():
    merged = merge(torch.ones(4, 6, 8), 0.5)
    assert len(merged.place.unique()) == merged.num_tokens == 12
