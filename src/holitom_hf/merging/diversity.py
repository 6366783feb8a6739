"""Which tokens of a set are most unlike each other: greedy farthest points (k-centre, Gonzalez 1985)."""

import torch


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
    weight = torch.ones_like(similarity[..., 0]) if weight is None else weight.to(similarity)
    score = (similarity * candidates[:, None]).mean(-1) + 1  # how like the mean of the candidates, not negative
    nearest = torch.full_like(score, torch.inf)
    is_left = torch.ones_like(candidates)
    order, distance = [], []
    for step in range(num_chosen):
        score = torch.where(candidates, score, -1.0).masked_fill(~is_left, -2.0)
        far, index = score.max(-1, keepdim=True)
        order.append(index)
        distance.append(far if step else torch.where(far >= 0, torch.inf, far))
        is_left = is_left.scatter(1, index, False)
        row = similarity.gather(1, index[..., None].expand(-1, -1, similarity.shape[-1]))[:, 0]
        nearest = torch.minimum(nearest, (2 - 2 * row).clamp_min(0))
        score = nearest * weight
    return torch.cat(order, 1), torch.cat(distance, 1)
