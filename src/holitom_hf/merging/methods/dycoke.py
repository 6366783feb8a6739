"""DyCoke's merging over time: in windows of frames, what repeats an earlier frame at the same place is left out."""

import torch
import torch.nn.functional as F

from ..apportionment import apportion, kept_tokens
from ..host_numbers import on_device
from ..merged_video import MergedVideo, take_tokens
from ..spatial import masked_positions, select_tokens
from ..video_tokens import VideoTokens


# Frames of a window, where the budget holds the first frame of each.
WINDOW = 4


def merge_dycoke(video: VideoTokens, config) -> MergedVideo:
    """
    Keeps exactly `round(F * T * R)` tokens, at least one, as they are, in ascending position.

    The first frame of a window of four is kept whole. The second and the third are compared with it and the fourth
    with the third, place by place; each keeps the tokens with the smallest cosine similarity.

    The paper's share k of tokens that these three lose follows from R = (1 + 3 (1 - k)) / 4 in whole windows; its
    0.7 is R = 47.5 %. With less than 25 % there is no such k: windows are then of 8, 16, ... frames, in which the
    frame at place o is compared with the one at o without its lowest binary digit, as it is in four. Where not even
    one frame fits, evenly spaced tokens of the first one are kept.

    Args:
        video: Its tokens; nothing but their features matters.
        config: The settings; R is `retention_ratio`.

    Source: DyCoke (arXiv 2411.15024), its token merging over time, `llava/model/llava_arch.py` of
    KD-TAO/DyCoke; the second stage, which prunes the cache while decoding, is not built. What differs: windows below
    25 %, which are ours; all windows are treated alike (the published loop leaves the third frame of the last window
    whole, and drops a last frame that has no second); kept tokens stand in their order.
    """
    num_frames, tokens_per_frame, device = video.num_frames, video.tokens_per_frame, video.features.device
    num_kept = kept_tokens(video, config)
    window = WINDOW
    while window < num_frames and -(-num_frames // window) * tokens_per_frame > num_kept:
        window *= 2
    num_first = -(-num_frames // window)
    if num_first * tokens_per_frame > num_kept:
        chosen = (2 * torch.arange(num_kept, device=device) + 1) * tokens_per_frame // (2 * num_kept)
        return take_tokens(video, chosen, config.retention_ratio)

    places = [frame % window for frame in range(num_frames)]
    earlier, is_later = on_device(
        [[f - o + (o & (o - 1)) if o else f for f, o in enumerate(places)], [o > 0 for o in places]], device
    )
    tokens = video.features.detach().float()
    similarity = F.cosine_similarity(tokens, tokens[earlier], dim=-1)  # (F, T)
    later = apportion(is_later, is_later * tokens_per_frame, num_kept - num_first * tokens_per_frame, tokens_per_frame)
    counts = torch.where(is_later > 0, later, tokens_per_frame)
    is_kept = select_tokens(-similarity, torch.ones_like(similarity, dtype=torch.bool), counts)
    return take_tokens(video, masked_positions(is_kept.view(1, -1), num_kept)[0], config.retention_ratio)
