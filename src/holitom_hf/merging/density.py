"""Density peaks (DPC-KNN) of many sets of tokens, for methods that take the best ones as they are."""

import torch


@torch.no_grad()
def density_peaks(
    tokens: torch.Tensor, is_token: torch.Tensor, num_neighbors: torch.Tensor, most_neighbors: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    How well each token of several sets would do as the centre of a cluster: delta * density, as in
    [`cluster_tokens`], which chooses as many as it is told and joins the others to them.

    Args:
        tokens: (S, N, D) float32.
        is_token: (S, N) bool, which of them there are.
        num_neighbors: (S, 1) int64, k of each set: the nearest that density looks at, the token itself among them.
        most_neighbors: Upper bound of k.

    Returns:
        `distance` (S, N, N), Euclidean / sqrt(D), infinite to what is no token; `score` (S, N), -1 for it.

    Source: Du et al., 2016.
    """
    longest = tokens.shape[1]
    centered = tokens - tokens[:, :1]
    products = centered @ centered.mT
    products = products + products.mT  # symmetric to the last bit
    norms = products.diagonal(dim1=1, dim2=2) / 2
    distance = (norms[:, :, None] + norms[:, None] - products).clamp_min(0).sqrt() * tokens.shape[-1] ** -0.5
    distance = distance.masked_fill(torch.eye(longest, dtype=torch.bool, device=tokens.device), 0.0)
    widest = distance.masked_fill(~(is_token[:, None] & is_token[:, :, None]), 0.0).amax((1, 2))[:, None]
    distance = distance.masked_fill(~is_token[:, None], torch.inf)

    nearest = distance.topk(min(most_neighbors, longest), dim=-1, largest=False).values.square()  # (S, N, k)
    k = num_neighbors.clamp_max(most_neighbors)
    total = nearest.cumsum(-1).gather(-1, (k - 1)[:, None].expand(-1, longest, -1))[..., 0]
    density = torch.exp(-total / k).masked_fill(~is_token, -1.0)
    delta = distance.masked_fill(density[:, None] <= density[:, :, None], torch.inf).amin(-1)
    delta = torch.where(delta.isinf(), widest, delta)
    return distance, (delta * density).masked_fill(~is_token, -1.0)
