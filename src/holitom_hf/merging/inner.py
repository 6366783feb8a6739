"""Stage 3: merge visual tokens once more, between two layers of the decoder (HoliTom, section 3.3)."""

import torch
import torch.nn.functional as F


# Drops what the question's tokens do not attend to (PruneVid, its second stage), not the last token alone.
BY_QUESTION = "prune_by_question"
# What becomes of the tokens that stage 3 removes: folded into the kept ones (HoliTom), or dropped (FastV).
INNER_METHODS = ("merge", "prune", BY_QUESTION)
# Rows of the similarity matrix that exist at once.
ROWS_PER_CHUNK = 1024


def num_inner_kept(length: int, merge_ratio: float) -> int:
    """
    Number of `length` visual tokens that stage 3 keeps. It is one at least; the published code, which would keep none
    then, fails.
    """
    return min(length, max(1, round(length * (1 - merge_ratio))))


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


def most_similar(tokens: torch.Tensor, kept: torch.Tensor, folded: torch.Tensor) -> torch.Tensor:
    """
    The kept token that each of the others is most like (cosine similarity).

    Args:
        tokens: (V, D).
        kept: (K,) int64, indices of the tokens that stay, K >= 1.
        folded: (V-K,) int64, indices of the others.

    Returns:
        (V-K,) int64 in 0..K-1.
    """
    unit = F.normalize(tokens.detach().float(), dim=-1)
    unit_kept = unit[kept]
    return torch.cat([(unit[rows] @ unit_kept.T).argmax(-1) for rows in folded.split(ROWS_PER_CHUNK)])


def fold_tokens(tokens: torch.Tensor, kept: torch.Tensor, folded: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """
    Folds every token that goes into the kept one most similar to it, `kept = (kept + other) / 2` one after another.

    The running average is a weighted sum whose weights follow from the order alone: with m tokens folded into one,
    the kept one weighs 2^-m and the j-th folded one (from 0) 2^-(m - j).

    Args:
        tokens: (V, D).
        kept: (K,) int64, indices of the tokens that stay, ascending.
        folded: (V-K,) int64, indices of the others, ascending.
        target: (V-K,) int64 in 0..K-1, the kept token that each of them goes into, from [`most_similar`].

    Returns:
        (K, D), in the dtype of `tokens`; arithmetic in float32.

    Source: section 3.3.
    """
    # Bags of one kept token and those folded into it, in order: the place in its bag is a token's turn.
    bag = torch.cat([torch.arange(len(kept), device=tokens.device), target])
    by_bag = bag.argsort(stable=True)
    count = torch.zeros_like(kept).scatter_add_(0, bag, torch.ones_like(bag))
    first = count.cumsum(0) - count
    bag = bag[by_bag]
    turn = torch.arange(len(bag), device=tokens.device) - first[bag]
    weight = torch.exp2((turn.clamp_min(1) - count[bag]).float())
    rows = torch.cat([kept, folded])[by_bag]
    return F.embedding_bag(rows, tokens.float(), first, mode="sum", per_sample_weights=weight).to(tokens.dtype)


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
        merge_ratio: Share r of the visual tokens to remove; `round(length * (1 - r))` stay, at least one.
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
    merged = tokens[kept]
    if fold and len(folded):
        merged = fold_tokens(tokens, kept, folded, most_similar(tokens, kept, folded))
    positions = torch.arange(num_positions, device=hidden.device)
    keep = torch.cat([positions[:start], start + kept, positions[start + length :]])
    return torch.cat([hidden[:, :start], merged[None], hidden[:, start + length :]], dim=1), keep
