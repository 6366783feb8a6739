"""Stage 2: fewer tokens within a segment, by density peaks (static tokens) and by attention (dynamic tokens)."""

import math

import torch
import torch.nn.functional as F

from .host_numbers import on_device


def masked_positions(mask: torch.Tensor, count: int) -> torch.Tensor:
    """
    Column indices of the true entries of every row, in ascending order, without a device synchronisation.

    Args:
        mask: (S, T) bool.
        count: The largest number of true entries in a row, known to the caller.

    Returns:
        (S, count) int64; rows with fewer true entries go on with indices of false ones.
    """
    return torch.argsort(mask.logical_not().to(torch.int8), dim=-1, stable=True)[..., :count]


def select_tokens(importance: torch.Tensor, candidates: torch.Tensor, num_selected: torch.Tensor) -> torch.Tensor:
    """
    The most important candidates of every frame; of equally important ones the earlier.

    Args:
        importance: (F, T), what each token receives of the attention.
        candidates: (F, T) bool.
        num_selected: (F,) int64, at most the number of candidates of that frame.

    Returns:
        (F, T) bool.

    Source: section 3.2, attention-based selection of dynamic tokens.
    """
    scores = importance.float().masked_fill(~candidates, -math.inf)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order)
    rank.scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
    return rank < num_selected[:, None]


def mean_over_frames(features: torch.Tensor, rows: torch.Tensor, num_frames: torch.Tensor) -> torch.Tensor:
    """
    Averages tokens over the frames of their segment, reading every token once and gathering none.

    Args:
        features: (F, T, D).
        rows: (M,) int64 indices into the F*T tokens, the frames of one output after another.
        num_frames: (S,) int64, how many of `rows` belong to each of the S outputs; 0 where there is none.

    Returns:
        (S, D) in the dtype of `features`; zeros where there is none.
    """
    offsets = num_frames.cumsum(0) - num_frames
    return F.embedding_bag(rows, features.flatten(0, 1), offsets, mode="mean")


def cluster_tokens(
    tokens: torch.Tensor,
    num_tokens: list[int],
    num_clusters: list[int],
    num_neighbors: int,
    center_weight: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    DPC-KNN: density-peak clustering of several sets of tokens at once.

    The density of a token is exp(-mean squared distance to its k = min(num_neighbors, clusters) nearest, itself
    included); its delta the distance to the nearest strictly denser token (for the densest: the largest distance of
    the set). The tokens with the largest delta * density are the centres, every other one joins its nearest centre.

    Args:
        tokens: (S, N, D), set s in the first `num_tokens[s]` places.
        num_tokens: n of each set, 1 <= n <= N.
        num_clusters: m of each set, 1 <= m <= n.
        num_neighbors: Upper bound of k.
        center_weight: w in w * centre + (1 - w) * mean(members); a centre without members stays as it is.

    Returns:
        `merged` (S, M, D) with M the largest m, clusters in ascending position of their centres;
        `centers` (S, M) int64, the positions of the centres;
        `cluster` (S, N) int64, the cluster of every token. What lies beyond m or n is undefined.

    Source: section 3.2, spatial merging of static tokens; Du et al., 2016 (DPC-KNN).
    """
    longest = tokens.shape[1]
    most = max(num_clusters)
    device = tokens.device
    n, m = on_device([num_tokens, num_clusters], device)[..., None]  # (S, 1)
    place = torch.arange(longest, device=device)
    is_token = place < n  # (S, N)

    x = tokens.float()
    distance = _pairwise_distance(x, is_token)  # (S, N, N)

    k = m.clamp_max(num_neighbors)
    nearest = distance.masked_fill(~is_token[:, None, :], math.inf)
    nearest = nearest.topk(min(num_neighbors, longest), dim=-1, largest=False).values.square()  # (S, N, k)
    density = torch.exp(-nearest.cumsum(-1).gather(-1, (k - 1)[:, None].expand(-1, longest, -1))[..., 0] / k)  # (S, N)

    is_denser = (density[:, None, :] > density[:, :, None]) & is_token[:, None, :]
    delta = distance.masked_fill(~is_denser, math.inf).amin(-1)
    delta = torch.where(delta.isinf(), distance.amax((1, 2))[:, None], delta)  # (S, N)
    score = (delta * density).masked_fill(~is_token, -1.0)

    order = score.argsort(dim=-1, descending=True, stable=True)
    is_center = torch.zeros_like(is_token).scatter_(1, order, (place < m))
    centers = masked_positions(is_center, most)  # (S, M)
    to_center = distance.masked_fill(~is_center[:, None, :], math.inf)
    home = torch.where(is_center, place, to_center.argmin(-1))  # the centre that each token belongs to, by position
    cluster = (is_center.cumsum(-1) - 1).gather(1, home)  # (S, N)

    # One weighted sum per cluster, as a batched product: deterministic, and no scatter.
    is_member = is_token & ~is_center
    one_hot = cluster[:, None, :] == torch.arange(most, device=device)[:, None]  # (S, M, N)
    num_members = (one_hot & is_member[:, None, :]).sum(-1, keepdim=True)  # (S, M, 1)
    weight_of_center = torch.where(num_members > 0, center_weight, 1.0)
    weight_of_member = (1.0 - center_weight) / num_members.clamp_min(1)
    weights = torch.where(is_center[:, None, :], weight_of_center, weight_of_member)
    weights = weights * (one_hot & is_token[:, None, :])
    return torch.bmm(weights.to(x.dtype), x).to(tokens.dtype), centers, cluster


def _pairwise_distance(tokens: torch.Tensor, is_token: torch.Tensor) -> torch.Tensor:
    """(S, N, D) float32 -> (S, N, N) Euclidean distance / sqrt(D), exactly 0 on the diagonal and for padding."""
    # Distances don't change when the set is centred, and the cancellation in |a|^2 + |b|^2 - 2ab shrinks.
    centered = tokens - tokens[:, :1]
    products = torch.bmm(centered, centered.mT)
    # A product need not be symmetric to the last bit, but mutual nearest neighbours must come out equally dense.
    products = products + products.mT
    squared_norm = products.diagonal(dim1=1, dim2=2) / 2
    squared = squared_norm[:, None, :] + squared_norm[:, :, None] - products
    distance = squared.clamp_min_(0.0).sqrt_() * tokens.shape[-1] ** -0.5
    return distance.masked_fill(~(is_token[:, :, None] & is_token[:, None, :]), 0.0)
