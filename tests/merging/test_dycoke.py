"""DyCoke's merging over time against a plain loop over windows, and what it must keep of videos one sees through."""

import pytest
import torch

from holitom_hf.merging import MergingSettings, merge_video_tokens

from .drawn import draw_video


def merge(features, ratio):
    settings = MergingSettings(outer_method="dycoke", retention_ratio=ratio)
    return merge_video_tokens(features, features.new_zeros(features.shape[:2]), settings)


def plain_windows_of_four(features: torch.Tensor, num_left: int) -> list[int]:
    """As the paper has it: frame 0 whole; 1 and 2 without what is like 0, 3 without what is like 2."""
    num_frames, num_tokens, _ = features.shape
    kept = []
    for start in range(0, num_frames, 4):
        kept += [start * num_tokens + t for t in range(num_tokens)]
        for frame, other in ((1, 0), (2, 0), (3, 2)):
            a, b = features[start + frame].double(), features[start + other].double()
            similarity = [float(a[t] @ b[t] / (a[t].norm() * b[t].norm())) for t in range(num_tokens)]
            least = sorted(range(num_tokens), key=similarity.__getitem__)[:num_left]
            kept += [(start + frame) * num_tokens + t for t in sorted(least)]
    return kept


@pytest.mark.parametrize(("num_left", "size"), [(0, (4, 9)), (3, (8, 10)), (7, (12, 10)), (9, (16, 10))])
def test_in_whole_windows_it_is_the_papers(num_left, size):
    num_tokens = size[1]
    features, _ = draw_video(*size, seed=num_left)
    merged = merge(features, (num_tokens + 3 * num_left) / (4 * num_tokens))
    assert merged.place.tolist() == plain_windows_of_four(features, num_left)
    assert torch.equal(merged.embeddings, features.flatten(0, 1)[merged.place])


@pytest.mark.parametrize("size", [(1, 9), (5, 16), (7, 9), (18, 12), (32, 9)])
@pytest.mark.parametrize("ratio", [0.02, 0.05, 0.15, 0.25, 0.5, 0.9])
def test_it_keeps_as_many_as_asked_for(size, ratio):
    merged = merge(draw_video(*size, seed=1)[0], ratio)
    assert merged.num_tokens == max(1, round(size[0] * size[1] * ratio))


def test_with_fewer_tokens_windows_are_longer():
    features, _ = draw_video(16, 20, seed=2)
    merged = merge(features, 0.2)  # 64 tokens: the first frames of two windows of eight, and 24 more
    counts = merged.frame.bincount(minlength=16)
    assert counts[[0, 8]].tolist() == [20, 20]
    assert counts.sum() - 40 == 24
    assert counts[[*range(1, 8), *range(9, 16)]].max() == 2


def test_what_moves_is_kept_and_what_stands_still_goes():
    features = torch.randn(1, 12, 8, generator=torch.Generator().manual_seed(0)).repeat(4, 1, 1)
    features[1:, 5] = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    merged = merge(features, 15 / 48)
    assert merged.position[merged.frame > 0].tolist() == [5, 5, 5]
