"""DyMU's merging before the decoder against a plain loop over frames and tokens."""

import pytest
import torch

from holitom_hf.merging import MergingSettings, VideoTokens, merge_video_tokens
from holitom_hf.merging.tensors import merge_tokens


def draw(num_frames=6, tokens=25, seed=0):
    random = torch.Generator().manual_seed(seed)
    features, keys = (torch.randn(num_frames, tokens, dim, generator=random) for dim in (16, 8))
    return features + torch.linspace(0, 3, num_frames)[:, None, None], keys


def plain_dymu(keys, ratio, groups=None):
    """For every frame its outputs, each a list of tokens behind the one in whose place it stands."""
    num_frames, tokens_per_frame = keys.shape[:2]
    frames = []
    for frame in range(num_frames):
        of_frame = {}
        for token in range(tokens_per_frame):
            of_frame.setdefault(token if groups is None else int(groups[frame, token]), []).append(token)
        frames.append(of_frame)
    budget = max(1, round(num_frames * tokens_per_frame * ratio))
    quota = None
    while True:
        excess = sum(map(len, frames)) - budget
        quota = -(-excess // 8) if quota is None else quota
        pairs = []
        for number, outputs in enumerate(frames):
            places = sorted(outputs)
            mean = {place: keys[number, members].mean(0) for place, members in outputs.items()}
            for source in places[::2]:
                alike = [(float(torch.cosine_similarity(mean[source], mean[b], dim=0)), b) for b in places[1::2]]
                if alike:
                    pairs.append((*max(alike), number, source))
        if excess <= 0 or not pairs:
            return frames
        for _, target, number, source in sorted(pairs, reverse=True)[: min(excess, quota)]:
            frames[number][target] += frames[number].pop(source)


@pytest.mark.parametrize("ratio", [0.7, 0.3, 0.1, 0.01])
@pytest.mark.parametrize("shape", [(6, 25), (3, 16), (1, 9), (4, 1)])
@pytest.mark.parametrize("with_groups", [False, True])
def test_it_is_the_plain_loop(ratio, shape, with_groups):
    features, keys = draw(*shape)
    groups = None
    if with_groups:
        groups = torch.arange(shape[1]).repeat(shape[0], 1)
        groups[0, : shape[1] // 2] = 0
    video = VideoTokens(features, torch.rand(shape), keys, groups=groups)
    merged = merge_tokens(video, MergingSettings(outer_method="dymu_tokens", retention_ratio=ratio))
    expected = plain_dymu(keys, ratio, groups)
    found = list(zip(merged.frame.tolist(), merged.position.tolist()))
    assert found == [(f, place) for f, outputs in enumerate(expected) for place in sorted(outputs)]
    for embedding, (f, place) in zip(merged.embeddings, found, strict=True):
        torch.testing.assert_close(embedding, features[f, expected[f][place]].mean(0))
    for number, (f, place) in enumerate(found):
        assert (merged.assignment[f] == number).nonzero()[:, 0].tolist() == sorted(expected[f][place])


def test_exact_budgets_but_for_one_token_a_frame_and_every_token_in_one_output():
    features, keys = draw(8, 100)
    for ratio in (0.5, 0.25, 0.1, 0.05):
        settings = MergingSettings(outer_method="dymu_tokens", retention_ratio=ratio)
        merged = merge_video_tokens(features, torch.rand(8, 100), settings, keys=keys)
        assert merged.num_tokens == 800 * ratio
        assert (merged.assignment >= 0).all()
    settings = MergingSettings(outer_method="dymu_tokens", retention_ratio=0.001)
    assert merge_video_tokens(features, torch.rand(8, 100), settings, keys=keys).num_tokens == 8


def test_a_simple_frame_leaves_more_room_for_the_others():
    features, keys = draw(2, 100)
    keys[0] = keys[0, 0] + 0.1 * keys[0]
    settings = MergingSettings(outer_method="dymu_tokens", retention_ratio=0.5)
    merged = merge_video_tokens(features, torch.rand(2, 100), settings, keys=keys)
    assert (merged.frame == 0).sum() < (merged.frame == 1).sum()


def test_groups_that_leave_fewer_than_the_budget_are_all():
    features, keys = draw(2, 9)
    groups = torch.zeros(2, 9, dtype=torch.long)
    video = VideoTokens(features, torch.rand(2, 9), keys, groups=groups)
    merged = merge_tokens(video, MergingSettings(outer_method="dymu_tokens", retention_ratio=0.5))
    torch.testing.assert_close(merged.embeddings, features.mean(1))
