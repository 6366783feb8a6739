"""Stage 3 over a batch: what the decoder needs to run it, or to go on after it."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..merging.inner import choose_survivors, fold_tokens, most_similar, num_inner_kept
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
        asked: What looks for the attention that counts, in place of the decoder's `received_attention`.
        num_past: Number of positions that the first layers already hold.
        has_gaps: Whether the position ids of this call are for the rotation alone: they have gaps, and an attention
            function that sees them would take one row for several packed ones.
        sizes: (B, P+N) float32, for how many uncompressed tokens each position of the first layers stands, or fewer
            columns if the others stand for one; `None` where all count alike.
        inner_sizes: (B, P'), the same for what the layers from k on already hold.
        unmerging: An [`Unmerging`], where tokens stand at several places; `position_ids` and masks are then of these.
        counts_removed: Whether kept tokens stand for those that stage 3 removes, too.
        skips: What this call's visual tokens leave out in some layers, a `SkippedWork`; `None`: nothing.
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
    sizes: torch.Tensor | None = None
    inner_sizes: torch.Tensor | None = None
    counts_removed: bool = False
    skips: Any = None
    unmerging: Any = None
    asked: Any = None


# As an argument of a decoder that is exported on its own.
torch.export.register_dataclass(InnerStage)


def merge_inside(
    hidden_states: torch.Tensor, importance: torch.Tensor, stage: InnerStage
) -> tuple[torch.Tensor, PackedRows, torch.Tensor | None]:
    """
    Removes a share of every video's tokens from a batch of hidden states and packs the rows anew.

    Args:
        hidden_states: (B, N, D).
        importance: (B, N).
        stage: Where the videos are and how many tokens go.

    Returns:
        (B, M, D), which of the N positions they are, and their sizes (B, M), `None` where all count alike.

    Source: section 3.3, for each video of each row as in [`merge_hidden_states`].
    """
    device = hidden_states.device
    survives = stage.mask.to(device, copy=True)
    num_left = list(stage.num_real)
    rows, columns, merged = [], [], []
    sizes = stage.sizes
    if sizes is not None:  # of this call's positions
        num_new = hidden_states.shape[1]
        sizes = F.pad(sizes.to(device), (0, stage.num_past + num_new - sizes.shape[1]), value=1.0)[:, -num_new:]
    elif stage.counts_removed:
        sizes = torch.ones(hidden_states.shape[:2], device=device)
    for row, videos in enumerate(stage.videos):
        for positions in videos:
            positions = positions.to(device)
            num_kept = num_inner_kept(len(positions), stage.merge_ratio)
            kept, folded = choose_survivors(importance[row, positions], num_kept)
            survives[row].index_fill_(0, positions[folded], False)
            num_left[row] -= len(folded)
            tokens = hidden_states[row, positions]
            goes_on = (stage.fold or stage.counts_removed) and len(folded) > 0
            target = most_similar(tokens, kept, folded) if goes_on else None
            if stage.fold:
                rows.append(torch.full_like(kept, row))
                columns.append(positions[kept])
                merged.append(tokens[kept] if target is None else fold_tokens(tokens, kept, folded, target))
            if stage.counts_removed and target is not None:
                sizes = sizes.index_put(
                    (torch.full_like(target, row), positions[kept][target]), sizes[row, positions[folded]], True
                )
    if merged:
        hidden_states = hidden_states.index_put((torch.cat(rows), torch.cat(columns)), torch.cat(merged))
    survivors = PackedRows.of(survives, num_left, stage.padding_side)
    if sizes is not None:
        sizes = sizes.gather(1, survivors.index)
    return take_rows(hidden_states, survivors.index), survivors, sizes
