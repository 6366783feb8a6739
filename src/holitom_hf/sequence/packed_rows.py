"""Rows of a batch made as short as the longest of them, after some of their entries were dropped."""

from dataclasses import dataclass, replace

import torch

from ..merging.host_numbers import on_device


@dataclass
class PackedRows:
    """
    Rows of which only some entries are kept, made as short as the longest of them.

    Attributes:
        index: (B, N) int64, the entry of the row that each new position takes; arbitrary but valid at padding.
        mask: (B, N) bool, false at padding.
        num_kept: Number of kept entries of every row.
        padding_side: `"left"` or `"right"`.
        last_kept: (B, L) int64, for every old position the new one of the last kept entry at or before it; the first
            new one where there is none.
    """

    index: torch.Tensor
    mask: torch.Tensor
    num_kept: list[int]
    padding_side: str
    last_kept: torch.Tensor

    @classmethod
    def of(cls, keep: torch.Tensor, num_kept: list[int], padding_side: str) -> "PackedRows":
        """
        Packs the rows of `keep` (B, L) bool, whose numbers of true entries `num_kept` the host knows, so that no
        device synchronisation is needed.
        """
        longest = max(max(num_kept), 1)
        index = keep.logical_not().to(torch.int8).argsort(dim=1, stable=True)[:, :longest]
        place = torch.arange(longest, device=keep.device).expand(len(num_kept), -1)
        count = on_device(num_kept, keep.device)[:, None]
        first = longest - count if padding_side == "left" else torch.zeros_like(count)
        index = index.gather(1, (place - first).clamp_min(0))
        mask = (place >= first) & (place < first + count)
        last_kept = first + (keep.cumsum(1) - 1).clamp_min(0)
        return cls(index, mask, num_kept, padding_side, last_kept.clamp_max(longest - 1))

    def to(self, device: torch.device) -> "PackedRows":
        """The same on another device, for decoders whose layers lie on several."""
        return replace(
            self, index=self.index.to(device), mask=self.mask.to(device), last_kept=self.last_kept.to(device)
        )

    @property
    def is_padded(self) -> bool:
        """Whether the rows differ in length."""
        return len(set(self.num_kept)) > 1

    def row_start(self, row: int) -> int:
        """The first position of a row that is not padding."""
        return self.index.shape[1] - self.num_kept[row] if self.padding_side == "left" else 0

    def row(self, row: int) -> torch.Tensor:
        """(n,) int64, the entries that row keeps, ascending and without padding."""
        start = self.row_start(row)
        return self.index[row, start : start + self.num_kept[row]]


# As part of what a decoder returns that is exported on its own.
torch.export.register_dataclass(PackedRows)


def take_rows(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(B, L, D) and (B, N) int64 -> (B, N, D)."""
    batch_size, length, dim = values.shape
    first = torch.arange(batch_size, device=index.device)[:, None] * length
    # Row by row: `gather` would look every single element up.
    return values.reshape(-1, dim).index_select(0, (index + first).flatten()).view(batch_size, -1, dim)
