"""The tokens of every frame that are most unlike each other, each standing for what is most like it."""

import torch

from ..diversity import cosine_similarity, farthest_points
from ..host_numbers import Steps
from ..merged_video import take_tokens
from ..segmentation import repeats_first, segment_starts
from ..spatial import masked_positions
from ..video_tokens import VideoTokens


# How many times its even share of the tokens a frame may get.
LARGEST_SHARE = 2


def merge_farthest_points(video: VideoTokens, config) -> Steps:
    """
    Keeps exactly `round(F * T * R)` tokens, at least one, as they are.

    - With fewer than `min_frame_tokens` a frame, fewer frames are looked at, evenly spaced.
    - Segments are those of HoliTom's stage 1. What is like the same place of its segment's first frame (cosine
      similarity above `similarity_threshold`; 1: nothing is) is looked at there only.
    - In every frame farthest points among the rest, at least one. Half of the tokens is shared out evenly; the other
      half goes wherever something is farthest from all that its frame has, so that all frames are covered alike.

    A kept token counts for the tokens of its frame that are most like it, for what repeats them in its segment, and
    for the same places of the frames that are not looked at.

    Args:
        video: Its tokens, with `importance` where `importance_weight` is not 0.
        config: The settings.

    Source: greedy k-centre, as in Core-Set selection (arXiv 1708.00489) and DivPrune (arXiv 2503.02175), which choose
        over everything at once.
    """
    num_frames, tokens_per_frame, device = video.num_frames, video.tokens_per_frame, video.features.device
    num_kept, num_looked = token_budget(video, config)
    looked = (2 * torch.arange(num_looked, device=device) + 1) * num_frames // (2 * num_looked)  # (L,)
    features = video.features.detach() if num_looked == num_frames else video.features.detach()[looked]

    first = yield from segment_starts(features, config.similarity_threshold, config.max_segment_frames)  # (L,)
    repeats = repeats_first(features, first, config.similarity_threshold)  # (L, T)
    weight = None
    if config.importance_weight:
        importance = video.importance[looked].float()
        weight = (importance / importance.mean(1, keepdim=True)).pow(config.importance_weight)
    similarity = cosine_similarity(features.float())  # (L, T, T)
    most = min(tokens_per_frame, LARGEST_SHARE * -(-num_kept // num_looked))
    order, distance = farthest_points(similarity, ~repeats, most, weight)

    # Which of them are kept: everybody's share, then the farthest.
    num_even, number = num_kept // 2, torch.arange(num_looked, device=device)
    share = (number + 1) * num_even // num_looked - number * num_even // num_looked
    has_turn = (torch.arange(most, device=device) < share[:, None]) & (distance >= 0)
    by_turn = torch.where(has_turn, torch.inf, distance).flatten().argsort(descending=True, stable=True)
    is_kept = torch.zeros(num_looked * most, dtype=torch.bool, device=device).index_fill_(0, by_turn[:num_kept], True)
    is_kept = torch.zeros_like(repeats).scatter_(1, order, is_kept.view_as(order))
    chosen = masked_positions(is_kept.reshape(1, -1), num_kept)[0]  # (K,)

    # What each token counts with. A frame that kept nothing is seen as its segment's first.
    output = is_kept.flatten().cumsum(0).view_as(is_kept) - 1
    own = output.gather(1, similarity.masked_fill(~is_kept[:, None], -torch.inf).argmax(-1))
    looks_at_own = is_kept | (~repeats & is_kept.any(1, keepdim=True))
    counts_with = torch.where(looks_at_own, own, own[first])
    nearest = (torch.arange(num_frames, device=device)[:, None] - looked).abs().argmin(1)

    chosen = looked[chosen // tokens_per_frame] * tokens_per_frame + chosen % tokens_per_frame
    return take_tokens(video, chosen, config.retention_ratio, counts_with[nearest])


def token_budget(video: VideoTokens, config) -> tuple[int, int]:
    """How many tokens are kept, and how many frames are looked at."""
    num_frames, tokens_per_frame = video.num_frames, video.tokens_per_frame
    num_kept = max(1, round(num_frames * tokens_per_frame * config.retention_ratio))
    num_looked = max(1, num_kept // config.min_frame_tokens, -(-num_kept // tokens_per_frame))
    return num_kept, min(num_frames, num_looked)
