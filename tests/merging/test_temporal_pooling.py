"""Means over time against a loop, and what they are of videos one sees through."""

import pytest
import torch

from holitom_hf.merging import MergingSettings, merge_video_tokens

from .drawn import draw_video


def merge(features, ratio):
    settings = MergingSettings(outer_method="temporal_pooling", retention_ratio=ratio)
    return merge_video_tokens(features, features.new_zeros(features.shape[:2]), settings)


@pytest.mark.parametrize(("num_frames", "ratio", "parts"), [(8, 0.25, 2), (10, 0.3, 3), (7, 0.05, 1), (9, 0.9, 8)])
def test_parts_are_means_of_the_frames_that_follow_each_other(num_frames, ratio, parts):
    features, _ = draw_video(num_frames, 6)
    merged = merge(features, ratio)
    assert len(merged.segments) == parts
    lengths = [stop - start for start, stop in merged.segments]
    assert max(lengths) - min(lengths) <= 1
    expected = []
    for start, stop in merged.segments:
        for place in range(6):
            expected.append(sum(features[f, place] for f in range(start, stop)) / (stop - start))
    torch.testing.assert_close(merged.embeddings, torch.stack(expected))
    assert merged.place.tolist() == [6 * start + place for start, _ in merged.segments for place in range(6)]


def test_of_a_still_video_it_is_the_picture():
    picture = torch.randn(1, 9, 8, generator=torch.Generator().manual_seed(0))
    merged = merge(picture.expand(12, -1, -1).contiguous(), 0.25)
    torch.testing.assert_close(merged.embeddings, picture.expand(3, -1, -1).flatten(0, 1))
