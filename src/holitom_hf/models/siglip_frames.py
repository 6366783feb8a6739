"""The SigLIP vision tower with fewer and fewer frames (EarlyTom, arXiv 2605.30010)."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from ..merging.first_layer import check_first_layer
from ..merging.frame_merging import group_frames
from ..merging.host_numbers import on_device
from ..merging.settings import MergingSettings
from ..merging.vision_methods import VisionPlan
from .siglip import HoliTomSiglipVisionModel, PackedStates


# EarlyTom merges after 5 to 11 layers, and mostly after 22 and 24 of 26: so many before the input of the last one.
LATER_MERGES = (3, 1)


def encode_merged_frames(
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
    The hidden states of videos whose alike frames are merged after `vision_reuse_layer` layers, and again twice
    before `shared_from` where that is deeper. A merged frame is computed once, and at every place of its frames.

    EarlyTom hands the merged frames on, and keeps R / (share of frames left) of their tokens. Here features come back
    at full length, and what stages 1 and 2 keep is R of that: as many tokens as with EarlyTom, chosen by HoliTom.

    Args, Returns: As `HoliTomSiglipVisionModel.encode_changes`. A hidden state that frames are merged after is the
        merged one.

    Raises:
        ValueError: If frames would be merged after `shared_from`.
    """
    start, stop = settings.vision_reuse_layer, max(wanted)
    shared_from = stop - 1 if shared_from is None else shared_from
    check_first_layer(start, shared_from)
    merge_after = {start, *(shared_from - number for number in LATER_MERGES)}
    dense = tower.first_states(chunks, start, wanted, embedding_kwargs)
    group = np.arange(sum(num_frames))
    kept = {index: (states, group) for index, states in dense.items() if index != start}
    states = dense.pop(start)
    num_patches = states.shape[1]
    is_own = [np.ones(len(group), dtype=bool)] * start
    for index in range(start, stop + 1):
        if index > start:
            layer = tower.encoder.layers[index - 1]
            states = torch.cat([layer(frames, None) for frames in states.split(frames_at_once)])
            is_own.append(np.diff(group, prepend=-1) > 0)
        if index in merge_after:
            groups = group_frames(states, num_frames, settings.vision_reuse_threshold)
            states, group, num_frames = groups.merge(states), groups.group[group], groups.num_frames
        if index in wanted:
            kept[index] = states, group
    is_computed = torch.from_numpy(is_own[-1]).to(states.device)[:, None].expand(-1, num_patches)
    plan = VisionPlan(is_computed, torch.from_numpy(np.stack(is_own) * num_patches))
    return plan, (_part(kept, first, frames_at_once, stop) for first in range(0, len(group), frames_at_once))


def _part(kept: dict[int, tuple[torch.Tensor, np.ndarray]], first: int, number: int, stop: int) -> PackedStates:
    """The states of some frames, of those by index with what each frame of all is among them."""
    rows, slots = {}, {}
    for index, (states, group) in kept.items():
        mine = group[first : first + number]
        rows[index] = states[mine[0] : mine[-1] + 1].flatten(0, 1)
        places = torch.arange(states.shape[1], device=states.device)
        slots[index] = on_device((mine - mine[0]).tolist(), states.device)[:, None] * len(places) + places
    return PackedStates(rows, slots[stop], slots)
