"""A video after merging: which tokens there are, where they came from, and in which order they stand."""

from dataclasses import dataclass, replace
from enum import IntEnum

import torch
import torch.nn.functional as F

from .package import of_package
from .video_tokens import VideoTokens


merged_table = of_package("merging.merged_table", "merged_table")


class TokenKind(IntEnum):
    """
    What an output token is.

    Attributes:
        STATIC: Repeats over its segment; averaged over the frames, then clustered.
        DYNAMIC: Selected by attention, or the centre of a cluster of such tokens.
        NEWLINE: The model's newline embedding, after a row of the grid.
    """

    STATIC = 0
    DYNAMIC = 1
    NEWLINE = 2


@dataclass
class MergedVideo:
    """
    A video's tokens after stages 1 and 2.

    A merge is a linear map: with [`apply`] the same one shortens any other map of the same tokens.

    Attributes:
        embeddings: (N, D).
        segments: Half-open `(start, stop)` frame ranges.
        effective_ratio: Share that stage 2 kept of the tokens left by stage 1.
        frame: (N,) int64, the frame of each token; for a static one its segment's first.
        position: (N,) int64 in 0..T-1, its place in the frame's grid; a newline's is the last of its row.
        kind: (N,) int64, a [`TokenKind`].
        assignment: (F, T) int64, the output token that each input token was merged into; -1 where it was dropped.
        shares: An output is the first share of the mean of the inputs at its own place, and the second of the mean
            of all others that were merged into it; the first alone counts as 1 where there are no others.
        contributions: Where inputs went into several outputs: the input tokens (M,) among the F*T, the outputs (M,)
            they went into, and their weights (M,), in place of what `assignment` and `shares` say.
        representative: (F, T) int64, the output that each input token counts with: the one it was merged into, or
            where it was dropped the one most like it; `None` where nobody asked.
    """

    embeddings: torch.Tensor
    segments: list[tuple[int, int]]
    effective_ratio: float
    frame: torch.Tensor
    position: torch.Tensor
    kind: torch.Tensor
    assignment: torch.Tensor
    shares: tuple[float, float] = (1.0, 1.0)
    contributions: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    representative: torch.Tensor | None = None

    def __repr__(self) -> str:
        num_frames, tokens_per_frame = self.assignment.shape
        kinds = self.kind.tolist()
        counts = (f"{kinds.count(kind)} {kind.name.lower()}" for kind in TokenKind if kind in kinds)
        segments = f"{len(self.segments)} segment" + "s" * (len(self.segments) != 1)
        return (
            f"MergedVideo({num_frames} frames of {tokens_per_frame} tokens in {segments} -> "
            f"{self.num_tokens} tokens: {', '.join(counts)})"
        )

    def _repr_html_(self) -> str | None:
        """For notebooks: segment by segment, how many tokens there were and what became of them."""
        try:
            return merged_table(self)
        except ImportError:  # a checkpoint's own code is without: notebooks show what `repr` says
            return None

    @property
    def num_tokens(self) -> int:
        """Number of output tokens N."""
        return self.frame.shape[0]

    @property
    def num_input_tokens(self) -> int:
        """Number of input tokens F * T."""
        return self.assignment.numel()

    @property
    def place(self) -> torch.Tensor:
        """(N,) int64, the index among the F*T input tokens of the frame and position that each output stands for."""
        return self.frame * self.assignment.shape[1] + self.position

    @property
    def sizes(self) -> torch.Tensor:
        """
        (N,) float32, for how many of the uncompressed tokens each output stands; 1 for a newline.

        Raises:
            ValueError: Without `representative`.
        """
        if self.representative is None:
            raise ValueError(
                "what dropped tokens count with was not asked for: merge with proportional_attention=True"
            )
        sizes = (self.kind == TokenKind.NEWLINE).float()
        if self.num_tokens == 0:
            return sizes
        return sizes.index_add_(0, self.representative.flatten(), sizes.new_ones(self.num_input_tokens))

    @property
    def weight(self) -> torch.Tensor:
        """(F, T) float32, with which each input token went into the output that `assignment` names; 0 if dropped."""
        if self.contributions is not None:
            inputs, outputs, weights = self.contributions
            is_named = outputs == self.assignment.flatten()[inputs]
            weight = weights.new_zeros(self.num_input_tokens).index_add_(0, inputs, weights * is_named)
            return weight.view_as(self.assignment)
        tokens_per_frame = self.assignment.shape[1]
        if not self.num_tokens:
            return self.assignment * 0.0
        is_kept = self.assignment >= 0
        output = self.assignment.clamp_min(0)
        is_own = is_kept & (self.position[output] == torch.arange(tokens_per_frame, device=output.device))
        is_other = is_kept & ~is_own
        own, other = self.shares
        num_own, num_others = (
            torch.zeros(self.num_tokens, device=output.device).index_add_(
                0, output.flatten(), chosen.flatten().float()
            )
            for chosen in (is_own, is_other)
        )
        weight_of_own = torch.where(num_others > 0, own, 1.0) / num_own
        weight_of_other = other / num_others
        return torch.where(is_own, weight_of_own[output], 0) + torch.where(is_other, weight_of_other[output], 0)

    def apply(self, features: torch.Tensor, newline: torch.Tensor | None = None) -> torch.Tensor:
        """
        The same merge of another feature map: one weighted sum.

        Args:
            features: (F, T, E), per input token.
            newline: (E,), what newlines are in this map; zeros by default.

        Returns:
            (N, E) in the dtype of `features`; arithmetic in float32.

        Raises:
            ValueError: If `features` has not the F frames and T tokens of this merge.
        """
        if features.shape[:2] != self.assignment.shape:
            raise ValueError(
                f"features must have shape ({', '.join(map(str, self.assignment.shape))}, dim) as the merged video, "
                f"got {tuple(features.shape)}"
            )
        if self.contributions is None:
            inputs, outputs = torch.arange(self.num_input_tokens, device=features.device), self.assignment.flatten()
            weights = self.weight.flatten()
        else:
            inputs, outputs, weights = self.contributions
        outputs = torch.where(outputs >= 0, outputs, self.num_tokens)  # what was dropped goes into a bag of its own
        by_output = outputs.argsort(stable=True)
        count = torch.zeros(self.num_tokens + 1, dtype=torch.long, device=outputs.device)
        count.index_add_(0, outputs, torch.ones_like(outputs))
        merged = F.embedding_bag(
            inputs[by_output],
            features.flatten(0, 1).float(),
            count.cumsum(0) - count,
            mode="sum",
            per_sample_weights=weights.float()[by_output],
        )[:-1].to(features.dtype)
        if newline is not None:
            merged = torch.where((self.kind == TokenKind.NEWLINE)[:, None], newline.to(merged), merged)
        return merged

    def in_order_of(self, order: torch.Tensor) -> "MergedVideo":
        """The same tokens in another order: `order` (N,) int64 names the token that comes first, second, ..."""
        if len(order) == 0:
            return self
        number = torch.empty_like(order)
        number[order] = torch.arange(len(order), device=order.device)
        contributions = self.contributions
        if contributions is not None:
            contributions = (contributions[0], number[contributions[1]], contributions[2])
        return replace(
            self,
            embeddings=self.embeddings[order],
            frame=self.frame[order],
            position=self.position[order],
            kind=self.kind[order],
            assignment=torch.where(self.assignment >= 0, number[self.assignment.clamp_min(0)], -1),
            contributions=contributions,
            representative=None if self.representative is None else number[self.representative],
        )


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
    video: VideoTokens,
    groups: list[TokenGroup],
    assigned: torch.Tensor,
    segments: list[tuple[int, int]],
    ratio: float,
    newline_if_empty: bool = False,
    shares: tuple[float, float] = (1.0, 1.0),
    contributions: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    representative: torch.Tensor | None = None,
) -> MergedVideo:
    """
    Puts tokens into the sequence's order.

    Args:
        video: What was merged; its `newline` is put after the grid's rows, `None` for no such newlines.
        groups: The output tokens, sort by sort.
        assigned: (F, T) int64, the output token, counted through the groups, that each input token went into, or -1.
        segments: Frame ranges.
        ratio: What stage 2 kept.
        newline_if_empty: Whether rows without a token have one, too.
        shares: As in [`MergedVideo`].
        contributions, representative: As in [`MergedVideo`], outputs counted through the groups.
    """
    num_frames, tokens_per_frame = assigned.shape
    features, newline = video.features, video.newline
    if newline is not None:
        height, width = video.grid_for('newline_position="row"')
        has_newline = torch.full((num_frames, height), newline_if_empty, device=features.device)
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
    if contributions is not None:
        contributions = (contributions[0], number[contributions[1]], contributions[2])
    return MergedVideo(
        embeddings,
        segments,
        ratio,
        frame[order],
        position[order],
        kind[order],
        number[assigned],
        shares,
        contributions,
        None if representative is None else number[representative],
    )


def take_tokens(
    video: VideoTokens, chosen: torch.Tensor, ratio: float, representative: torch.Tensor | None = None
) -> MergedVideo:
    """
    The [`MergedVideo`] of a method that keeps some tokens as they are and drops the rest.

    Args:
        video: What they are taken from; its `newline` as in [`in_order`].
        chosen: (N,) int64 indices of the kept tokens among the F*T, ascending.
        ratio: Share that was to be kept.
        representative: (F, T) int64, which of the N each token counts with, where that is known.
    """
    num_frames, tokens_per_frame, device = video.num_frames, video.tokens_per_frame, chosen.device
    frame, position = chosen // tokens_per_frame, chosen % tokens_per_frame
    group = TokenGroup(None, frame, position, TokenKind.DYNAMIC, frame)
    assigned = torch.full((num_frames * tokens_per_frame,), -1, device=device)
    assigned[chosen] = torch.arange(len(chosen), device=device)
    segments = [(f, f + 1) for f in range(num_frames)]
    assigned = assigned.view(num_frames, tokens_per_frame)
    return in_order(video, [group], assigned, segments, ratio, representative=representative)
