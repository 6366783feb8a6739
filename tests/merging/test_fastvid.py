"""FastVID against a plain loop over segments, frames and tokens, and what it must do with videos one sees through."""

import math
from itertools import pairwise

import pytest
import torch

from holitom_hf.merging import MergingSettings, merge_video_tokens
from holitom_hf.merging.host_numbers import in_lockstep
from holitom_hf.merging.transitions import transition_segments

from .drawn import draw_video


def plain_transitions(features: torch.Tensor) -> list[tuple[int, int]]:
    means = [frame.mean(0) for frame in features]
    alike = [float(a @ b / (a.norm() * b.norm())) for a, b in pairwise(means)]
    cuts = {f for f, value in enumerate(alike) if value < 0.9}
    cuts |= set(sorted(range(len(alike)), key=alike.__getitem__)[:7])
    starts = [0, *(f + 1 for f in sorted(cuts))]
    return list(zip(starts, [*starts[1:], len(features)]))


def largest_remaining(weights, capacity, total):
    """Webster's method, one at a time."""
    given = [0] * len(weights)
    for _ in range(total):
        free = [i for i in range(len(weights)) if given[i] < capacity[i]]
        given[max(free, key=lambda i: weights[i] / (2 * given[i] + 1))] += 1
    return given


def plain_fastvid(features: torch.Tensor, importance: torch.Tensor, num_kept: int) -> dict[tuple[int, int], list]:
    """(frame, position) of every output -> its embedding."""
    num_frames, num_tokens, dim = features.shape
    video = features.double()
    segments = plain_transitions(features)
    n = num_kept // num_frames
    num_salient = (n - int(0.4 * n)) * num_frames
    outputs, others = {}, []
    for f in range(num_frames):
        most = sorted(range(num_tokens), key=lambda t: -float(importance[f, t]))[: num_salient // num_frames]
        outputs |= {(f, t): video[f, t].tolist() for t in most}
        others.append([t for t in range(num_tokens) if t not in most])

    anchors = [[f for f in range(start, stop) if (stop - 1 - f) % 4 == 0] for start, stop in segments]
    flat = [f for group in anchors for f in group]
    weights = [(stop - start) / len(group) for (start, stop), group in zip(segments, anchors) for _ in group]
    counts = largest_remaining(weights, [len(others[f]) for f in flat], num_kept - num_salient)
    count_of = dict(zip(flat, counts))

    def distance(a, b):
        return float((a - b).norm()) / math.sqrt(dim)

    for (start, stop), group in zip(segments, anchors):
        for f in group:
            own = {t: video[f, t] for t in others[f]}
            near = {t: sorted(distance(own[t], own[u]) for u in own)[:4] for t in own}
            density = {t: math.exp(-sum(d * d for d in near[t]) / len(near[t])) for t in own}
            widest = max(distance(own[t], own[u]) for t in own for u in own)
            delta = {
                t: min((distance(own[t], own[u]) for u in own if density[u] > density[t]), default=widest) for t in own
            }
            peaks = sorted(own, key=lambda t: (-delta[t] * density[t], t))[: count_of[f]]
            joined = {t: [] for t in peaks}
            for g in range(start, stop):
                for t in others[g] if peaks else []:
                    token = video[g, t]
                    if g == f and t in peaks:
                        best = t
                    else:
                        best = max(peaks, key=lambda p: float(token @ own[p] / (token.norm() * own[p].norm())))
                    joined[best].append(token)
            for t in peaks:
                weight = max(1 / (len(joined[t]) + 1), 0.6)
                mean = torch.stack(joined[t]).mean(0)
                outputs[f, t] = (weight * own[t] + (1 - weight) * mean).tolist()
    return outputs


def merge(features, importance, ratio, **fields):
    return merge_video_tokens(
        features, importance, MergingSettings(outer_method="fastvid", retention_ratio=ratio, **fields)
    )


@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.25, 0.4])
@pytest.mark.parametrize("size", [(1, 9), (12, 20), (30, 12)])
def test_outputs_are_those_of_the_plain_loop(ratio, size):
    features, importance = draw_video(*size, seed=3)
    merged = merge(features, importance, ratio)
    expected = plain_fastvid(features, importance, max(1, round(size[0] * size[1] * ratio)))
    assert list(zip(merged.frame.tolist(), merged.position.tolist())) == sorted(expected)
    assert merged.segments == plain_transitions(features)
    rows = torch.tensor([expected[key] for key in sorted(expected)])
    torch.testing.assert_close(merged.embeddings, rows.float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("ratio", [0.01, 0.03, 0.5, 0.7, 0.95, 0.999])
@pytest.mark.parametrize("size", [(1, 9), (9, 25), (40, 10)])
def test_it_keeps_as_many_as_asked_for(ratio, size):
    features, importance = draw_video(*size, num_scenes=1, seed=4)
    merged = merge(features, importance, ratio, proportional_attention=True)
    assert merged.num_tokens == max(1, round(size[0] * size[1] * ratio))
    assert len(merged.place.unique()) == merged.num_tokens
    assert float(merged.sizes.sum()) == size[0] * size[1]


def test_of_a_still_video_every_frame_keeps_its_most_important_tokens():
    picture = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(0))
    features, importance = picture.expand(24, -1, -1).contiguous(), torch.rand(1, 16).expand(24, -1).contiguous()
    merged = merge(features, importance, 0.25)
    most = set(importance[0].argsort(descending=True)[:3].tolist())  # 4 tokens a frame, of which one is a peak
    for frame in range(24):
        assert most <= set(merged.position[merged.frame == frame].tolist())
    assert len(merged.segments) == 8


def test_a_cut_is_where_the_picture_changes():
    random = torch.Generator().manual_seed(0)
    scenes = torch.randn(3, 6, 16, generator=random)
    features = scenes[[0, 0, 0, 1, 1, 2, 2, 2]] + 0.01 * torch.randn(8, 6, 16, generator=random)

    def cut(features, min_segments):
        return in_lockstep([transition_segments(features, 0.9, min_segments)])[0]

    assert cut(features, 1) == [(0, 3), (3, 5), (5, 8)]
    assert cut(features, 8) == [(f, f + 1) for f in range(8)]
    assert cut(features[:1], 8) == [(0, 1)]
