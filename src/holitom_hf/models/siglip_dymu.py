"""The SigLIP vision tower with fewer patches where they are alike (dynamic token merging, DyMU, arXiv 2504.17040)."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers.utils.generic import is_flash_attention_requested

from ..merging.bipartite import first_places, merges_by_layer
from ..merging.dynamic_matching import best_partners, threshold_of
from ..merging.first_layer import check_first_layer
from ..merging.host_numbers import on_device
from ..merging.settings import MergingSettings
from ..merging.vision_methods import VisionPlan
from .siglip import HoliTomSiglipVisionModel, PackedStates
from .siglip_keys import attend_with_keys


@dataclass
class _Rows:
    """
    What is left of some frames, one frame's rows behind those of the one before.

    Attributes:
        states: (N, D).
        sizes: (N,) float32, for how many patches each row stands; `None`: one.
        counts: Of every frame.
        slot: (f, P) int64, the row of every patch.
    """

    states: torch.Tensor
    sizes: torch.Tensor | None
    counts: list[int]
    slot: torch.Tensor

    @classmethod
    def of(cls, states: torch.Tensor) -> "_Rows":
        """Whole frames (f, P, D)."""
        num_frames, num_patches = states.shape[:2]
        slot = torch.arange(num_frames * num_patches, device=states.device).view(num_frames, num_patches)
        return cls(states.flatten(0, 1), None, [num_patches] * num_frames, slot)

    @property
    def padded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(f, n) int64, the rows of every frame, n of the longest, and where there is one, (f, n) bool."""
        counts = on_device(self.counts, self.states.device)
        place = torch.arange(max(self.counts), device=counts.device)
        is_real = place < counts[:, None]
        return (counts.cumsum(0) - counts)[:, None] + torch.where(is_real, place, 0), is_real


