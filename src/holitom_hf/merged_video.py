"""A video after merging: which tokens there are, where they came from, and in which order they stand."""

import math
from dataclasses import dataclass
from enum import IntEnum

import torch


class TokenKind(IntEnum):
    """What an output token is."""

    STATIC = 0
    """Repeats over its segment; averaged over the frames, then clustered."""
    DYNAMIC = 1
    """Selected by attention, or the centre of a cluster of such tokens."""
    NEWLINE = 2
    """The model's newline embedding, after a row of the grid."""


@dataclass
class MergedVideo:
    """
    A video's tokens after stages 1 and 2.

    Attributes:
        embeddings: (N, D).
        segments: Half-open `(start, stop)` frame ranges.
        effective_ratio: Share that stage 2 kept of the tokens left by stage 1.
        frame: (N,) int64, the frame of each token; for a static one its segment's first.
        position: (N,) int64 in 0..T-1, its place in the frame's grid; a newline's is the last of its row.
        kind: (N,) int64, a [`TokenKind`].
        assignment: (F, T) int64, the output token that each input token was merged into; -1 where it was dropped.
    """

    embeddings: torch.Tensor
    segments: list[tuple[int, int]]
    effective_ratio: float
    frame: torch.Tensor
    position: torch.Tensor
    kind: torch.Tensor
    assignment: torch.Tensor

    @property
    def num_tokens(self) -> int:
        """Number of output tokens N."""
        return self.frame.shape[0]

    @property
    def num_input_tokens(self) -> int:
        """Number of input tokens F * T."""
        return self.assignment.numel()


@dataclass
class TokenGroup:
    """
    Output tokens of one sort. Where no newlines order them, they stand by line, then by position; in a grid with
    newlines by frame, then by place, which is the position unless said otherwise.
    """

    embeddings: torch.Tensor | None  # (n, D); None: as the features are at that frame and position
    frame: torch.Tensor  # (n,)
    position: torch.Tensor  # (n,)
    kind: TokenKind
    line: torch.Tensor  # (n,)
    place: torch.Tensor | None = None  # (n,)


def in_order(
    features: torch.Tensor,
    groups: list[TokenGroup],
    assigned: torch.Tensor,
    segments: list[tuple[int, int]],
    ratio: float,
    newline: torch.Tensor | None = None,
    newline_if_empty: bool = False,
) -> MergedVideo:
    """
    Puts tokens into the sequence's order.

    Args:
        features: (F, T, D).
        groups: The output tokens, sort by sort.
        assigned: (F, T) int64, the output token, counted through the groups, that each input token went into, or -1.
        segments: Frame ranges.
        ratio: What stage 2 kept.
        newline: (D,) put after the grid's rows; `None` for no such newlines.
        newline_if_empty: Whether rows without a token have one, too.
    """
    num_frames, tokens_per_frame = assigned.shape
    width = math.isqrt(tokens_per_frame)
    if newline is not None:
        has_newline = torch.full((num_frames, width), newline_if_empty, device=features.device)
        for group in groups:
            has_newline[group.frame, (group.position if group.place is None else group.place) // width] = True
        newline_frame, newline_row = has_newline.nonzero(as_tuple=True)
        last_in_row = (newline_row + 1) * width - 1
        newlines = newline.to(features).expand(len(newline_frame), -1)
        groups = [*groups, TokenGroup(newlines, newline_frame, last_in_row, TokenKind.NEWLINE, newline_frame)]
    frame = torch.cat([group.frame for group in groups])
    position = torch.cat([group.position for group in groups])
    kind = torch.cat([torch.full_like(group.frame, group.kind) for group in groups])
    if newline is not None:
        place = torch.cat([group.position if group.place is None else group.place for group in groups])
        key = 2 * (frame * tokens_per_frame + place) + (kind == TokenKind.NEWLINE)
    else:
        key = torch.cat([group.line for group in groups]) * tokens_per_frame + position

    order = key.argsort(stable=True)
    number = torch.full((len(order) + 1,), -1, device=order.device)  # the last one answers for dropped tokens, -1
    number[order] = torch.arange(len(order), device=order.device)
    # Every output is written once as a feature of the input, and again where it is none.
    embeddings = features.flatten(0, 1).index_select(0, (frame * tokens_per_frame + position)[order])
    first = 0
    for group in groups:
        if group.embeddings is not None:
            embeddings.index_copy_(0, number[first : first + len(group.frame)], group.embeddings)
        first += len(group.frame)
    return MergedVideo(embeddings, segments, ratio, frame[order], position[order], kind[order], number[assigned])


def take_tokens(features: torch.Tensor, chosen: torch.Tensor, ratio: float, newline: torch.Tensor | None = None):
    """
    The [`MergedVideo`] of a method that keeps some tokens as they are and drops the rest.

    Args:
        features: (F, T, D).
        chosen: (N,) int64 indices of the kept tokens among the F*T, ascending.
        ratio: Share that was to be kept.
        newline: As in `in_order`.
    """
    num_frames, tokens_per_frame, _ = features.shape
    frame, position = chosen // tokens_per_frame, chosen % tokens_per_frame
    group = TokenGroup(None, frame, position, TokenKind.DYNAMIC, frame)
    assigned = torch.full((num_frames * tokens_per_frame,), -1, device=features.device)
    assigned[chosen] = torch.arange(len(chosen), device=features.device)
    segments = [(f, f + 1) for f in range(num_frames)]
    return in_order(features, [group], assigned.view(num_frames, tokens_per_frame), segments, ratio, newline)
