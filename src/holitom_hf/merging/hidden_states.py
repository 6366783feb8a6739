"""Stage 3 over the hidden states of one sample."""

import torch

from .inner import choose_survivors, fold_tokens, most_similar, num_inner_kept


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