def encode_by_thresholds(
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
    The hidden states of frames whose patches are merged where they are alike: in every layer behind
    `vision_reuse_layer`, up to `shared_from`, those of set A whose best partner is above that layer's threshold. How
    many that are differs by frame. Later layers merge none.

    As in ToMe they are merged between attention and MLP, by the attention's keys, and what stands for several patches
    counts for as many in later layers' attention. Projections and MLP run over the rows that there are; in the
    attention frames are filled up to the longest of their chunk.

    DyMU merges from the first layer on and in the last one, too, and leaves one of A where all are above the threshold
    and A has one more than B. Here the first layer never merges, nor does the one that importance is taken from.

    Args, Returns: As `HoliTomSiglipVisionModel.encode_changes`; frames go through the tower in the chunks that they
        come in. Of the rows that go into a layer those that it merges do not reach its MLP. The host waits once a
        layer and chunk, for how many rows are left.

    Raises:
        ValueError: If there are no thresholds or not one for each of these layers, no layer is left to merge in, or
            the tower's attention takes no mask.
    """
    start, stop = settings.vision_reuse_layer, max(wanted)
    shared_from = stop - 1 if shared_from is None else shared_from
    thresholds = _checked_thresholds(tower, settings, shared_from)
    thresholds = [*thresholds, *[None] * (stop - shared_from)]
    parts, counts_by_layer = [], []
    for chunk in chunks:
        dense = tower.first_states([chunk], start, wanted, embedding_kwargs)
        rows = _Rows.of(dense[start])
        kept = {index: _Rows.of(states) for index, states in dense.items()}
        counts = [rows.counts] * start
        for index, threshold in enumerate(thresholds, start + 1):
            layer = tower.encoder.layers[index - 1]
            counts.append(rows.counts)
            rows, keys = _attended(layer, rows)
            if threshold is not None:
                rows = _merged(rows, *_partners(rows, keys), threshold)
            rows.states = rows.states + layer.mlp(layer.layer_norm2(rows.states))
            if index in wanted:
                kept[index] = rows
        states = {index: kept[index].states for index in wanted}
        parts.append(PackedStates(states, rows.slot, {index: kept[index].slot for index in wanted}))
        counts_by_layer.append(torch.tensor(counts))
    is_computed = [first_places(part.slot, len(part.rows[stop])) for part in parts]
    groups = torch.cat([_first_of_group(part.slot, first) for part, first in zip(parts, is_computed)])
    return VisionPlan(torch.cat(is_computed), torch.cat(counts_by_layer, dim=1), groups), iter(parts)


@torch.no_grad()
def find_thresholds(
    tower: HoliTomSiglipVisionModel,
    chunks: Iterable[torch.Tensor],
    settings: MergingSettings,
    shared_from: int,
    **embedding_kwargs,
) -> list[float]:
    """
    Thresholds of the layers behind `vision_reuse_layer` up to `shared_from` that leave `vision_retention_ratio` of
    these frames' patches on average, the same number merged in every layer.

    Layer by layer, as those before merge: all frames' best partners are compared, and the threshold is what so many of
    them lie above. DyMU takes the mean of its batches' thresholds; here all frames are one batch, whose states are all
    held at once.

    Args:
        tower: The vision tower.
        chunks: (f, C, H, W) pixels, together the frames.
        settings: Its layer and share.
        shared_from: As in [`encode_by_thresholds`].

    Source: DyMU (arXiv 2504.17040), section 3.1.
    """
    start = settings.vision_reuse_layer
    check_first_layer(start, shared_from - 1)
    parts = [_Rows.of(tower.first_states([chunk], start, set(), embedding_kwargs)[start]) for chunk in chunks]
    num_frames, num_patches = sum(len(rows.counts) for rows in parts), parts[0].slot.shape[1]
    thresholds = []
    for index, r in enumerate(
        merges_by_layer(num_patches, shared_from - start, settings.vision_retention_ratio), start
    ):
        layer = tower.encoder.layers[index]
        parts, keys = zip(*(_attended(layer, rows) for rows in parts))
        partners = [_partners(rows, of_rows) for rows, of_rows in zip(parts, keys)]
        threshold = threshold_of(torch.cat([scores.flatten() for scores, _ in partners]), r * num_frames)
        parts = [_merged(rows, *found, threshold) for rows, found in zip(parts, partners)]
        for rows in parts:
            rows.states = rows.states + layer.mlp(layer.layer_norm2(rows.states))
        thresholds.append(threshold)
    return thresholds


def _checked_thresholds(tower: HoliTomSiglipVisionModel, settings: MergingSettings, shared_from: int) -> list[float]:
    start, thresholds = settings.vision_reuse_layer, settings.vision_merge_thresholds
    check_first_layer(start, shared_from - 1)
    method, hint = settings.vision_method, "find them with `holitom-hf calibrate-vision`"
    if thresholds is None:
        raise ValueError(f"vision_method {method!r} needs vision_merge_thresholds: {hint}")
    if len(thresholds) != shared_from - start:
        raise ValueError(
            f"vision_merge_thresholds has {len(thresholds)} numbers, but behind vision_reuse_layer {start} this tower "
            f"merges in {shared_from - start} layers: {hint}"
        )
    if is_flash_attention_requested(tower.config):
        raise ValueError(
            f"vision_method {method!r} adds to attention scores, which {tower.config._attn_implementation!r} cannot: "
            'load the model with attn_implementation "sdpa"'
        )
    return thresholds


def _attended(layer: nn.Module, rows: _Rows) -> tuple[_Rows, torch.Tensor]:
    """Rows behind a layer's attention, and its keys averaged over heads, (N, head_dim)."""
    normed = layer.layer_norm1(rows.states)
    index, is_real = rows.padded
    mask = None
    if rows.sizes is not None:
        mask = rows.sizes.log()[index].masked_fill(~is_real, torch.finfo(normed.dtype).min)
        mask = mask[:, None, None].to(normed.dtype)
    output, keys = attend_with_keys(layer.self_attn, normed, mask, index, is_real)
    return _Rows(rows.states + output, rows.sizes, rows.counts, rows.slot), keys


def _partners(rows: _Rows, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    index, is_real = rows.padded
    return best_partners(keys[index], is_real)


def _merged(rows: _Rows, scores: torch.Tensor, partner: torch.Tensor, threshold: float) -> _Rows:
    """Rows of which those of set A above `threshold` went into their partner: the rest of A first, B behind it."""
    is_merged = scores > threshold
    num_merged = is_merged.sum(1)
    _, is_real = rows.padded
    device = is_real.device
    num_unmerged = is_real[:, ::2].sum(1) - num_merged
    counts = [before - merged for before, merged in zip(rows.counts, num_merged.tolist())]
    if counts == rows.counts:
        return rows
    moved = torch.empty(is_real.shape, dtype=torch.long, device=device)  # (f, n), among the frame's rows that are left
    target = num_unmerged[:, None]
    moved[:, ::2] = torch.where(is_merged, target + partner, (~is_merged).cumsum(1) - 1)
    moved[:, 1::2] = target + torch.arange(is_real.shape[1] // 2, device=device)
    left = on_device(counts, device)
    moved = (moved + (left.cumsum(0) - left)[:, None])[is_real]  # (N,)
    sizes = torch.ones(len(moved), device=device) if rows.sizes is None else rows.sizes
    total = sizes.new_zeros(sum(counts)).index_add(0, moved, sizes)
    weighted = rows.states * sizes[:, None]
    states = weighted.new_zeros(len(total), weighted.shape[1]).index_add(0, moved, weighted) / total[:, None]
    return _Rows(states.to(rows.states.dtype), total, counts, moved[rows.slot])


def _first_of_group(slot: torch.Tensor, is_first: torch.Tensor) -> torch.Tensor:
    """(f, P) int64, for every place the first place of its frame that has the same row."""
    frame, place = is_first.nonzero(as_tuple=True)
    first = torch.empty(len(place), dtype=torch.long, device=slot.device)
    first[slot[frame, place]] = place
    return first[slot]
