"""Density peaks (DPC-KNN) of many sets of tokens: which tokens are centres, and which centre each other one joins."""

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
    distance = token_distances(tokens).masked_fill(~is_token[:, None], torch.inf)
    return distance, peak_scores(distance, is_token, num_neighbors, most_neighbors)


def token_distances(tokens: torch.Tensor) -> torch.Tensor:
    """(S, N, D) float32 -> (S, N, N), Euclidean / sqrt(D), exactly 0 on the diagonal."""
    centered = tokens - tokens[:, :1]
    products = centered @ centered.mT
    products = products + products.mT  # symmetric to the last bit
    norms = products.diagonal(dim1=1, dim2=2) / 2
    distance = (norms[:, :, None] + norms[:, None] - products).clamp_min(0).sqrt() * tokens.shape[-1] ** -0.5
    return distance.masked_fill(torch.eye(tokens.shape[1], dtype=torch.bool, device=tokens.device), 0.0)


def peak_scores(
    distance: torch.Tensor, is_token: torch.Tensor, num_neighbors: torch.Tensor, most_neighbors: int
) -> torch.Tensor:
    """(S, N), the `score` of [`density_peaks`] from its `distance`."""
    widest = distance.masked_fill(~(is_token[:, None] & is_token[:, :, None]), 0.0).amax((1, 2))[:, None]
    longest = distance.shape[-1]
    nearest = distance.topk(min(most_neighbors, longest), dim=-1, largest=False).values.square()  # (S, N, k)
    k = num_neighbors.clamp_max(most_neighbors)
    total = nearest.cumsum(-1).gather(-1, (k - 1)[:, None].expand(-1, longest, -1))[..., 0]
    density = torch.exp(-total / k).masked_fill(~is_token, -1.0)
    delta = distance.masked_fill(density[:, None] <= density[:, :, None], torch.inf).amin(-1)
    delta = torch.where(delta.isinf(), widest, delta)
    return (delta * density).masked_fill(~is_token, -1.0)


def join_peaks(
    distance: torch.Tensor, score: torch.Tensor, num_centers: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Takes the tokens with the largest scores as centres; every other one joins the nearest.

    Args:
        distance, score: As from [`density_peaks`].
        num_centers: (S,) int64, of each set, at most its tokens.

    Returns:
        (S, N) bool, the centres; (S, N) int64, the centre that each token joins, itself for a centre. Of equal scores
        or distances the earlier. What is no token, or is in a set without a centre, joins something undefined.
    """
    place = torch.arange(score.shape[1], device=score.device)
    order = score.argsort(dim=1, descending=True, stable=True)
    is_center = torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, place < num_centers[:, None])
    home = distance.masked_fill(~is_center[:, None], torch.inf).argmin(-1)
    return is_center, torch.where(is_center, place, home)
