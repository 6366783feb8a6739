"""Stage 3: merge visual tokens once more, between two layers of the decoder (HoliTom, section 3.3)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .packed_rows import PackedRows, take_rows


# Rows of the similarity matrix that exist at once.
ROWS_PER_CHUNK = 1024


def num_inner_kept(length: int, merge_ratio: float) -> int:
    """Number of `length` visual tokens that stage 3 keeps."""
    return round(length * (1 - merge_ratio))


def choose_survivors(importance: torch.Tensor, num_kept: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Splits tokens into the most important ones and the rest; of equally important ones the earlier comes first.

    Args:
        importance: (V,).
        num_kept: How many stay.

    Returns:
        `kept` (num_kept,) and `folded` (V - num_kept,) int64, both in ascending order.
    """
    order = importance.argsort(descending=True, stable=True)
    return order[:num_kept].sort().values, order[num_kept:].sort().values


def fold_tokens(tokens: torch.Tensor, kept: torch.Tensor, folded: torch.Tensor) -> torch.Tensor:
    """
    Folds every token that goes into the kept one most similar to it, `kept = (kept + other) / 2` one after another.

    The running average is a weighted sum whose weights follow from the order alone: with m tokens folded into one,
    the kept one weighs 2^-m and the j-th folded one (from 0) 2^-(m - j).

    Args:
        tokens: (V, D).
        kept: (K,) int64, indices of the tokens that stay, ascending.
        folded: (V-K,) int64, indices of the others, ascending.

    Returns:
        (K, D), in the dtype of `tokens`; arithmetic in float32.

    Source: section 3.3.
    """
    if len(folded) == 0 or len(kept) == 0:
        return tokens[kept]
    values = tokens.float()
    unit = F.normalize(values.detach(), dim=-1)
    unit_kept = unit[kept]
    target = torch.cat([(unit[rows] @ unit_kept.T).argmax(-1) for rows in folded.split(ROWS_PER_CHUNK)])  # (V-K,)
    # Bags of one kept token and those folded into it, in order: the place in its bag is a token's turn.
    bag = torch.cat([torch.arange(len(kept), device=tokens.device), target])
    by_bag = bag.argsort(stable=True)
    count = torch.zeros_like(kept).scatter_add_(0, bag, torch.ones_like(bag))
    first = count.cumsum(0) - count
    bag = bag[by_bag]
    turn = torch.arange(len(bag), device=tokens.device) - first[bag]
    weight = torch.exp2((turn.clamp_min(1) - count[bag]).float())
    rows = torch.cat([kept, folded])[by_bag]
    return F.embedding_bag(rows, values, first, mode="sum", per_sample_weights=weight).to(tokens.dtype)


def merge_hidden_states(
    hidden: torch.Tensor,
    importance: torch.Tensor,
    start: int,
    length: int,
    merge_ratio: float,
    fold: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Merges away a share of the visual tokens of one sample's hidden states.

    Args:
        hidden: (1, N, D) hidden states before a decoder layer.
        importance: (N,), the attention that the last real token pays to each position in the layer before.
        start: First visual position.
        length: Number of visual positions; the rest is text and is not touched.
        merge_ratio: Share r of the visual tokens to remove; `round(length * (1 - r))` stay.
        fold: Whether removed tokens are folded into the kept ones (HoliTom) or dropped (FastV).

    Returns:
        `hidden` (1, N', D) and `keep` (N',) int64, the indices of its positions among the N, ascending.

    Raises:
        ValueError: If the shapes don't fit or the visual positions don't lie within 0..N.

    Source: section 3.3; FastV, arXiv 2403.06764, for `fold=False`.
    """
    if hidden.ndim != 3 or hidden.shape[0] != 1 or importance.shape != hidden.shape[1:2]:
        raise ValueError(
            f"expected hidden (1, N, D) and importance (N,), got {tuple(hidden.shape)} and {tuple(importance.shape)}"
        )
    num_positions = hidden.shape[1]
    if not 0 <= start <= start + length <= num_positions:
        raise ValueError(f"visual positions {start}..{start + length} don't lie within the {num_positions} there are")
    visual = slice(start, start + length)
    kept, folded = choose_survivors(importance[visual], num_inner_kept(length, merge_ratio))
    tokens = hidden[0, visual]
    merged = fold_tokens(tokens, kept, folded) if fold else tokens[kept]
    positions = torch.arange(num_positions, device=hidden.device)
    keep = torch.cat([positions[:start], start + kept, positions[start + length :]])
    return torch.cat([hidden[:, :start], merged[None], hidden[:, start + length :]], dim=1), keep


@dataclass
class InnerStage:
    """
    What the decoder needs to run stage 3, or to go on after it.

    Attributes:
        layer: k, the first layer that sees fewer tokens.
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
    """

    layer: int
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


def merge_videos(
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
