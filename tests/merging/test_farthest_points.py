"""Farthest points against a plain loop, and what every method's sizes sum up to."""

import pytest
import torch
import torch.nn.functional as F

from holitom_hf.merging import METHODS, MergingSettings, merge_video_tokens
from holitom_hf.merging.diversity import farthest_points

from ..reference import plain_segments


def video(num_frames: int, num_tokens: int, seed: int, change: float = 0.4) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (F, T, 16) of two scenes in which half of the places hardly change, and importance (F, T)."""
    random = torch.Generator().manual_seed(seed)
    scenes = torch.randn(2, num_tokens, 16, generator=random)
    noise = torch.randn(num_frames, num_tokens, 16, generator=random) * change
    noise[:, ::2] *= 0.1
    scene = torch.arange(num_frames) * 2 // max(num_frames, 1)
    return scenes[scene] + noise, torch.rand(num_frames, num_tokens, generator=random) + 0.1


def plain_farthest_points(features, importance, settings) -> tuple[list[int], list[int]]:
    """The kept tokens among the F*T, ascending, and for how many each stands, one token after another."""
    num_frames, num_tokens, _ = features.shape
    budget = max(1, round(num_frames * num_tokens * settings.retention_ratio))
    number = min(num_frames, max(1, budget // settings.min_frame_tokens, -(-budget // num_tokens)))
    looked = [(2 * i + 1) * num_frames // (2 * number) for i in range(number)]
    unit = F.normalize(features.float(), dim=-1)[looked]
    first = list(range(number))
    if settings.similarity_threshold < 1:
        alike = F.cosine_similarity(features[looked][:-1], features[looked][1:], dim=-1)
        segments, _ = plain_segments(alike, settings.similarity_threshold, settings.max_segment_frames)
        first = [start for start, stop in segments for _ in range(stop - start)]

    def repeats(f, t):
        return first[f] != f and float(unit[f, t] @ unit[first[f], t]) > settings.similarity_threshold

    picks = []  # (turn or not, distance, frame, place) in the order of the frames
    for f in range(number):
        candidates = [t for t in range(num_tokens) if not repeats(f, t)]
        weight = importance[f] * 0 + 1
        if settings.importance_weight:
            weight = (importance[looked[f]] / importance[looked[f]].mean()) ** settings.importance_weight
        share = (f + 1) * (budget // 2) // number - f * (budget // 2) // number
        order = []
        while len(order) < min(num_tokens, 2 * -(-budget // number)):
            left = [t for t in candidates if t not in order]
            if not left:
                others = [t for t in range(num_tokens) if t not in order]
                picks.append((False, -1.0, f, others[0]))
                order.append(others[0])
                continue
            if not order:
                mean = unit[f, candidates].mean(0)
                scores = {t: float(unit[f, t] @ mean) for t in left}
            else:
                scores = {
                    t: float(min(2 - 2 * unit[f, t] @ unit[f, c] for c in order).clamp_min(0) * weight[t])
                    for t in left
                }
            best = max(left, key=lambda t: (scores[t], -t))
            picks.append((len(order) < max(share, 1), scores[best], f, best))
            order.append(best)
    picks.sort(key=lambda pick: (not pick[0], -pick[1] if not pick[0] else 0))
    kept = sorted((f, t) for _, _, f, t in picks[:budget])

    sizes = dict.fromkeys(kept, 0)

    def counts_with(f, t):
        own = [k for k in kept if k[0] == f]
        if (f, t) in own or (own and not repeats(f, t)):
            return max(own, key=lambda k: (float(unit[f, t] @ unit[k]), -k[1]))
        return counts_with(first[f], t)

    for f in range(num_frames):
        nearest = min(range(number), key=lambda i: (abs(looked[i] - f), i))
        for t in range(num_tokens):
            sizes[counts_with(nearest, t)] += 1
    return [looked[f] * num_tokens + t for f, t in kept], [sizes[k] for k in kept]


@pytest.mark.parametrize("ratio", [0.02, 0.1, 0.3, 0.7, 0.95])
@pytest.mark.parametrize(
    "fields",
    [
        {"similarity_threshold": 1.0},
        {"similarity_threshold": 0.9, "min_frame_tokens": 1},
        {"similarity_threshold": 0.9, "max_segment_frames": 2, "importance_weight": 1.0},
        {"similarity_threshold": -1.0, "min_frame_tokens": 12},
    ],
)
def test_the_tokens_and_their_sizes_are_those_of_the_plain_loop(ratio, fields):
    for seed, (num_frames, num_tokens) in enumerate([(1, 9), (4, 25), (9, 12), (7, 16)]):
        features, importance = video(num_frames, num_tokens, seed)
        settings = MergingSettings(
            outer_method="farthest_points", retention_ratio=ratio, proportional_attention=True, **fields
        )
        merged = merge_video_tokens(features, importance, settings)
        kept, sizes = plain_farthest_points(features, importance, settings)
        assert merged.place.tolist() == kept
        assert merged.sizes.tolist() == sizes
        assert len(kept) == max(1, round(num_frames * num_tokens * ratio))
        assert torch.equal(merged.embeddings, features.flatten(0, 1)[kept])


def test_no_kept_set_of_its_size_is_covered_twice_as_well():
    """Greedy choice leaves at most twice the largest distance that the best choice does (Gonzalez, 1985)."""
    points = F.normalize(torch.randn(1, 9, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
    similarity = points @ points.mT
    order, _ = farthest_points(similarity, torch.ones(1, 9, dtype=torch.bool), 3)
    distance = (2 - 2 * similarity[0]).clamp_min(0).sqrt()

    def radius(chosen):
        return float(distance[chosen].amin(0).max())

    best = min(radius([a, b, c]) for a in range(9) for b in range(a) for c in range(b))
    assert best <= radius(order[0].tolist()) <= 2 * best


def test_over_the_whole_video_it_is_the_plain_loop():
    features, importance = video(5, 9, seed=7)
    settings = MergingSettings(outer_method="video_farthest_points", retention_ratio=0.3)
    merged = merge_video_tokens(features, importance, settings)
    unit = F.normalize(features.flatten(0, 1), dim=-1)
    mean = unit.mean(0)
    kept = [max(range(45), key=lambda i: float(unit[i] @ mean))]
    while len(kept) < round(0.3 * 45):
        left = [i for i in range(45) if i not in kept]
        kept.append(min(left, key=lambda i: max(float(unit[i] @ unit[k]) for k in kept)))
    assert merged.place.tolist() == sorted(kept)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("newline_position", ["end", "row"])
def test_sizes_are_of_all_the_tokens_there_were(method, newline_position):
    for ratio in (0.02, 0.1, 0.5):
        features, importance = video(8, 16, seed=3)
        settings = MergingSettings(
            outer_method=method,
            retention_ratio=ratio,
            proportional_attention=True,
            newline_position=newline_position,
            contextual_ratio=0.3,
        )
        merged = merge_video_tokens(features, importance, settings, torch.zeros(16), keys=features[..., :4])
        is_newline = merged.kind == 2
        assert merged.sizes[~is_newline].sum() == 8 * 16
        assert (merged.sizes[~is_newline] >= 1).all()
        assert (merged.sizes[is_newline] == 1).all()
        order = torch.arange(merged.num_tokens).flip(0)
        assert torch.equal(merged.in_order_of(order).sizes, merged.sizes.flip(0))


def test_sizes_are_refused_where_nobody_asked_for_them():
    features, importance = video(4, 9, seed=0)
    merged = merge_video_tokens(features, importance, MergingSettings(outer_method="random_tokens"))
    with pytest.raises(ValueError, match="proportional_attention"):
        merged.sizes  # noqa: B018 - the property is what fails
