"""Stage 3: merge visual tokens once more, between two layers of the decoder (HoliTom, section 3.3)."""

import torch
import torch.nn.functional as F

from .package import of_package


# What becomes of the tokens that stage 3 removes, folded into the kept ones (HoliTom) or dropped (FastV; PruneVid's
# second stage), by what finds the attention that counts: `None`: that of the prompt's last token.
INNER_METHODS = {
    "merge": None,
    "prune": None,
    "prune_by_question": of_package("models.question_attention", "question_attention"),
}
# In their place: what visual tokens leave out in some layers.
SKIP_FFN, SKIP_ATTENTION, FREEZE = SKIP_METHODS = ("skip_ffn", "skip_attention", "freeze")
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
