"""FlashVID against a plain loop over segments, frames and trees, and what it must do with videos one sees through."""

import math

import pytest
import torch

from holitom_hf.merging import MergingSettings, merge_video_tokens

from .drawn import draw_video
from .test_fastvid import largest_remaining, plain_transitions


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def plain_selection(frame: torch.Tensor, weight: list[float], num: int) -> list[int]:
    places = range(len(frame))

    def distance(i, j):
        return (1 - cosine(frame[i], frame[j])) * weight[j]

    selected = [max(places, key=lambda j: min((distance(i, j) for i in places if i != j), default=math.inf))]
    while len(selected) < num:
        left = [j for j in places if j not in selected]
        selected.append(max(left, key=lambda j: min(distance(i, j) for i in selected)))
    return selected[:num]


def plain_flashvid(features, importance, num_kept) -> dict[tuple[int, int], list]:
    """(frame, position) of every output -> its embedding."""
    num_frames, num_tokens, dim = features.shape
    video = features.double()
    num_selected = math.ceil(num_kept * 0.7)
    num_clusters = num_kept - num_selected
    share = [(f + 1) * num_selected // num_frames - f * num_selected // num_frames for f in range(num_frames)]
    segments = plain_transitions(features)
    outputs, roots = {}, {}
    shares = [0.0] * num_frames
    for start, stop in segments:
        mean = video[start:stop].flatten(0, 1).mean(0)
        selected = {}
        for f in range(start, stop):
            weight = [float(importance[f, t]) * float(video[f, t] @ mean) for t in range(num_tokens)]
            selected[f] = plain_selection(video[f], weight, share[f]) if share[f] else []
            outputs |= {(f, t): video[f, t].tolist() for t in selected[f]}
        others = {f: [t for t in range(num_tokens) if t not in selected[f]] for f in range(start, stop)}

        candidates = []  # (similarity, frame, place, place before)
        for f in range(start + 1, stop):
            for t in others[f]:
                if others[f - 1]:
                    best = max(others[f - 1], key=lambda u: cosine(video[f, t], video[f - 1, u]))
                    candidates.append((cosine(video[f, t], video[f - 1, best]), f, t, best))
        room = sum(map(len, others.values())) - math.ceil(num_clusters * (stop - start) / num_frames)
        candidates = [each for each in sorted(candidates, key=lambda each: -each[0]) if each[0] > 0.8]
        joins = {(f, t): (f - 1, best) for _, f, t, best in candidates[: max(0, room)]}
        for f in range(start, stop):
            for t in others[f]:
                root = (f, t)
                while root in joins:
                    root = joins[root]
                roots.setdefault(root, []).append(video[f, t])
        in_segment = [root for root in roots if start <= root[0] < stop]
        for f in range(start, stop):
            own = [root for root in in_segment if root[0] == f]
            shares[f] = len(own) * (stop - start) / max(len(in_segment), 1)

    trees = [
        {t: torch.stack(tokens).mean(0) for (f, t), tokens in sorted(roots.items()) if f == g}
        for g in range(num_frames)
    ]
    counts = largest_remaining(shares, [len(each) for each in trees], num_clusters)
    for f, (own, count) in enumerate(zip(trees, counts)):
        if not count:
            continue
        table = {(a, b): float((own[a] - own[b]).norm()) / math.sqrt(dim) for a in own for b in own}
        k = min(count, 7)
        density = {a: math.exp(-sum(sorted(table[a, b] ** 2 for b in own)[:k]) / k) for a in own}
        widest = max(table.values())
        delta = {a: min((table[a, b] for b in own if density[b] > density[a]), default=widest) for a in own}
        centers = sorted(own, key=lambda a: (-delta[a] * density[a], a))[:count]
        members = {c: [own[c]] for c in centers}
        for a in own:
            if a not in centers:
                members[min(sorted(centers), key=lambda c: table[a, c])].append(own[a])
        outputs |= {(f, c): torch.stack(some).mean(0).tolist() for c, some in members.items()}
    return outputs


def merge(features, importance, ratio, **fields):
    return merge_video_tokens(
        features, importance, MergingSettings(outer_method="flashvid", retention_ratio=ratio, **fields)
    )


@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.25, 0.6, 0.9])
@pytest.mark.parametrize("size", [(1, 9), (12, 20), (26, 12)])
def test_outputs_are_those_of_the_plain_loop(ratio, size):
    features, importance = draw_video(*size, num_scenes=3, seed=5)
    merged = merge(features, importance, ratio)
    expected = plain_flashvid(features, importance, max(1, round(size[0] * size[1] * ratio)))
    assert list(zip(merged.frame.tolist(), merged.position.tolist())) == sorted(expected)
    rows = torch.tensor([expected[key] for key in sorted(expected)])
    torch.testing.assert_close(merged.embeddings, rows.float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("ratio", [0.01, 0.03, 0.5, 0.95, 0.999])
@pytest.mark.parametrize("size", [(1, 9), (9, 25), (40, 10)])
def test_it_keeps_as_many_as_asked_for(ratio, size):
    features, importance = draw_video(*size, num_scenes=1, seed=4)
    merged = merge(features, importance, ratio, proportional_attention=True)
    assert merged.num_tokens == max(1, round(size[0] * size[1] * ratio))
    assert len(merged.place.unique()) == merged.num_tokens
    assert float(merged.sizes.sum()) == size[0] * size[1]


def test_what_moves_from_place_to_place_is_one_tree():
    """One thing goes through the places of a frame while nothing else changes but at random."""
    random = torch.Generator().manual_seed(0)
    features = torch.randn(16, 12, 32, generator=random)
    thing = torch.randn(32, generator=random)
    for frame in range(16):
        features[frame, frame % 12] = thing
    importance = torch.full((16, 12), 0.5)
    importance[torch.arange(16), torch.arange(16) % 12] = 1e-6  # so that it is not selected
    merged = merge(features, importance, 0.5)
    outputs = {
        merged.segments.index((start, stop)): {int(merged.assignment[f, f % 12]) for f in range(start, stop)}
        for start, stop in merged.segments
    }
    assert all(len(each) == 1 for each in outputs.values())
