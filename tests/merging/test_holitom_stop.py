"""HoliTom with SToP: against a plain account of what it changes, and HoliTom itself where there is no sink."""

import pytest
import torch
import torch.nn.functional as F

from holitom_hf.merging import MergingSettings, TokenKind, merge_video_tokens

from ..reference import plain_segments
from .drawn import draw_video


def merge(method, features, importance, **fields):
    settings = MergingSettings(outer_method=method, **{"retention_ratio": 0.3, "similarity_threshold": 0.9} | fields)
    return merge_video_tokens(features, importance, settings)


def sink_scores(importance: torch.Tensor) -> list[float]:
    means = [float(importance[:, t].mean()) ** 1.1 for t in range(importance.shape[1])]
    return [(mean - min(means)) / (max(means) - min(means)) for mean in means]


def test_places_that_are_attended_to_alike_are_no_sinks():
    features, importance = draw_video(8, 16, seed=1)
    importance = importance.mean(1, keepdim=True).expand(-1, 16).contiguous()
    ours, holitoms = (merge(method, features, importance) for method in ("holitom_stop", "holitom"))
    assert torch.equal(ours.place, holitoms.place)
    torch.testing.assert_close(ours.embeddings, holitoms.embeddings)


@pytest.mark.parametrize("seed", range(4))
def test_static_and_kept_tokens_are_those_of_the_plain_account(seed):
    features, importance = draw_video(9, 20, seed=seed)
    importance[:, 3] += 2.0  # a sink
    importance = importance / importance.sum(1, keepdim=True)
    merged = merge("holitom_stop", features, importance, retention_ratio=0.4)
    sink = sink_scores(importance)
    alike = F.cosine_similarity(features[:-1], features[1:], dim=-1)
    segments, _ = plain_segments(alike, 0.9, None)
    assert merged.segments == segments
    less = 0.04 * 729 * float(importance.mean())
    for start, stop in segments:
        static = {
            t
            for t in range(20)
            if stop - start > 1 and all(float(alike[f, t]) + 0.07 * sink[t] > 0.9 for f in range(start, stop - 1))
        }
        for f in range(start, stop):
            kept = {int(p) for p in merged.position[(merged.frame == f) & (merged.kind == TokenKind.DYNAMIC)].tolist()}
            dynamic = [t for t in range(20) if t not in static]
            best = sorted(dynamic, key=lambda t: -(float(importance[f, t]) - less * sink[t]))[: len(kept)]
            assert kept == set(best)


def test_a_sink_is_kept_by_holitom_and_not_with_it():
    features, importance = torch.randn(6, 16, 12, generator=torch.Generator().manual_seed(0)), torch.ones(6, 16)
    importance[:, 5] = 2.0
    importance[torch.arange(6), torch.arange(6) + 8] = 1.9
    place = {method: merge(method, features, importance).assignment[:, 5] for method in ("holitom", "holitom_stop")}
    assert (place["holitom"] >= 0).all()
    assert (place["holitom_stop"] < 0).all()
