"""The tower over packed rows against a tower that computes everything and overwrites what repeats."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, SiglipVisionConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from holitom_hf import HoliTomConfig
from holitom_hf.merging import patches
from holitom_hf.merging.patches import PatchPlan, plan_patches
from holitom_hf.merging.segmentation import segment_frames
from holitom_hf.models.siglip import HoliTomSiglipVisionModel
from holitom_hf.models.vision_importance import vision_importance

from ..conftest import make_prompt, make_video


def random_tower(seed: int = 0, num_layers: int = 4, **kwargs) -> HoliTomSiglipVisionModel:
    torch.manual_seed(seed)
    config = SiglipVisionConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=num_layers,
        num_attention_heads=3,
        image_size=24,
        patch_size=4,
        vision_use_head=False,
    )
    return HoliTomSiglipVisionModel._from_config(config, **kwargs).eval()


def random_video(num_frames: int, seed: int = 0, static_share: float = 0.6) -> torch.Tensor:
    """(F, 3, 24, 24): scenes of a few frames, in which some patches stay and some drift or change."""
    random = torch.Generator().manual_seed(seed)
    frames = []
    while len(frames) < num_frames:
        scene = torch.randn(3, 24, 24, generator=random)
        drift = 0.05 * torch.randn(3, 24, 24, generator=random)
        for step in range(int(torch.randint(1, 6, (), generator=random))):
            changes = (torch.rand(1, 6, 6, generator=random) > static_share).repeat_interleave(4, 1)
            changes = changes.repeat_interleave(4, 2)
            frames.append(scene + step * drift + changes * torch.randn(3, 24, 24, generator=random))
    return torch.stack(frames[:num_frames])


@torch.no_grad()
def overwritten(tower, pixels, num_frames, settings) -> tuple[list[torch.Tensor], torch.Tensor]:
    """
    Every hidden state (F, P, D) of a tower that computes all and after each layer overwrites what repeats, and what
    that is. Segment by segment and patch by patch.
    """
    states = tower.embeddings(pixels)
    hidden = [states]
    for layer in tower.encoder.layers[: settings.vision_reuse_layer]:
        states = layer(states, None)
        hidden.append(states)
    unit = torch.nn.functional.normalize(states, dim=-1)
    repeats = torch.zeros(states.shape[:2], dtype=torch.bool)
    first = torch.arange(len(states))
    offset = 0
    for number in num_frames:
        of_video = unit[offset : offset + number]
        similarity = (of_video[1:] * of_video[:-1]).sum(-1)
        mine = torch.zeros(number, states.shape[1], dtype=torch.bool)
        for start, stop in segment_frames(similarity, settings.vision_reuse_threshold):
            for patch in range(states.shape[1]):
                if (similarity[start : stop - 1, patch] > settings.vision_reuse_threshold).all():
                    for frame in range(start + 1, stop):
                        like_first = of_video[frame, patch] @ of_video[start, patch] > settings.vision_reuse_threshold
                        mine[frame, patch] = like_first or not settings.vision_drift_guard
            first[offset + start : offset + stop] = offset + start
        if (~mine).float().mean() <= patches.DENSE_SHARE:
            repeats[offset : offset + number] = mine
        offset += number
    hidden = [torch.where(repeats[..., None], one[first], one) for one in hidden]
    states = hidden[-1]
    for layer in tower.encoder.layers[settings.vision_reuse_layer :]:
        states = layer(states, None)
        states = torch.where(repeats[..., None], states[first], states)
        hidden.append(states)
    return hidden, repeats


def packed(tower, pixels, num_frames, settings, frames_at_once=1000, chunk=1000):
    wanted = set(range(len(tower.encoder.layers) + 1))
    with torch.no_grad():
        plan, parts = tower.encode_changes(pixels.split(chunk), num_frames, settings, wanted, frames_at_once)
        parts = list(parts)
    return plan, [torch.cat([part.frames(index) for part in parts]) for index in sorted(wanted)], parts


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("guard", [True, False])
@pytest.mark.parametrize("layer", [1, 3])
def test_packed_rows_equal_overwriting_after_every_layer(seed, guard, layer):
    tower = random_tower(seed)
    num_frames = [[9, 1, 6], [16], [3, 13], [2]][seed % 4]
    pixels = torch.cat([random_video(number, seed + v) for v, number in enumerate(num_frames)])
    threshold = (0.9, 0.97, 0.995)[seed % 3]
    settings = HoliTomConfig(
        vision_reuse_layer=layer, vision_reuse_threshold=threshold, vision_drift_guard=guard
    )
    hidden, repeats = overwritten(tower, pixels, num_frames, settings)
    for frames_at_once, chunk in ((1000, 1000), (3, 4), (1, 1)):
        plan, found, _ = packed(tower, pixels, num_frames, settings, frames_at_once, chunk)
        assert torch.equal(plan.is_computed, ~repeats)
        for mine, theirs in zip(found, hidden, strict=True):
            torch.testing.assert_close(mine, theirs, atol=2e-6, rtol=1e-5)
