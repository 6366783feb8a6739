"""UniComp against a plain loop over groups, tokens and pairs, and what it must do with videos one sees through."""

import math

import pytest
import torch

from holitom_hf.merging import MergingSettings, merge_video_tokens

from .drawn import draw_video


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def plain_unicomp(features, keys, ratio):
    """(frame, position) of every output -> its embedding, and the groups."""
    num_frames, num_tokens, _ = features.shape
    video = features.double()
    keys = None if keys is None else keys.double()
    total = max(1, round(num_frames * num_tokens * ratio))
    groups = []
    for f in range(num_frames):
        alike = groups and 1 - cosine(video[f].mean(0), video[groups[-1][0]].mean(0)) <= 0.005
        if alike and len(groups[-1]) < int(1 / ratio):
            groups[-1].append(f)
        else:
            groups.append([f])
    means = [sum(video[f] for f in group) / len(group) for group in groups]
    global_ = [mean.mean(0) for mean in means]
    alike = [sum(cosine(a, b) for b in global_) / len(groups) for a in global_]
    weights = [math.exp((sum(alike) / len(alike) - value) * math.sqrt(len(groups))) for value in alike]

    lines, near_of = [], []
    for mean, group in zip(means, groups):
        compared = mean if keys is None else keys[group[0]]
        table = [[cosine(compared[a], compared[b]) for b in range(num_tokens)] for a in range(num_tokens)]
        near = [[b for b in range(num_tokens) if 1 - table[a][b] < 0.2] for a in range(num_tokens)]
        order = sorted(range(num_tokens), key=lambda a: sum(table[a]))
        unique, covered = [], set()
        for a in order:
            if a not in covered:
                unique.append(a)
                covered |= set(near[a])
        lines.append((unique, [a for a in order if a not in unique]))
        near_of.append(near)

    most = min(num_tokens, max(1, total // len(groups) * 2))
    counts = [0] * len(groups)
    for _ in range(total):
        free = [g for g in range(len(groups)) if counts[g] < most]
        first = [g for g in free if counts[g] < len(lines[g][0])]
        counts[max(first or free, key=lambda g: weights[g] / (2 * counts[g] + 1))] += 1
    outputs = {}
    for mean, group, (unique, others), near, count in zip(means, groups, lines, near_of, counts):
        for a in [*unique, *others][:count]:
            value = mean[a]
            if a in unique:
                value = (value + sum(mean[b] for b in near[a]) / len(near[a])) / 2
            outputs[group[0], a] = value.tolist()
    return outputs, [(group[0], group[-1] + 1) for group in groups]


def merge(features, ratio, keys=None, **fields):
    settings = MergingSettings(outer_method="unicomp", retention_ratio=ratio, **fields)
    return merge_video_tokens(features, features.new_zeros(features.shape[:2]), settings, keys=keys)


@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("has_keys", [False, True])
@pytest.mark.parametrize("size", [(1, 9), (10, 16), (21, 8)])
def test_outputs_are_those_of_the_plain_loop(ratio, has_keys, size):
    features, _ = draw_video(*size, num_scenes=3, seed=7)
    keys = features[..., :6] + 0.5 if has_keys else None
    features[3:6] = features[3:4] + 0.01 * features[3:6]  # frames to fuse
    merged = merge(features, ratio, keys)
    expected, groups = plain_unicomp(features, keys, ratio)
    assert merged.segments == groups
    assert list(zip(merged.frame.tolist(), merged.position.tolist())) == sorted(expected)
    rows = torch.tensor([expected[key] for key in sorted(expected)])
    torch.testing.assert_close(merged.embeddings, rows.float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.3, 0.999])
def test_it_keeps_as_many_as_asked_for(ratio):
    for num_frames, noise in ((1, 1.0), (12, 0.0), (12, 0.05), (12, 1.0)):
        random = torch.Generator().manual_seed(0)
        features = torch.randn(1, 10, 16, generator=random) + noise * torch.randn(num_frames, 10, 16, generator=random)
        merged = merge(features, ratio, proportional_attention=True)
        assert merged.num_tokens == max(1, round(num_frames * 10 * ratio))
        assert len(merged.place.unique()) == merged.num_tokens
        assert float(merged.sizes.sum()) == num_frames * 10


def test_of_a_still_video_the_picture_is_kept_a_few_times():
    picture = torch.randn(1, 10, 64, generator=torch.Generator().manual_seed(1))
    merged = merge(picture.expand(12, -1, -1).contiguous(), 0.25)
    assert merged.segments == [(0, 4), (4, 8), (8, 12)]
    torch.testing.assert_close(merged.embeddings, picture.expand(3, -1, -1).flatten(0, 1))


def test_one_token_stands_for_all_that_are_alike():
    features = torch.ones(1, 8, 4)
    features[0, 2] = torch.tensor([-1.0, 2.0, -3.0, 4.0])
    merged = merge(features, 0.25)
    assert merged.num_tokens == 2
    assert 2 in merged.position.tolist()
    others = [t for t in range(8) if t != 2]
    assert len(set(merged.assignment[0, others].tolist())) == 1
