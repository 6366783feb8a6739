"""Blocks of the Qwen-VL vision towers over packed rows: only what changes are queries, of all keys of their frame."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb_vision, eager_attention_forward
from transformers.utils.generic import is_flash_attention_requested

from ...merging.host_numbers import on_device
from ...merging.patches import NUM_BATCHES, PatchPlan


def packed_block(
    block: nn.Module, rows: torch.Tensor, groups: AttentionGroups, angles: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """
    What a block makes of packed rows. As the forward pass of `Qwen3VLVisionBlock` and its like, whose attention has as
    many keys as queries.

    Args:
        block: Of the tower.
        rows: (N, D), what goes into it.
        groups: What attends to what.
        angles: Of the rotary embedding, cos and sin, (N, head_dim) each.

    Returns:
        (N, D), where the block's weights are.
    """
    attended = groups.attend(block.attn, block.norm1(rows), angles)
    rows = rows.to(attended.device) + attended
    return rows + block.mlp(block.norm2(rows))


def rotated_heads(
    attention: nn.Module, rows: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of rows, (N, H, head_dim) each, and the keys before their rotation."""
    query, plain, value = attention.qkv(rows).view(len(rows), 3, attention.num_heads, -1).unbind(1)
    query, key = apply_rotary_pos_emb_vision(query, plain, *(angle.to(query.device) for angle in angles))
    return query, key, value, plain


@dataclass
class AttentionGroups:
    """
    G groups of places that attend to each other, each all of a frame or of a window of it, one behind the other.

    Attributes:
        slot: (K,) int64, the row of every place: a group's own ones, in order, or one of an earlier group.
        num_places, num_rows: (G,), on the host: of every group its places, and those of them with a row of their own.
    """

    slot: torch.Tensor
    num_places: np.ndarray
    num_rows: np.ndarray
    _elsewhere: dict[torch.device, AttentionGroups] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, plan: PatchPlan, bounds: np.ndarray) -> AttentionGroups:
        """
        The groups of frames that are all cut alike; for windows it waits for the device once, to know their rows.

        Args:
            plan: Of F frames of P places.
            bounds: (W+1,), where a frame's windows begin, and P.
        """
        num_frames, num_rows = len(plan.num_rows), plan.num_rows
        if len(bounds) > 2:
            so_far = F.pad(plan.is_computed.cumsum(1), (1, 0))[:, on_device(bounds.tolist(), plan.slot.device)]
            num_rows = so_far.diff(dim=1).flatten().cpu().numpy()
        return cls(plan.slot.flatten(), np.tile(np.diff(bounds), num_frames), num_rows)

    @cached_property
    def batches(self) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
        """
        Groups of equal size with like many rows together, so that few launches serve all: at most [`NUM_BATCHES`] for
        every size.

        Returns:
            For every batch the rows (g, n) of its groups, where short ones go on into rows of others, and those of
            their places (g, k); and for all N rows, where each is found in the batches, flattened and one behind the
            other: (N,).
        """
        device, total = self.slot.device, int(self.num_rows.sum())
        first_row = self.num_rows.cumsum() - self.num_rows
        first_place = self.num_places.cumsum() - self.num_places
        levels = -(-self.num_rows // -(-self.num_places // NUM_BATCHES))
        batches, offset = [], 0
        found_at = np.zeros_like(first_row)
        for size, level in np.unique(np.stack([self.num_places, levels], 1)[levels > 0], axis=0):
            members = ((self.num_places == size) & (levels == level)).nonzero()[0]
            longest = int(self.num_rows[members].max())
            found_at[members] = offset + longest * np.arange(len(members))
            offset += longest * len(members)
            rows, places = (
                on_device(starts[members].tolist(), device)[:, None] + torch.arange(int(length), device=device)
                for starts, length in ((first_row, longest), (first_place, size))
            )
            batches.append((rows.clamp_max(total - 1), self.slot[places]))
        moved, lengths = (on_device(counts.tolist(), device) for counts in (found_at - first_row, self.num_rows))
        return batches, moved.repeat_interleave(lengths, output_size=total) + torch.arange(total, device=device)

    @cached_property
    def variable_lengths(self) -> dict:
        """Where groups begin among rows and places, as transformers' flash attention takes them."""
        device = self.slot.device
        starts_q, starts_k = (
            on_device([0, *counts.cumsum().tolist()], device).int() for counts in (self.num_rows, self.num_places)
        )
        return {
            "cu_seq_lens_q": starts_q,
            "cu_seq_lens_k": starts_k,
            "max_length_q": int(self.num_rows.max()),
            "max_length_k": int(self.num_places.max()),
        }

    def attend(
        self, attention: nn.Module, rows: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """
        A block's attention of every row over all places of its group.

        Args:
            attention: The block's.
            rows, angles: As in [`packed_block`], the rows normed.
        """
        query, key, value, _ = rotated_heads(attention, rows, angles)
        groups = self.to(query.device)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention_forward)
        options = {
            "is_causal": False,
            "scaling": attention.scaling,
            "dropout": attention.attention_dropout if attention.training else 0.0,
        }
        if is_flash_attention_requested(attention.config):
            # One call for all groups, each with as many queries as it has rows.
            inputs = (x[None].transpose(1, 2) for x in (query, key[groups.slot], value[groups.slot]))
            output, _ = attend(attention, *inputs, attention_mask=None, **options, **groups.variable_lengths)
            return attention.proj(output.reshape(len(rows), -1))
        batches, found_at = groups.batches
        attended = []
        for own, slot in batches:
            inputs = (x.transpose(1, 2) for x in (query[own], key[slot], value[slot]))
            output, _ = attend(attention, *inputs, attention_mask=None, **options)
            attended.append(output.reshape(own.numel(), -1))
        return attention.proj(torch.cat(attended)[found_at])

    def to(self, device: torch.device) -> AttentionGroups:
        """The groups for blocks on another device."""
        if device == self.slot.device:
            return self
        if device not in self._elsewhere:
            self._elsewhere[device] = AttentionGroups(self.slot.to(device), self.num_places, self.num_rows)
        return self._elsewhere[device]
