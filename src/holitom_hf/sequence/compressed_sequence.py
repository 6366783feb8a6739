"""Full length outside, short inside: how the sequence a caller holds maps onto the shorter ones in the decoder."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from ..merging.merged_video import MergedVideo


if TYPE_CHECKING:
    from transformers.cache_utils import Cache


@dataclass
class CompressedSequence:
    """
    What a cache must remember of the tokens that were dropped, so that a caller can go on counting all of them.

    It belongs to one cache and is found on it as `cache.compressed_sequence`. Tokens that came after the last
    compressed forward pass are not in it: nothing was dropped among them.

    Attributes:
        full_length: Number of positions the caller has passed, dropped ones and padding included.
        outer_mask: (B, N) bool, which cached positions of the layers before stage 3 are real and not padding.
        inner_mask: (B, M) bool, the same from the layer of stage 3 on.
        inner_layer: First of the layers that hold M positions; `None` if all hold N.
        next_position: (B, 1) int64, the position inside of the text token that follows.
        position_offset: (B,) int64, how much smaller position ids are inside than the caller counts.
        is_padded: Whether a mask has a False in it (known on the host).
        outer_sizes: (B, N) float32, for how many uncompressed tokens each position stands, where attention is
            proportional to it; `None` where all count alike.
        inner_sizes: (B, M), the same from the layer of stage 3 on.
        merged_videos: What stages 1 and 2 did, a list per row with an entry per video.
        inner_keep: What stage 3 did, an entry per row: (n,) int64 indices of the surviving tokens among those that
            entered the decoder in that row, ascending; `None` where it did not run.
    """

    full_length: int
    outer_mask: torch.Tensor
    inner_mask: torch.Tensor
    inner_layer: int | None
    next_position: torch.Tensor
    position_offset: torch.Tensor
    is_padded: bool
    outer_sizes: torch.Tensor | None = None
    inner_sizes: torch.Tensor | None = None
    merged_videos: list[list[MergedVideo]] = field(default_factory=list)
    inner_keep: list[torch.Tensor | None] = field(default_factory=list)

    @classmethod
    def of(cls, cache: Cache | None, num_new_tokens: int) -> CompressedSequence | None:
        """The record that belongs to `cache`, or `None` if nothing in it was compressed."""
        record = getattr(cache, "compressed_sequence", None)
        if record is None:
            return None
        length = cache.get_seq_length()
        # `cache.reset()` empties the layers and knows nothing of the record. A static cache counts on the device:
        # it is asked only where a prompt may start, never in a decoding step, and not while a graph is traced.
        may_ask = isinstance(length, int) or (num_new_tokens > 1 and not torch.compiler.is_compiling())
        if may_ask and int(length) == 0:
            cache.compressed_sequence = None
            return None
        return record

    @classmethod
    def uncompressed(cls, num_cached: int, attention_mask: torch.Tensor | None, batch_size: int, device):
        """The record of a cache in which nothing was dropped yet, which may be empty."""
        mask = torch.ones((batch_size, num_cached), dtype=torch.bool, device=device)
        if attention_mask is not None:
            mask = attention_mask[:, :num_cached].to(mask)
        return cls(
            full_length=num_cached,
            outer_mask=mask,
            inner_mask=mask,
            inner_layer=None,
            next_position=mask.sum(1, keepdim=True),
            position_offset=torch.zeros(batch_size, dtype=torch.long, device=device),
            is_padded=num_cached > 0 and attention_mask is not None,
        )

    @classmethod
    def before_call(
        cls,
        record: CompressedSequence | None,
        num_cached: int,
        attention_mask: torch.Tensor | None,
        batch_size: int,
        device,
    ) -> CompressedSequence:
        """
        The record of everything that a cache holds before a call.

        Args:
            record: That of the cache; `None` if nothing in it was compressed.
            num_cached: How many positions its first layer holds.
            attention_mask: (B, L) of everything the caller has passed or more; `None` if there is no padding.
            batch_size, device: Of the call.
        """
        if record is None:
            return cls.uncompressed(num_cached, attention_mask, batch_size, device)
        return record.including(num_cached - record.outer_mask.shape[1], attention_mask)

    def inner_layer_with(self, layer: int | None) -> int | None:
        """
        The layer from which on cache and call are shorter; `None` if all layers have the same length.

        Args:
            layer: That of the call.

        Raises:
            ValueError: If the cache was compressed from another one on.
        """
        if self.inner_layer is None:
            return layer
        if layer not in (None, self.inner_layer):
            raise ValueError(
                f"inner_merge_layer is {layer}, but the cache was compressed from layer {self.inner_layer} on: "
                "use the same layer for all videos of one conversation"
            )
        return self.inner_layer

    def attach(self, cache: Cache) -> None:
        """Puts the record on the cache that holds the tokens."""
        cache.compressed_sequence = self

    def seen_length(self, cache: Cache) -> int:
        """Number of positions that the caller has passed so far, with those after the last compressed pass."""
        return self.full_length + int(cache.get_seq_length()) - self.outer_mask.shape[1]

    def including(self, num_after: int, attention_mask: torch.Tensor | None) -> CompressedSequence:
        """
        The record with the tokens that came after the last compressed pass, none of which were dropped.

        Args:
            num_after: How many positions came after.
            attention_mask: (B, L) of everything the caller has passed or more; `None` if there is no padding.
        """
        if num_after == 0:
            return self
        new = self.outer_mask.new_ones((self.outer_mask.shape[0], num_after))
        if attention_mask is not None:
            new = attention_mask[:, self.full_length : self.full_length + num_after].to(new)
        return replace(
            self,
            full_length=self.full_length + num_after,
            outer_mask=torch.cat([self.outer_mask, new], dim=1),
            inner_mask=torch.cat([self.inner_mask, new], dim=1),
            outer_sizes=joined_sizes(self.outer_sizes, None, self.outer_mask, new),
            inner_sizes=joined_sizes(self.inner_sizes, None, self.inner_mask, new),
            next_position=self.next_position + new.sum(1, keepdim=True),
            is_padded=self.is_padded or attention_mask is not None,
        )

    def is_real(self, attention_mask: torch.Tensor | None, num_new: int) -> torch.Tensor:
        """(B, L) bool, which of the L positions after those of the record are no padding."""
        if attention_mask is None:
            return self.outer_mask.new_ones((self.outer_mask.shape[0], num_new))
        return attention_mask[:, self.full_length :].to(self.outer_mask)

    def for_batch(self, batch_size: int) -> CompressedSequence:
        """
        The record for a batch whose rows were repeated (`cache.batch_repeat_interleave`).

        Raises:
            ValueError: If the rows can't be told from the batch size.
        """
        rows = self.outer_mask.shape[0]
        if rows == batch_size:
            return self
        if batch_size % rows:
            raise ValueError(
                f"the cache was compressed for {rows} rows and is now used with {batch_size}: rows can be repeated, "
                "but not selected"
            )
        repeats = batch_size // rows
        by_row = ("outer_mask", "inner_mask", "next_position", "position_offset", "outer_sizes", "inner_sizes")
        tensors = {name: getattr(self, name) for name in by_row if getattr(self, name) is not None}
        return replace(
            self,
            **{name: values.repeat_interleave(repeats, 0) for name, values in tensors.items()},
            merged_videos=[entry for entry in self.merged_videos for _ in range(repeats)],
            inner_keep=[entry for entry in self.inner_keep for _ in range(repeats)],
        )


def joined_sizes(
    before: torch.Tensor | None, after: torch.Tensor | None, *places: torch.Tensor
) -> torch.Tensor | None:
    """
    Sizes of a cache's positions and of those that follow; `None` if all are 1.

    Args:
        before, after: (B, P) and (B, N) float32; `None` where all are 1.
        places: Tensors of these shapes.
    """
    if before is None and after is None:
        return None
    ones = (torch.ones(part.shape, device=part.device) for part in places)
    return torch.cat([one if sizes is None else sizes for sizes, one in zip((before, after), ones)], dim=1)
