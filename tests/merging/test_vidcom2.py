"""VidCom2 against its formula, token by token, and what it must do with videos that one sees through."""

import math

import pytest
import torch

from holitom_hf.merging import MergingSettings, merge_video_tokens

from .drawn import draw_video


def plain_vidcom2(features: torch.Tensor, ratio: float) -> list[int]:
    """Kept tokens among the F*T, in Python's floats."""
    num_frames, num_tokens, dim = features.shape
    video = features.double().tolist()

    def variance(channel):
        values = [token[channel] for frame in video for token in frame]
        mean = sum(values) / len(values)
        return sum((value - mean) ** 2 for value in values) / len(values)

    channels = sorted(range(dim), key=variance)[: dim // 2]

    def unit(token):
        values = [token[c] for c in channels]
        length = math.sqrt(sum(value**2 for value in values))
        return [value / length for value in values]

    tokens = [[unit(token) for token in frame] for frame in video]

    def mean_of(some):
        return [sum(values) / len(some) for values in zip(*some)]

    def likeness(token, center):
        squared = sum((a - b) ** 2 for a, b in zip(token, center))
        return sum(math.exp(-squared / (2 * 2.0**k)) for k in range(-3, 2))

    of_video = mean_of([token for frame in tokens for token in frame])
    like_video = [[likeness(token, of_video) for token in frame] for frame in tokens]
    worth = [-sum(row) / num_tokens for row in like_video]
    weights = [math.exp((value - max(worth)) / 0.01) for value in worth]
    shares = [weight / sum(weights) for weight in weights]
    scales = [round((1 + share - 1 / num_frames) * 2**16) for share in shares]

    total = max(1, round(num_frames * num_tokens * ratio))
    counts = [1 if total >= num_frames else 0] * num_frames
    while sum(counts) < total:
        free = [f for f in range(num_frames) if counts[f] < num_tokens]
        counts[max(free, key=lambda f: scales[f] / (2 * counts[f] + 1))] += 1

    kept = []
    for f, frame in enumerate(tokens):
        of_frame = mean_of(frame)
        score = [like_video[f][t] + likeness(frame[t], of_frame) for t in range(num_tokens)]
        kept += [f * num_tokens + t for t in sorted(sorted(range(num_tokens), key=score.__getitem__)[: counts[f]])]
    return kept


def merge(features, ratio):
    settings = MergingSettings(outer_method="vidcom2", retention_ratio=ratio)
    return merge_video_tokens(features, features.new_zeros(features.shape[:2]), settings)


@pytest.mark.parametrize("ratio", [0.02, 0.1, 0.25, 0.6, 0.95])
def test_the_tokens_are_those_of_the_plain_loop(ratio):
    for seed, size in enumerate([(1, 9), (4, 25), (9, 12)]):
        features, _ = draw_video(*size, seed=seed)
        merged = merge(features, ratio)
        assert merged.place.tolist() == plain_vidcom2(features, ratio)
        assert torch.equal(merged.embeddings, features.flatten(0, 1)[merged.place])
        assert merged.num_tokens == max(1, round(size[0] * size[1] * ratio))


def test_the_frame_that_differs_has_more_tokens_and_the_token_that_differs_is_kept():
    features = torch.ones(8, 16, 12) + 0.01 * torch.randn(8, 16, 12, generator=torch.Generator().manual_seed(0))
    features[5] = torch.randn(16, 12, generator=torch.Generator().manual_seed(1))
    features[2, 7] = -1
    merged = merge(features, 0.25)
    counts = merged.frame.bincount(minlength=8)
    assert counts.argmax() == 5
    assert counts.min() >= 1
    assert int(merged.assignment[2, 7]) >= 0


def test_an_order_of_the_tokens_of_a_frame_is_no_matter():
    features, _ = draw_video(6, 20, seed=4)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    kept, again = merge(features, 0.2), merge(features[:, order], 0.2)
    moved = again.frame * 20 + order[again.position]
    assert sorted(moved.tolist()) == kept.place.tolist()
