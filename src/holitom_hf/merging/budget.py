"""A number of tokens that follows from sizes alone: the least important go, or the most important come back."""

from dataclasses import replace

import torch

from .host_numbers import Steps
from .merged_video import MergedVideo, TokenKind
from .outer import merge_steps
from .settings import MergingSettings
from .video_tokens import VideoTokens


# 2^32 divided by the golden ratio: multiples of it, modulo 2^32, are spread evenly however many are taken.
GOLDEN_STEP = 2654435769


def token_budget(config: MergingSettings, num_frames: int, tokens_per_frame: int) -> int:
    """
    How many tokens stages 1 and 2 leave of a video with `exact_budget`, newlines not counted.

    Args:
        config: The settings.
        num_frames: F.
        tokens_per_frame: T.

    Returns:
        B = round(F * T * R), at least 1; F * T where these stages do nothing.
    """
    num_tokens = num_frames * tokens_per_frame
    return max(1, round(num_tokens * config.retention_ratio)) if config.has_outer_stage else num_tokens


def newline_budget(budget: int, num_frames: int, rows_per_frame: int) -> int:
    """
    How many newlines `newline_position="row"` puts among B tokens with `exact_budget`: as many as rows can have one.

    Args:
        budget: B.
        num_frames: F.
        rows_per_frame: Rows of a frame's grid.
    """
    return min(budget, num_frames * rows_per_frame)


def merge_exactly(video: VideoTokens, config: MergingSettings) -> Steps:
    """What the settings' method leaves of a video, [`with_exact_budget`]."""
    free = config.overlaid({"exact_budget": False, "newline_position": "end", "proportional_attention": False})
    merged = yield from merge_steps(video, free)
    return with_exact_budget(merged, video, config)


def with_exact_budget(merged: MergedVideo, video: VideoTokens, config: MergingSettings) -> MergedVideo:
    """
    The same video with exactly B tokens, as [`token_budget`] says. The device is not waited for.

    - Too many: the least important outputs go, and what was merged into them is dropped with them.
    - Too few: of the inputs that were dropped the most important ones come back as they are, each among the tokens of
      its frame. Where all are back, some that were merged into others stand for themselves, too, spread evenly over
      the video; what they were merged into stays as it is.
    - Of equally important ones the earlier stays, or comes back.

    An output has the importance of the place it stands at. Methods that look at no importance have none to go by:
    places stay and come back that are spread evenly over the video.

    Args:
        merged: What a method left of the video, without newlines.
        video: What went in; with a `newline`, rows have theirs: all that hold a token, and the earliest others up to
            [`newline_budget`].
        config: The settings.
    """
    num_frames, tokens_per_frame = merged.assignment.shape
    budget = token_budget(config, num_frames, tokens_per_frame)
    if merged.num_tokens != budget:
        even = even_order(num_frames * tokens_per_frame, merged.frame.device)
        importance = video.importance.detach().flatten() if config.needs_importance else -even
        if merged.num_tokens > budget:
            merged = without_least(merged, importance, budget)
        else:
            merged = with_most(merged, video.features, importance, even, budget)
    return merged if video.newline is None else with_newlines(merged, video)


def even_order(num_places: int, device: torch.device) -> torch.Tensor:
    """(N,) int64, all different: places whose numbers are the smallest, however many, are spread evenly over all."""
    return torch.arange(num_places, device=device) * GOLDEN_STEP % 2**32


def without_least(merged: MergedVideo, importance: torch.Tensor, budget: int) -> MergedVideo:
    """The B most important of a video's N > B outputs, by (F * T,) `importance`."""
    chosen = importance[merged.place].argsort(descending=True, stable=True)[:budget].sort().values
    # The last number answers for dropped tokens, -1.
    number = torch.full((merged.num_tokens + 1,), -1, device=chosen.device)
    number[chosen] = torch.arange(budget, device=chosen.device)
    contributions = merged.contributions
    if contributions is not None:
        inputs, outputs, weights = contributions
        outputs = number[outputs]
        contributions = inputs, outputs.clamp_min(0), weights * (outputs >= 0)
    return replace(
        merged,
        embeddings=merged.embeddings[chosen],
        frame=merged.frame[chosen],
        position=merged.position[chosen],
        kind=merged.kind[chosen],
        assignment=number[merged.assignment],
        contributions=contributions,
        representative=None,
    )


def with_most(
    merged: MergedVideo, features: torch.Tensor, importance: torch.Tensor, even: torch.Tensor, budget: int
) -> MergedVideo:
    """A video's N < B outputs and B - N inputs: dropped ones by `importance`, others by `even`, both (F * T,)."""
    device, num_outputs, tokens_per_frame = features.device, merged.num_tokens, merged.assignment.shape[1]
    added = torch.arange(num_outputs, budget, device=device)
    assigned = merged.assignment.flatten()
    num_tokens = len(assigned)
    turn = torch.empty_like(assigned)
    turn[importance.argsort(descending=True, stable=True)] = torch.arange(num_tokens, device=device)
    turn = torch.where(assigned < 0, turn, even + num_tokens).index_fill_(0, merged.place, 2**33)  # these never
    back = turn.argsort()[: len(added)].sort().values

    inputs, outputs, weights = merged.contributions or (
        torch.arange(num_tokens, device=device),
        assigned,
        merged.weight.flatten(),
    )
    contributions = (
        torch.cat([inputs, back]),
        torch.cat([outputs.clamp_min(0), added]),
        torch.cat([weights * (outputs >= 0), weights.new_ones(len(added))]),
    )
    frame = torch.cat([merged.frame, back // tokens_per_frame])
    position = torch.cat([merged.position, back % tokens_per_frame])
    kind = torch.cat([merged.kind, torch.full_like(back, TokenKind.DYNAMIC)])
    joined = replace(
        merged,
        embeddings=torch.cat([merged.embeddings, features.flatten(0, 1)[back]]),
        frame=frame,
        position=position,
        kind=kind,
        assignment=assigned.index_put((back,), added).view_as(merged.assignment),
        contributions=contributions,
        representative=None,
    )
    # Frame by frame, static ones first, then by position. Outputs keep the order that the method has put them in.
    key = (2 * frame + (kind != TokenKind.STATIC)) * tokens_per_frame + position
    if num_outputs:
        key[:num_outputs] = key[:num_outputs].cummax(0).values
    return joined.in_order_of(key.argsort(stable=True))


def with_newlines(merged: MergedVideo, video: VideoTokens) -> MergedVideo:
    """Tokens in the order of their places, and newlines behind the rows that [`with_exact_budget`] says."""
    height, width = video.grid_for('newline_position="row"')
    num_frames, device = video.num_frames, merged.frame.device
    is_empty = torch.ones(num_frames * height, dtype=torch.bool, device=device)
    is_empty = is_empty.index_fill_(0, merged.place // width, False)
    rows = is_empty.int().argsort(stable=True)[: newline_budget(merged.num_tokens, num_frames, height)]
    joined = replace(
        merged,
        embeddings=torch.cat([merged.embeddings, video.newline.to(merged.embeddings).expand(len(rows), -1)]),
        frame=torch.cat([merged.frame, rows // height]),
        position=torch.cat([merged.position, (rows % height + 1) * width - 1]),
        kind=torch.cat([merged.kind, torch.full_like(rows, TokenKind.NEWLINE)]),
    )
    return joined.in_order_of((2 * joined.place + (joined.kind == TokenKind.NEWLINE)).argsort(stable=True))
