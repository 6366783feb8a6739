"""VidCom2: more tokens for frames that differ from the video, in each the tokens that differ most from its mean."""

import torch
import torch.nn.functional as F

from ..apportionment import apportion, kept_tokens
from ..merged_video import MergedVideo, take_tokens
from ..spatial import masked_positions, select_tokens
from ..video_tokens import VideoTokens


# Share of the channels that are looked at: those that vary least over the video.
CHANNEL_SHARE = 0.5
# The squared widths of the Gaussians whose sum is the likeness to a mean.
SQUARED_WIDTHS = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)
# The temperature at which frames compete for tokens.
TEMPERATURE = 0.01
# Smaller differences between frames' shares are none, so that rounding errors decide nothing.
STEP = 2.0**-16


def merge_vidcom2(video: VideoTokens, config) -> MergedVideo:
    """
    Keeps exactly `round(F * T * R)` tokens, at least one, as they are. With x the tokens of unit length in half of the
    channels:

    - likeness to a mean c: g(x, c) = sum over a in {1/8, 1/4, 1/2, 1, 2} of exp(-|x - c|^2 / (2 a));
    - a frame's share is R * T * (1 + p - mean(p)) with p = softmax(-(mean of g(x, video's mean)) / 0.01);
    - in a frame the tokens with the smallest g(x, video's mean) + g(x, frame's mean) are kept, in ascending position.

    Args:
        video: Its tokens; nothing but their features matters.
        config: The settings; R is `retention_ratio`.

    Source: VidCom2 (arXiv 2505.14454), `token_compressor/vidcom2/vidcom2.py` of
    xuyang-liu16/VidCom2, whose constants these are. What differs: arithmetic is float32; shares are rounded so that
    they sum up to the budget (there each on its own), with one token for each frame where there are enough; newlines
    of rows without a token go with them.
    """
    num_frames, tokens_per_frame = video.num_frames, video.tokens_per_frame
    tokens = video.features.detach().float()
    variance = tokens.flatten(0, 1).var(0, unbiased=False)  # (D,)
    channels = variance.argsort(stable=True)[: max(1, int(len(variance) * CHANNEL_SHARE))]
    unit = F.normalize(tokens[..., channels], dim=-1)
    of_frame = unit.mean(1, keepdim=True)  # (F, 1, C)
    like_video, like_frame = gaussian_likeness(unit, of_frame.mean(0, keepdim=True)), gaussian_likeness(unit, of_frame)

    advantage = F.softmax(-like_video.mean(1) / TEMPERATURE, dim=0)
    shares = ((1 + advantage - advantage.mean()) / STEP).round()
    num_kept = kept_tokens(video, config)
    counts = apportion(shares, tokens_per_frame, num_kept, tokens_per_frame, is_each_shown=num_kept >= num_frames)
    is_kept = select_tokens(-(like_video + like_frame), torch.ones_like(like_video, dtype=torch.bool), counts)
    return take_tokens(video, masked_positions(is_kept.view(1, -1), num_kept)[0], config.retention_ratio)


def gaussian_likeness(tokens: torch.Tensor, center: torch.Tensor) -> torch.Tensor:
    """(F, T, C) tokens and means that they are compared with -> (F, T), between 0 and the number of widths."""
    squared = (tokens - center).square().sum(-1)
    return sum(torch.exp(-squared / (2 * width)) for width in SQUARED_WIDTHS)
