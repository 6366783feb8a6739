"""How a budget of tokens is shared out, so that methods that weigh frames keep as many as any other method."""

import torch

from .host_numbers import on_device
from .video_tokens import VideoTokens


def kept_tokens(video: VideoTokens, config) -> int:
    """What `retention_ratio` leaves of a video: `round(F * T * R)` tokens, at least one."""
    return max(1, round(video.num_frames * video.tokens_per_frame * config.retention_ratio))


def apportion(
    weights: torch.Tensor,
    capacity: torch.Tensor | int,
    total: int,
    longest: int,
    is_each_shown: bool = False,
    preferred: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Shares `total` tokens out in proportion to weights: each share is rounded, with the one divisor that makes them sum
    up exactly (Webster's method). The device is not waited for.

    Args:
        weights: (F,), not negative; 0 comes last.
        capacity: (F,) or one number, the most that each can take; `total` is at most their sum.
        total: How many there are.
        longest: The largest capacity.
        is_each_shown: Whether each has one before any has two.
        preferred: (F,), what each may take before any takes more than that; `None`: all that it can.

    Returns:
        (F,) int64. Of equal claims the earlier one comes first.

    Example: weights of 1, 1 and 2, four tokens: [1, 1, 2].
    """
    turn = torch.arange(longest, device=weights.device)
    claim = (turn + 0.5) / weights.float().clamp_min(1e-20)[:, None]  # (F, N), the smaller the earlier
    if is_each_shown:
        claim[:, 0] = claim[:, 0] - claim[:, 0].max() - 1
    room = capacity if isinstance(capacity, int) else capacity[:, None]
    claim = claim.masked_fill(turn >= room, torch.inf)
    order = claim.flatten().argsort(stable=True)
    if preferred is not None:
        order = order[(turn >= preferred[:, None]).flatten()[order].int().argsort(stable=True)]
    first = order[:total] // longest
    return torch.zeros(len(weights), dtype=torch.long, device=weights.device).index_add_(
        0, first, torch.ones_like(first)
    )


def evenly(total: int, num_frames: int, device: torch.device) -> torch.Tensor:
    """(F,) int64, shares of `total` that differ by one at most, the larger ones spread out."""
    ends = [(frame + 1) * total // num_frames for frame in range(num_frames)]
    return on_device([end - start for start, end in zip([0, *ends], ends)], device)
