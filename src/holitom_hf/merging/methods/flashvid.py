"""FlashVID: important and diverse tokens of every frame; what repeats through frames becomes a tree, then a mean."""

import math

import torch
import torch.nn.functional as F

from ..apportionment import apportion, evenly, kept_tokens
from ..density import density_peaks, join_peaks
from ..host_numbers import Steps, on_device
from ..spatial import masked_positions
from ..transitions import segment_numbers, transition_segments, weighted_sums
from ..video_tokens import VideoTokens


# As published: DySeg's least number of segments and similarity, alpha (the share of tokens that are selected), the
# similarity above which a token joins one of the frame before, and the neighbours that density looks at.
MIN_SEGMENTS = 8
TRANSITION = 0.9
SELECTED_SHARE = 0.7
REPEATS = 0.8
MOST_NEIGHBORS = 7


def merge_flashvid(video: VideoTokens, config) -> Steps:
    """
    Keeps exactly `round(F * T * R)` tokens, at least one.

    - Segments end where the means of adjacent frames have a cosine similarity below 0.9, at least 8 of them.
    - Selection (ADTS): 70 % of the tokens, the same in every frame. With d(i, j) = (1 - cosine similarity) * a_j * e_j
      in a frame, a_j its importance and e_j its product with the mean of the segment: first the token whose nearest
      other is farthest, then always the one whose nearest selected one is farthest; they stay as they are.
    - Trees (TSTM): each other token of a segment joins the most similar other one in the frame before if their cosine
      similarity is above 0.8, but not more of them than leave the budget; a tree becomes the mean of its tokens.
    - Trees are shared out among clusters (DPC-KNN, 7 neighbours), frame by frame of their roots: a segment has
      clusters for its length, a frame for its roots. A cluster is the mean of its trees, at the place of its centre.

    Args:
        video: Its tokens, with `importance`.
        config: The settings; R is `retention_ratio`. The paper keeps 1.25 R here and the share 0.3 of it from decoder
            layer 20 on: `retention_ratio=1.25 * R`, `inner_method="prune"`, `inner_merge_layer=20`,
            `inner_merge_ratio=0.7`.

    Source: FlashVID (arXiv 2602.08024), `flashvid/utils.py` and `flashvid/token_selection.py` (the
    selection "attn_div_v2" of its scripts) of Fanziyang-v/FlashVID, whose constants these are. What differs: budgets
    are met exactly (there they are rounded up for every frame); a tree is the mean of all of its tokens
    (the published loop divides by the number of a root's own children); in segments of one frame the selected
    tokens are no trees either; no token is selected twice; nothing is random.
    """
    num_frames, tokens_per_frame, device = video.num_frames, video.tokens_per_frame, video.features.device
    num_tokens, num_kept = num_frames * tokens_per_frame, kept_tokens(video, config)
    num_selected = math.ceil(num_kept * SELECTED_SHARE)
    num_clusters = num_kept - num_selected
    segments = yield from transition_segments(video.features, TRANSITION, MIN_SEGMENTS)
    tokens = video.features.detach().float()
    unit = F.normalize(tokens, dim=-1)

    counts = evenly(num_selected, num_frames, torch.device("cpu")).tolist()
    relevance = event_relevance(tokens, segments) * video.importance.detach().float()
    order = selection_order(1 - unit @ unit.mT, relevance, max(counts))
    has_turn = torch.arange(max(counts), device=device) < on_device(counts, device)[:, None]
    is_selected = torch.zeros_like(relevance, dtype=torch.bool).scatter_(1, order, has_turn)
    selected = masked_positions(is_selected.view(1, -1), num_selected)[0]

    # Trees: in each segment as many tokens may join others as leave enough roots.
    number = torch.arange(num_tokens, device=device)
    parent = number.view(num_frames, tokens_per_frame)
    room = [
        (stop - start) * tokens_per_frame - sum(counts[start:stop]) - -(-num_clusters * (stop - start) // num_frames)
        for start, stop in segments
    ]
    if num_clusters and num_frames > 1:
        similarity, before = repeated_tokens(unit, is_selected, segments)
        joins = (similarity > REPEATS) & among_first(similarity, segments, [max(0, each) for each in room])
        frame_before = torch.arange(num_frames, device=device)[:, None] - 1
        parent = torch.where(joins, before + tokens_per_frame * frame_before, parent)
    root = parent.flatten()
    for _ in range(max(num_frames - 1, 1).bit_length()):
        root = root[root]
    size = torch.zeros(num_tokens, device=device).index_add_(0, root, torch.ones(num_tokens, device=device))
    is_root = (root == number).view_as(is_selected) & ~is_selected

    weight = torch.ones(num_tokens, device=device)
    output = torch.zeros_like(number)
    output[selected] = torch.arange(num_selected, device=device)
    is_shown = is_selected.flatten()
    chosen = selected
    if num_clusters:
        means = tree_means(video.features.detach(), root, size)
        centers, home = cluster_trees(means, is_root, segments, num_clusters)
        output[centers] = num_selected + torch.arange(num_clusters, device=device)
        of_tree = home[root]  # (F * T,), the centre of each token's tree; -1 where its frame has none
        is_shown = is_shown | (of_tree >= 0)
        trees = torch.zeros(num_tokens, device=device).index_add_(
            0, of_tree.clamp_min(0), ((of_tree >= 0) & (root == number)).float()
        )
        center = torch.where(is_selected.flatten(), number, of_tree.clamp_min(0))
        output = output[center]
        weight = torch.where(is_selected.flatten(), 1.0, 1 / (trees[center] * size[root]).clamp_min(1))
        chosen = torch.cat([selected, centers])
    assigned = torch.where(is_shown, output, -1).view(num_frames, tokens_per_frame)
    contributions = (number, output, weight * is_shown)
    return weighted_sums(video, chosen, assigned, contributions, segments, config.retention_ratio)


def event_relevance(tokens: torch.Tensor, segments: list[tuple[int, int]]) -> torch.Tensor:
    """(F, T, D) -> (F, T), each token's product with the mean of all tokens of its segment."""
    segment = segment_numbers(segments, tokens.device)
    length = on_device([stop - start for start, stop in segments], tokens.device)
    means = tokens.new_zeros(len(segments), tokens.shape[-1]).index_add_(0, segment, tokens.mean(1)) / length[:, None]
    return (tokens * means[segment][:, None]).sum(-1)


@torch.no_grad()
def selection_order(distance: torch.Tensor, weight: torch.Tensor, num_selected: int) -> torch.Tensor:
    """
    Tokens by their turn in a greedy choice of the largest smallest distance.

    Args:
        distance: (F, T, T) of the tokens of a frame with each other.
        weight: (F, T), what distances to a token are multiplied with when it might be chosen.
        num_selected: M, how many turns there are.

    Returns:
        (F, M) int64.
    """
    weighted = distance * weight[:, None]  # (F, T, T), from each to those whose turn it might be
    number = torch.arange(distance.shape[1], device=distance.device)
    score = weighted.masked_fill(number[:, None] == number, torch.inf).amin(1)
    frame = torch.arange(len(distance), device=distance.device)
    order = []
    for step in range(num_selected):
        index = score.argmax(-1)
        order.append(index)
        nearest = weighted[frame, index]
        score = nearest if step == 0 else torch.minimum(score, nearest)
        score = score.scatter(1, torch.stack(order, 1), -torch.inf)
    return torch.stack(order, 1)


def repeated_tokens(
    unit: torch.Tensor, is_selected: torch.Tensor, segments: list[tuple[int, int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    What each token repeats of the frame before it in its segment, selected ones left out on both sides.

    Returns:
        (F, T) float32, the cosine similarity with the most similar one, -1 where there is none; (F, T) int64, its
        position.
    """
    num_frames, tokens_per_frame, _ = unit.shape
    is_first = on_device([int(any(f == start for start, _ in segments)) for f in range(num_frames)], unit.device) > 0
    similarity = (unit[1:] @ unit[:-1].mT).masked_fill(is_selected[:-1, None], -1.0)
    similarity = similarity.masked_fill((is_selected[1:] | is_first[1:, None])[..., None], -1.0)
    best = similarity.max(-1)
    none = unit.new_full((1, tokens_per_frame), -1.0)
    return torch.cat([none, best.values]), torch.cat([best.indices[:1] * 0, best.indices])


def among_first(scores: torch.Tensor, segments: list[tuple[int, int]], counts: list[int]) -> torch.Tensor:
    """(F, T) bool, whether a score is one of the `counts` largest of its segment; of equal ones the earlier."""
    num_frames, tokens_per_frame = scores.shape
    segment = segment_numbers(segments, scores.device).repeat_interleave(
        tokens_per_frame, output_size=num_frames * tokens_per_frame
    )
    order = scores.flatten().argsort(descending=True, stable=True)
    order = order[segment[order].argsort(stable=True)]  # segment by segment
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    start, count = on_device([[start for start, _ in segments], counts], scores.device)
    return (rank - start[segment] * tokens_per_frame < count[segment]).view_as(scores)


def tree_means(features: torch.Tensor, root: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """(F, T, D) features, (F * T,) root of each -> (F, T, D) float32, means of trees at their roots; 0 elsewhere."""
    end = size.long().cumsum(0)
    rows = root.argsort(stable=True)
    means = F.embedding_bag(rows, features.flatten(0, 1).float(), end - size.long(), mode="mean")
    return means.view(features.shape)


def cluster_trees(
    means: torch.Tensor, is_root: torch.Tensor, segments: list[tuple[int, int]], num_clusters: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Clusters the roots of every frame.

    Returns:
        (C,) int64, the centres among the F*T tokens, ascending; (F * T,) int64, the centre that each root belongs to,
        -1 where its frame has none and for what is no root.
    """
    num_frames, tokens_per_frame = is_root.shape
    segment = segment_numbers(segments, means.device)
    num_roots = is_root.sum(1)
    of_segment = torch.zeros(len(segments), device=means.device).index_add_(0, segment, num_roots.float())
    length = on_device([stop - start for start, stop in segments], means.device)
    share = num_roots * (length / of_segment.clamp_min(1))[segment]
    counts = apportion(share, num_roots, num_clusters, tokens_per_frame)  # (F,)

    distance, score = density_peaks(means, is_root, counts.clamp(1, MOST_NEIGHBORS)[:, None], MOST_NEIGHBORS)
    is_center, home = join_peaks(distance, score, counts)
    home = home + tokens_per_frame * torch.arange(num_frames, device=means.device)[:, None]
    home = torch.where(is_root & (counts > 0)[:, None], home, -1)
    return masked_positions(is_center.view(1, -1), num_clusters)[0], home.flatten()


def flashvid_flops(video: VideoTokens, config) -> float:
    """Products of [`merge_flashvid`]: the tokens of every frame with each other and those before, means of trees."""
    num_frames, tokens, dim = video.features.shape
    num_kept = kept_tokens(video, config)
    has_clusters = num_kept > math.ceil(num_kept * SELECTED_SHARE)
    return 2.0 * tokens**2 * dim * (num_frames + has_clusters * (2 * num_frames - 1))
