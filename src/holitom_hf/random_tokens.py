"""Tokens drawn at random: the control that says what choosing them is worth."""

import torch

from .merged_video import MergedVideo, take_tokens


def merge_random_tokens(features, importance, config, newline=None, keys=None) -> MergedVideo:
    """
    Keeps `round(F * T * R)` tokens, at least one, drawn evenly from the whole video; the same ones in every call.

    Takes the arguments of `merge_video_tokens`; `importance` and `keys` are not needed.
    """
    num_tokens = features.shape[0] * features.shape[1]
    num_kept = max(1, round(num_tokens * config.retention_ratio))
    order = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(0))  # on the host: alike on all devices
    return take_tokens(features, order[:num_kept].sort().values.to(features.device), config.retention_ratio, newline)
