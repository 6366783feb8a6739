"""Which patches of a video a vision tower computes, and whose row each place of it has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from .host_numbers import on_device
from .segmentation import choose_segments, count_static_tokens, frame_similarity, repeats_first, similarity_runs


if TYPE_CHECKING:
    from .settings import MergingSettings


# Above this share of computed patches a video is computed whole: packing would cost more than it saves.
DENSE_SHARE = 0.97
# Attention runs over frames of like many computed patches: so many kinds of them.
NUM_BATCHES = 8


@dataclass
class PatchPlan:
    """
    F frames of P patches as N packed rows, frame by frame.

    Attributes:
        is_computed: (F, P) bool, which patches have a row of their own; at least all of a segment's first frame.
        slot: (F, P) int64, the row of every place: its own, or that of the same place in its segment's first frame.
        num_rows: Of every frame, on the host.
        first_frame: Of every frame, the one whose rows it uses beside its own; on the host.
        rows_by_layer: As in [`VisionPlan`], from the tower that follows the plan.
    """

    is_computed: torch.Tensor
    slot: torch.Tensor
    num_rows: np.ndarray
    first_frame: np.ndarray
    rows_by_layer: torch.Tensor | None = None
    _elsewhere: dict[torch.device, PatchPlan] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, is_computed: torch.Tensor, first_frame: list[int]) -> PatchPlan:
        """The plan that computes these patches, (F, P) bool; it waits for the device once, to know how many."""
        own = is_computed.flatten().cumsum(0).view(is_computed.shape) - 1
        first = on_device(first_frame, own.device)
        slot = torch.where(is_computed, own, own[first])
        num_rows = is_computed.sum(1).cpu().numpy()
        needs_none = num_rows == is_computed.shape[1]
        return cls(is_computed, slot, num_rows, np.where(needs_none, np.arange(len(num_rows)), first_frame))

    @cached_property
    def starts(self) -> np.ndarray:
        """(F+1,) the first row of every frame, on the host; last their number N."""
        return np.concatenate([[0], self.num_rows.cumsum()])

    @property
    def is_dense(self) -> bool:
        """Whether every patch is computed."""
        return self.starts[-1] == self.slot.numel()

    def gather(self, states: torch.Tensor) -> torch.Tensor:
        """The rows (N, D) of what is computed of (F, P, D)."""
        num_rows = int(self.starts[-1])
        index = torch.where(self.is_computed, self.slot, num_rows).flatten()
        source = index.new_empty(num_rows + 1).scatter_(0, index, torch.arange(len(index), device=index.device))
        return states.flatten(0, 1)[source[:-1]]

    @cached_property
    def batches(self) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
        """
        Frames with like many rows together, at most [`NUM_BATCHES`] of them, so that few launches serve all.

        Returns:
            For every batch its G frames (G,) and their rows (G, n), where short frames go on into rows of others; and
            for all N rows, where each is found in the batches, flattened and one behind the other: (N,).
        """
        device, num_rows = self.slot.device, int(self.starts[-1])
        step = -(-self.slot.shape[1] // NUM_BATCHES)
        levels = -(-self.num_rows // step)
        batches, offset = [], 0
        found_at = np.zeros(len(levels), dtype=np.int64)
        for level in np.unique(levels[levels > 0]):
            frames = (levels == level).nonzero()[0]
            longest = int(self.num_rows[frames].max())
            found_at[frames] = offset + longest * np.arange(len(frames))
            offset += longest * len(frames)
            rows = on_device(self.starts[frames].tolist(), device)[:, None] + torch.arange(longest, device=device)
            batches.append((on_device(frames.tolist(), device), rows.clamp_max(num_rows - 1)))
        moved = on_device((found_at - self.starts[:-1]).tolist(), device)
        lengths = on_device(self.num_rows.tolist(), device)
        return batches, moved.repeat_interleave(lengths, output_size=num_rows) + torch.arange(num_rows, device=device)

    @cached_property
    def variable_lengths(self) -> dict:
        """Where frames begin among the rows and among all places, as transformers' flash attention takes them."""
        device, (num_frames, num_patches) = self.slot.device, self.slot.shape
        return {
            "cu_seq_lens_q": on_device(self.starts.tolist(), device).int(),
            "cu_seq_lens_k": torch.arange(num_frames + 1, dtype=torch.int32, device=device) * num_patches,
            "max_length_q": int(self.num_rows.max()),
            "max_length_k": num_patches,
        }

    def to(self, device: torch.device | int, non_blocking: bool = False) -> PatchPlan:
        """The plan for layers on another device."""
        device = torch.device(device)
        if device == self.slot.device:
            return self
        if device not in self._elsewhere:
            moved = (values.to(device, non_blocking=non_blocking) for values in (self.is_computed, self.slot))
            self._elsewhere[device] = PatchPlan(*moved, self.num_rows, self.first_frame)
        return self._elsewhere[device]

    def pieces(self, most_frames: int) -> Iterator[PatchPiece]:
        """
        Some frames after others, at most `most_frames` of them with as many rows as so many whole ones have; each
        piece with what it uses of another.
        """
        num_frames, num_patches = self.slot.shape
        start = 0
        while start < num_frames:
            most_rows = self.starts[start] + most_frames * num_patches
            stop = int(np.searchsorted(self.starts, most_rows, side="right")) - 1
            stop = min(max(stop, start + 1), start + most_frames, num_frames)
            yield self._piece(start, stop, num_patches)
            start = stop

    def _piece(self, start: int, stop: int, num_patches: int) -> PatchPiece:
        first, row = int(self.first_frame[start:stop].min()), int(self.starts[start])
        ranges, frames = [(row, int(self.starts[stop]))], [*range(start, stop)]
        slot, firsts = self.slot[start:stop] - row, self.first_frame[start:stop] - start
        num_carried = int(first < start)
        if num_carried:
            ranges.insert(0, (int(self.starts[first]), int(self.starts[first + 1])))
            frames.insert(0, first)
            of_first = self.slot[start:stop] - ranges[0][0]
            slot = torch.where(slot >= 0, slot + num_patches, of_first)
            slot = torch.cat([torch.arange(num_patches, device=slot.device)[None], slot])
            firsts = np.concatenate([[0], np.where(firsts < 0, 0, firsts + 1)])
        if stop - start == self.slot.shape[0]:
            return PatchPiece(self, ranges, 0)
        is_computed = self.is_computed[frames]
        return PatchPiece(PatchPlan(is_computed, slot, self.num_rows[frames], firsts), ranges, num_carried)


