"""What a reading of the packed tower found. Each fails as long as it is so."""

import pytest
import torch

from holitom_hf import HoliTomConfig
from holitom_hf.merging import patches
from holitom_hf.merging.patches import plan_patches

from ..conftest import make_video
from .test_vision_reuse import packed, random_tower, random_video


@pytest.mark.xfail(strict=True, reason="pieces are bounded by their rows alone, and a still video is one")
def test_no_piece_has_more_frames_than_may_exist_at_once():
    """Keys and values, importance's queries and keys, and what is projected exist at all places of a piece."""
    pixels = random_video(1).expand(40, -1, -1, -1)
    _, _, parts = packed(random_tower(), pixels, [40], HoliTomConfig(vision_reuse_layer=1), frames_at_once=4)
    assert max(len(part.slot) for part in parts) <= 4


@pytest.mark.xfail(strict=True, reason="a video that is computed whole keeps its segments' first frames")
def test_a_piece_computes_nothing_twice_that_it_does_not_use(monkeypatch):
    monkeypatch.setattr(patches, "DENSE_SHARE", 0.0)
    states = torch.randn(1, 8, 16).expand(6, -1, -1)
    plan = plan_patches(states, [6], HoliTomConfig(vision_reuse_layer=1))
    assert plan.is_dense
    assert [piece.num_carried for piece in plan.pieces(8)] == [0] * 6


@pytest.mark.xfail(strict=True, reason="the check counts hidden states that are only shown")
def test_a_layer_that_saves_nothing_is_told_whatever_is_returned(model):
    """Features are taken after layer 2 of 3: nothing is left to leave out after `vision_reuse_layer` 2."""
    for return_vision_states in (False, True):
        with pytest.raises(ValueError, match="choose 1 to 1"):
            model.get_video_features(
                [make_video(3, seed=0)],
                vision_feature_layer=-2,
                holitom_config={"vision_reuse_layer": 2},
                return_vision_states=return_vision_states,
            )


@pytest.mark.xfail(strict=True, reason="of what is asked for besides, the packed tower knows hidden states alone")
def test_attentions_that_cannot_be_returned_are_refused(model):
    with pytest.raises(ValueError, match="attentions"):
        model.get_video_features(
            [make_video(3, seed=0)], output_attentions=True, holitom_config={"vision_reuse_layer": 1}
        )
