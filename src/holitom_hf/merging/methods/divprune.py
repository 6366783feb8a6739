"""DivPrune: the tokens of the whole video whose smallest distance to each other is largest, chosen greedily."""

import torch
import torch.nn.functional as F

from ..apportionment import kept_tokens
from ..merged_video import MergedVideo, take_tokens
from ..spatial import masked_positions
from ..video_tokens import VideoTokens


# Similarities of all tokens with each other are computed in blocks of this size.
BLOCK_BYTES = 256 * 2**20


def merge_divprune(video: VideoTokens, config) -> MergedVideo:
    """
    Keeps exactly `round(F * T * R)` tokens, at least one, as they are. With d(i, j) = 1 - cosine similarity, over all
    tokens of the video: first the one whose nearest other is farthest, then always the one whose nearest chosen one
    is farthest.

    Args:
        video: Its tokens; nothing but their features matters.
        config: The settings; R is `retention_ratio`.

    Source: DivPrune (arXiv 2503.02175), `LLaVA/llava/model/llava_arch.py` of
    vbdi/divprune. What differs: no token is chosen twice where all distances are 0; memory does not grow with the
    square of the tokens, products with chosen ones are computed anew.
    """
    num_kept = kept_tokens(video, config)
    unit = F.normalize(video.features.detach().flatten(0, 1).float(), dim=-1)  # (N, D)
    index = nearest_distance(unit).argmax()[None]
    nearest = unit.new_full((len(unit),), torch.inf)  # to what is chosen; -1: is chosen
    for step in range(num_kept):
        if step:
            index = nearest.argmax()[None]
        nearest.index_fill_(0, index, -1.0)
        if step < num_kept - 1:
            distance = (1 - (unit @ unit[index].T)[:, 0]).clamp_min(0)
            nearest = torch.minimum(nearest, distance)
    return take_tokens(video, masked_positions((nearest < 0)[None], num_kept)[0], config.retention_ratio)


def nearest_distance(unit: torch.Tensor) -> torch.Tensor:
    """(N, D) of unit length -> (N,), the cosine distance of each to the nearest other; of a single one infinite."""
    at_once = max(1, BLOCK_BYTES // (4 * len(unit)))
    number = torch.arange(len(unit), device=unit.device)
    return torch.cat(
        [
            (1 - unit[some] @ unit.T).masked_fill(some[:, None] == number, torch.inf).amin(1)
            for some in number.split(at_once)
        ]
    )


def divprune_flops(video: VideoTokens, config) -> float:
    """Products of [`merge_divprune`]: all tokens with each other, and with every chosen one but the last."""
    num_tokens = video.num_frames * video.tokens_per_frame
    return 2.0 * num_tokens * video.features.shape[-1] * (num_tokens + kept_tokens(video, config) - 1)