@dataclass
class PatchPiece:
    """
    Some frames of a plan, which need nothing of the others.

    Attributes:
        plan: Theirs alone.
        ranges: Rows `(start, stop)` of the whole that are its rows, one range behind the other.
        num_carried: 1 if the first frame is a segment's that began before: it belongs to another piece and is
            computed once more.
    """

    plan: PatchPlan
    ranges: list[tuple[int, int]]
    num_carried: int

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        """Its rows, (n, D), of all (N, D)."""
        taken = [rows[start:stop] for start, stop in self.ranges]
        return taken[0] if len(taken) == 1 else torch.cat(taken)

    def own(self, rows: torch.Tensor) -> torch.Tensor:
        """Of its rows (n, D) those that belong to no other piece."""
        start, stop = self.ranges[-1]
        return rows[len(rows) - (stop - start) :]

    @property
    def own_slot(self) -> torch.Tensor:
        """(f, P), the row of every place of the frames that belong to no other piece."""
        return self.plan.slot[self.num_carried :]


@torch.no_grad()
def plan_patches(states: torch.Tensor, num_frames: list[int], settings: MergingSettings) -> PatchPlan:
    """
    Cuts videos into segments as HoliTom's stage 1 does, by patches early in the tower; what repeats over a segment is
    computed in its first frame alone. It waits for the device twice: for the segments, and for how much repeats.

    Args:
        states: (F, P, D) patches of all frames after `vision_reuse_layer` layers.
        num_frames: Of every video; segments do not reach across videos.
        settings: `vision_reuse_threshold`, and `vision_drift_guard`: whether a patch must also be like its own in the
            segment's first frame.
    """
    threshold = settings.vision_reuse_threshold
    repeats = torch.zeros(states.shape[:2], dtype=torch.bool, device=states.device)
    if threshold >= 1:
        return PatchPlan.of(~repeats, [*range(len(states))])
    similarity = frame_similarity(states)
    ends = np.cumsum(num_frames)
    if len(num_frames) > 1:
        similarity[on_device((ends[:-1] - 1).tolist(), states.device)] = -torch.inf
    runs = similarity_runs(similarity, threshold)
    segments, _ = choose_segments(count_static_tokens(runs))
    first_frame = [start for start, stop in segments for _ in range(start, stop)]
    later = [(frame, start, stop) for start, stop in segments for frame in range(start + 1, stop)]
    if later:
        frames, starts, stops = on_device(later, states.device).unbind(1)
        repeats[frames] = runs[stops - 2] >= (stops - starts - 1)[:, None]
        if settings.vision_drift_guard:
            repeats &= repeats_first(states, on_device(first_frame, states.device), threshold)
        lengths = on_device(list(num_frames), states.device)
        video = torch.arange(len(lengths), device=states.device).repeat_interleave(lengths, output_size=len(states))
        num_repeating = torch.zeros_like(lengths).index_add_(0, video, repeats.sum(1))
        repeats &= (num_repeating >= (1 - DENSE_SHARE) * states.shape[1] * lengths)[video][:, None]
    return PatchPlan.of(~repeats, first_frame)
