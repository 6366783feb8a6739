"""Patches of a frame that are merged in pairs: bipartite soft matching (ToMe, arXiv 2210.09461)."""

import torch
import torch.nn.functional as F


def merges_by_layer(num_patches: int, num_layers: int, retention_ratio: float) -> list[int]:
    """
    How many patches of a frame are merged away in each layer: r, the same number but in the last of them, which
    reaches `retention_ratio`. A layer merges at most half of what goes into it, whatever is left then.

    Example: 36 patches, 4 layers, half of them left: [5, 5, 5, 3].
    """
    left = max(1, round(num_patches * retention_ratio))
    usual = -(-(num_patches - left) // num_layers)
    merges = []
    for _ in range(num_layers):
        merges.append(min(usual, num_patches - left, num_patches // 2))
        num_patches -= merges[-1]
    return merges


@torch.no_grad()
def match_patches(keys: torch.Tensor, num_merged: int) -> torch.Tensor:
    """
    Which patches become one. Every other patch is in set A and finds the one in set B that it is most like; the
    `num_merged` of A that are most like theirs are merged into them. The rest of A comes first then, B behind it.

    Args:
        keys: (F, n, K), the attention's keys averaged over heads.
        num_merged: r, at most n / 2.

    Returns:
        (F, n) int64, where every patch is among the n - r that are left.

    Source: ToMe, section 3.
    """
    unit = F.normalize(keys.float(), dim=-1)
    best = (unit[:, ::2] @ unit[:, 1::2].mT).max(-1)
    most_alike = best.values.argsort(dim=-1, descending=True, stable=True)[:, :num_merged]
    is_merged = torch.zeros_like(best.indices, dtype=torch.bool).scatter_(1, most_alike, True)
    num_unmerged = is_merged.shape[1] - num_merged
    moved = torch.empty(keys.shape[:2], dtype=torch.long, device=keys.device)
    moved[:, ::2] = torch.where(is_merged, num_unmerged + best.indices, (~is_merged).cumsum(1) - 1)
    moved[:, 1::2] = num_unmerged + torch.arange(keys.shape[1] // 2, device=keys.device)
    return moved


def merge_patches(
    states: torch.Tensor, sizes: torch.Tensor | None, moved: torch.Tensor, num_left: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Means of patches that become one, weighted by how many each stands for.

    Args:
        states: (F, n, D).
        sizes: (F, n) float32, how many patches each stands for; `None`: one.
        moved: (F, n) from [`match_patches`].
        num_left: Of a frame.

    Returns:
        (F, num_left, D), and for how many patches they stand, (F, num_left) float32.
    """
    if sizes is None:
        sizes = torch.ones(moved.shape, device=states.device)
    left = sizes.new_zeros(len(sizes), num_left).scatter_add(1, moved, sizes)
    weighted = states * sizes[..., None]
    total = weighted.new_zeros(*left.shape, states.shape[-1])
    total = total.scatter_add(1, moved[..., None].expand_as(weighted), weighted)
    return (total / left[..., None]).to(states.dtype), left


def first_places(slot: torch.Tensor, num_rows: int) -> torch.Tensor:
    """(F, P) bool, the first place of each of `num_rows` packed rows that `slot`, (F, P), has by place."""
    places = torch.arange(slot.numel(), device=slot.device)
    first = places.new_zeros(num_rows).scatter_reduce(0, slot.flatten(), places, "amin", include_self=False)
    return torch.zeros_like(places, dtype=torch.bool).index_fill_(0, first, True).view(slot.shape)
