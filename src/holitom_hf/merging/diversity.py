"""Which tokens of a set are most unlike each other: greedy farthest points (k-centre, Gonzalez 1985)."""

import torch


def cosine_similarity(tokens: torch.Tensor) -> torch.Tensor:
    """(S, N, D) -> (S, N, N), of the tokens of each set with each other; the products hold the norms, too."""
    products = tokens @ tokens.mT
    norms = products.diagonal(dim1=1, dim2=2).sqrt().clamp_min(1e-8)
    return products.div_(norms[:, :, None]).div_(norms[:, None])


@torch.no_grad()
def farthest_points(
    similarity: torch.Tensor,
    candidates: torch.Tensor,
    num_chosen: int,
    weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Orders the tokens of several sets so that each comes as far from those before it as one can.

    The first is the candidate most like the mean of them; then always the one with the largest squared distance to
    the nearest chosen one, 2 - 2 * cosine similarity, times its weight. Equally far ones come in ascending position.
    One step for all sets at once; the device is never waited for.

    Args:
        similarity: (S, N, N) float32, cosine similarity of the tokens of each set.
        candidates: (S, N) bool. The others come after all of them.
        num_chosen: M <= N, how far the order is needed.
        weight: (S, N), what distances are multiplied with; `None`: 1.

    Returns:
        `order` (S, M) int64; `distance` (S, M) float32, the weighted squared distance that each had when its turn
        came: infinite for the first, -1 for those that are no candidates.
    """
    weighted = (2 - 2 * similarity).clamp_min_(0)  # (S, N, N), from each token to those whose turn it might be
    if weight is not None:
        weighted = weighted * weight.to(weighted)[:, None]
    is_typical = (similarity * candidates[:, None]).mean(-1) + 1  # not negative
    score = torch.where(candidates, is_typical, -1.0)
    each = torch.arange(len(similarity), device=similarity.device)
    order, distance, chosen = [], [], score.new_full((), -2.0)
    for step in range(num_chosen):
        far, index = score.max(-1)
        order.append(index)
        distance.append(far)
        if step == 0:
            score = torch.where(candidates, torch.inf, -1.0)
        # What is no candidate, or had its turn, keeps its negative score.
        score = torch.minimum(score, weighted[each, index]).index_put_((each, index), chosen)
    order, distance = torch.stack(order, 1), torch.stack(distance, 1)
    distance[:, 0] = torch.where(distance[:, 0] >= 0, torch.inf, -1.0)
    return order, distance
