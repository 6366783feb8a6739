"""Means of tokens that are alike: what the vision tower made equal, and then whatever a threshold merges (DyMU)."""

import torch

from ..dynamic_matching import best_partners
from ..host_numbers import on_device
from ..merged_video import MergedVideo
from ..spatial import masked_positions
from ..transitions import weighted_sums
from ..video_tokens import VideoTokens


# Each merges as many tokens as the next, at most all of set A.
NUM_ROUNDS = 8


def merge_dymu_tokens(video: VideoTokens, config) -> MergedVideo:
    """
    Merges tokens within their frames until `round(F * T * R)` are left in the video, one in each frame at least: more
    where a frame's tokens are alike, as one threshold for all frames has it. An output is the mean of its tokens.

    1. Tokens that the tower made equal (`video.groups`, with `vision_method="dymu"`) become one. Where that leaves
       fewer than the budget, it is all.
    2. In eight rounds every other token finds the one most like it by keys (by features, where there are none), and
       those of all frames that are most alike become one, with their mean key. That is DyMU's finding of a threshold,
       with the video's frames as the batch and rounds for layers.

    Args:
        video: Its tokens.
        config: The settings; R is `retention_ratio`.

    Source: dynamic token merging of DyMU (arXiv 2504.17040, section 3.1; code MikeWangWZHL/dymu). There the decoder
    gets the tower's own rows, one for each group, and as many as the thresholds leave. Here tokens are pooled over two
    by two patches behind the tower, so that only those whose patches are all of one group are equal; the second step,
    which is ours, merges the others.
    """
    num_frames, tokens_per_frame, device = video.num_frames, video.tokens_per_frame, video.features.device
    total = num_frames * tokens_per_frame
    budget = max(1, round(total * config.retention_ratio))
    keys = video.features if video.keys is None else video.keys
    home = _merged_places(keys.detach().float(), video.groups, budget)  # (F, T)

    place = torch.arange(tokens_per_frame, device=device)
    is_output = home == place
    chosen = is_output.flatten().nonzero()[:, 0]
    first = torch.arange(num_frames, device=device)[:, None] * tokens_per_frame
    assigned = (is_output.flatten().cumsum(0) - 1)[home + first]
    inputs = torch.arange(total, device=device)
    weights = 1 / _counts(home).gather(1, home).flatten()
    contributions = (inputs, assigned.flatten(), weights)
    segments = [(f, f + 1) for f in range(num_frames)]
    return weighted_sums(video, chosen, assigned, contributions, segments, len(chosen) / total)


def _counts(home: torch.Tensor) -> torch.Tensor:
    """(F, T) float32, how many tokens of its frame are at each place."""
    return torch.zeros(home.shape, device=home.device).scatter_add_(
        1, home, torch.ones(home.shape, device=home.device)
    )


@torch.no_grad()
def _merged_places(keys: torch.Tensor, groups: torch.Tensor | None, budget: int) -> torch.Tensor:
    """(F, T) int64, for every token the place in its frame of the output that it is in. The host waits each round."""
    num_frames, tokens_per_frame, _ = keys.shape
    place = torch.arange(tokens_per_frame, device=keys.device).expand(num_frames, -1)
    home = place if groups is None else groups
    quota = None
    while True:
        is_output = home == place
        counts = is_output.sum(1).tolist()
        excess = sum(counts) - budget
        quota = -(-excess // NUM_ROUNDS) if quota is None else quota
        candidates = sum((count + 1) // 2 for count in counts if count > 1)
        num_merged = min(excess, quota, candidates)
        if num_merged <= 0:
            return home
        outputs = masked_positions(is_output, max(counts))  # (F, n)
        is_real = torch.arange(max(counts), device=keys.device) < on_device(counts, keys.device)[:, None]
        means = torch.zeros_like(keys).scatter_add_(1, home[..., None].expand_as(keys), keys)
        means = means / _counts(home).clamp_min(1)[..., None]
        scores, partner = best_partners(means.gather(1, outputs[..., None].expand(-1, -1, keys.shape[2])), is_real)
        most_alike = scores.flatten().argsort(descending=True, stable=True)[:num_merged]
        frame, source = most_alike // scores.shape[1], most_alike % scores.shape[1]
        moved = place.clone()
        moved[frame, outputs[frame, 2 * source]] = outputs[frame, 2 * partner[frame, source] + 1]
        home = moved.gather(1, home)
