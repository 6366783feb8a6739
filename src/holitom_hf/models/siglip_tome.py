"""The SigLIP vision tower with fewer patches from layer to layer (ToMe, arXiv 2210.09461)."""

from collections.abc import Iterable, Iterator

import torch
from torch import nn
from transformers.utils.generic import is_flash_attention_requested

from ..merging.bipartite import first_places, match_patches, merge_patches, merges_by_layer
from ..merging.first_layer import check_first_layer
from ..merging.settings import MergingSettings
from ..merging.vision_methods import VisionPlan
from .siglip import HoliTomSiglipVisionModel, PackedStates
from .siglip_keys import attend_with_keys


def encode_merged_patches(
    tower: HoliTomSiglipVisionModel,
    chunks: Iterable[torch.Tensor],
    num_frames: list[int],
    settings: MergingSettings,
    wanted: set[int],
    frames_at_once: int,
    shared_from: int | None = None,
    **embedding_kwargs,
) -> tuple[VisionPlan, Iterator[PackedStates]]:
    """
    The hidden states of frames whose patches are merged, the same number in every layer behind `vision_reuse_layer`
    up to `shared_from`, until `vision_retention_ratio` of them are left. Later layers merge none.

    As in the paper they are merged between attention and MLP, by the attention's keys, and what stands for several
    patches counts for as many in later layers' attention.

    Args, Returns: As `HoliTomSiglipVisionModel.encode_changes`; frames go through the tower in the chunks that they
        come in. Of the rows that go into a layer those that it merges do not reach its MLP.

    Raises:
        ValueError: If no layer is left to merge in, or the tower's attention takes no mask.
    """
    start, stop = settings.vision_reuse_layer, max(wanted)
    shared_from = stop - 1 if shared_from is None else shared_from
    check_first_layer(start, shared_from - 1)
    parts, is_computed, merges = [], [], []
    for chunk in chunks:
        dense = tower.first_states([chunk], start, wanted, embedding_kwargs)
        num_patches = dense[start].shape[1]
        merges = merges_by_layer(num_patches, shared_from - start, settings.vision_retention_ratio)
        merges += [0] * (stop - shared_from)
        if any(merges) and is_flash_attention_requested(tower.config):
            raise ValueError(
                f"vision_method {settings.vision_method!r} adds to attention scores, which "
                f'{tower.config._attn_implementation!r} cannot: load the model with attn_implementation "sdpa"'
            )
        parts.append(_merged_states(tower.encoder.layers[start:stop], dense, start, merges, wanted))
        is_computed.append(first_places(parts[-1].slot, len(parts[-1].rows[stop])))
    merged = torch.tensor([0] * start + merges)
    rows = num_patches - merged.cumsum(0) + merged  # before they are merged
    return VisionPlan(torch.cat(is_computed), rows[:, None].repeat(1, sum(num_frames))), iter(parts)


def _merged_states(
    layers: nn.ModuleList, dense: dict[int, torch.Tensor], start: int, merges: list[int], wanted: set[int]
) -> PackedStates:
    """Whole frames' states after `start` layers through those behind, which merge as many patches as `merges` says."""
    states, sizes, mask = dense[start], None, None
    frames = torch.arange(len(states), device=states.device)[:, None]
    place = torch.arange(states.shape[1], device=states.device).expand(states.shape[:2])
    kept = {index: (before, place) for index, before in dense.items()}
    for index, (layer, num_merged) in enumerate(zip(layers, merges, strict=True), start + 1):
        if num_merged:
            states, sizes, moved = _layer_that_merges(layer, states, sizes, mask, num_merged)
            place = moved.gather(1, place)
            mask = sizes.log()[:, None, None].to(states.dtype)
        else:
            states = layer(states, mask)
        if index in wanted:
            kept[index] = states, place
    rows = {index: kept[index][0].flatten(0, 1) for index in wanted}
    slots = {index: kept[index][1] + frames * kept[index][0].shape[1] for index in wanted}
    return PackedStates(rows, slots[max(wanted)], slots)


def _layer_that_merges(
    layer: nn.Module, states: torch.Tensor, sizes: torch.Tensor | None, mask: torch.Tensor | None, num_merged: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A layer's two halves with merging between: (F, n-r, D), their sizes, and where the n patches are among them."""
    attended, keys = attend_with_keys(layer.self_attn, layer.layer_norm1(states), mask)
    moved = match_patches(keys, num_merged)
    states, sizes = merge_patches(states + attended, sizes, moved, states.shape[1] - num_merged)
    return states + layer.mlp(layer.layer_norm2(states)), sizes, moved
