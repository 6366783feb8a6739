"""Stage 3 over a batch: what the decoder needs to run it, or to go on after it."""

from dataclasses import dataclass

import torch

from ..merging.inner import choose_survivors, fold_tokens, num_inner_kept
from .packed_rows import PackedRows, take_rows


@dataclass
class InnerStage:
    """
    What the decoder needs to run stage 3, or to go on after it.

    Attributes:
        layer: k, the first layer that sees fewer tokens; `None` if all see the same.
        past_mask: (B, P) bool, which positions the layers from k on already hold are real.
        mask: (B, N) bool, which of this call's positions are real.
        is_padded: Whether either mask has a False in it; if not they are not looked at.
        videos: A list per row with, per video, the (V,) int64 positions of its tokens, ascending; `None` in a call
            in which nothing is removed.
        merge_ratio: Share r of every video's tokens that is removed.
        fold: Whether removed tokens are folded into the kept ones.
        num_real: Number of real tokens of every row.
        padding_side: Where rows are padded.
        query: (B,) int64, the position whose attention is asked: the prompt's last real token.
        num_past: Number of positions that the first layers already hold.
        has_gaps: Whether the position ids of this call are for the rotation alone: they have gaps, and an attention
            function that sees them would take one row for several packed ones.
    """

    layer: int | None
    past_mask: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    is_padded: bool = False
    videos: list[list[torch.Tensor]] | None = None
    merge_ratio: float = 0.0
    fold: bool = True
    num_real: list[int] | None = None
    padding_side: str = "left"
    query: torch.Tensor | None = None
    num_past: int = 0
    has_gaps: bool = False


# As an argument of a decoder that is exported on its own.
torch.export.register_dataclass(InnerStage)


def merge_inside(
    hidden_states: torch.Tensor, importance: torch.Tensor, stage: InnerStage
) -> tuple[torch.Tensor, PackedRows]:
    """
    Removes a share of every video's tokens from a batch of hidden states and packs the rows anew.

    Args:
        hidden_states: (B, N, D).
        importance: (B, N).
        stage: Where the videos are and how many tokens go.

    Returns:
        (B, M, D) and which of the N positions they are.

    Source: section 3.3, for each video of each row as in [`merge_hidden_states`].
    """
    device = hidden_states.device
    survives = stage.mask.to(device, copy=True)
    num_left = list(stage.num_real)
    rows, columns, merged = [], [], []
    for row, videos in enumerate(stage.videos):
        for positions in videos:
            positions = positions.to(device)
            num_kept = num_inner_kept(len(positions), stage.merge_ratio)
            kept, folded = choose_survivors(importance[row, positions], num_kept)
            survives[row, positions[folded]] = False
            num_left[row] -= len(folded)
            if stage.fold:
                rows.append(torch.full_like(kept, row))
                columns.append(positions[kept])
                merged.append(fold_tokens(hidden_states[row, positions], kept, folded))
    if merged:
        hidden_states = hidden_states.index_put((torch.cat(rows), torch.cat(columns)), torch.cat(merged))
    survivors = PackedRows.of(survives, num_left, stage.padding_side)
    return take_rows(hidden_states, survivors.index), survivors
