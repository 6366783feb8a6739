"""Which pooled tokens of a frame are equal, since all their patches became one in the vision tower."""

from collections.abc import Callable

import torch


def token_groups(apply_pooling: Callable[[torch.Tensor], torch.Tensor], groups: torch.Tensor) -> torch.Tensor:
    """
    Tokens whose patches are all in one group, which makes their features equal, whatever the pooling's weights are.

    Args:
        apply_pooling: (f, P, D) -> (f, T, D), the model's own.
        groups: (F, P) int64, the group of every patch in its frame.

    Returns:
        (F, T) int64, for every token the first one of its frame that is equal to it: itself where its patches are of
        several groups.
    """
    num_frames, num_patches = groups.shape
    reach = apply_pooling(torch.eye(num_patches, device=groups.device)[None])[0]  # (T, P)
    patches = reach.topk(int((reach > 0).sum(1).max()), dim=1)
    patches = torch.where(patches.values > 0, patches.indices, patches.indices[:, :1])  # (T, K)
    of_token = groups[:, patches]  # (F, T, K)
    group, is_pure = of_token[..., 0], (of_token == of_token[..., :1]).all(-1)
    token = torch.arange(len(patches), device=groups.device).expand(num_frames, -1)
    first = groups.new_full((num_frames, num_patches), len(patches))
    first = first.scatter_reduce(1, group, torch.where(is_pure, token, len(patches)), "amin")
    return torch.where(is_pure, first.gather(1, group), token)
