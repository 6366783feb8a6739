"""
Static reuse in the vision towers of the Qwen-VL families: only the patches of a video that change go through the later
blocks. (Ours, after HoliTom's stage 1; section 3.1 has the segments.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import torch
from torch import nn

from ...merging.patches import PatchPiece, PatchPlan, plan_patches
from ...merging.settings import MergingSettings
from ..vision import chunks_on_device
from ..vision_importance import received_attention
from .frame_layout import FrameLayout
from .packed_blocks import AttentionGroups, packed_block, rotated_heads
from .vision import QwenVideoFeatures


def check_reuse(config, settings: MergingSettings) -> None:
    """
    Raises a `ValueError` if a tower can't leave out what settings with a `vision_reuse_layer` say.

    Args:
        config: Of a Qwen-VL backbone.
        settings: [`HoliTomConfig`].
    """
    config.check_settings(settings)
    title, depth, start = config.backbone.title, config.vision_config.depth, settings.vision_reuse_layer
    if start >= depth:
        raise ValueError(
            f"vision_reuse_layer is {start}, but the vision tower of {title} has {depth} layers: choose 1 to "
            f"{depth - 1}, or None to compute all patches"
        )


def encode_changes(
    model: nn.Module,
    pixels: torch.Tensor,
    grids: list[tuple[int, int, int]],
    settings: MergingSettings,
    frames_at_once: int,
    output_hidden_states: bool | int | list[int] | None = None,
    return_vision_states: bool = True,
    output_attentions: bool | None = None,
    **kwargs,
) -> Iterator[QwenVideoFeatures]:
    """
    What a tower makes of videos, one after the other, whose repeating patches are computed once per segment.

    After `vision_reuse_layer` blocks the plan is made; from there on a patch that repeats has the row of its segment's
    first frame, as key and value for the others, and at the end. A token is computed if one of its patches is.

    Args:
        model: Of a Qwen-VL backbone.
        pixels: (P, C) flat patches of all videos.
        grids: (T, h, w) of every video.
        settings: Which layer, and what repeats.
        frames_at_once: So many temporal patches, or as many patches as they have, go through a block at once.
        output_hidden_states, return_vision_states, output_attentions: As in `get_video_features`.
        kwargs: Not looked at.

    Returns:
        For each video its fields, without a list around those that are per video.

    Raises:
        ValueError: As [`check_reuse`], and if attentions are asked for.
    """
    check_reuse(model.config, settings)
    if output_attentions:
        raise ValueError("a tower that leaves patches out has no attentions to return: vision_reuse_layer is set")
    tower, depth = model.visual, len(model.visual.blocks)
    shown = shown_states(output_hidden_states, depth) if return_vision_states else set()
    mergers = deepstack_mergers(tower)
    wanted = {depth, *mergers, *shown} | ({depth - 1} if settings.needs_importance else set())

    sizes = [[min(frames_at_once, t - start) * h * w for start in range(0, t, frames_at_once)] for t, h, w in grids]
    chunks = chunks_on_device(pixels, [size for of_video in sizes for size in of_video], tower.device)
    for grid, of_video in zip(grids, sizes):
        video = packed_video(tower, islice(chunks, len(of_video)), grid[1:], settings, wanted, frames_at_once)
        importance, keys = video.importance(depth - 1, tower.blocks[-1]) if settings.needs_importance else (None, None)
        states = [video.frames(index) if index in shown else None for index in range(depth + 1)]
        last = video.frames(depth) if return_vision_states and states[depth] is None else states[depth]
        yield QwenVideoFeatures(
            last_hidden_state=last,
            hidden_states=tuple(states) if shown else None,
            pooler_output=[video.merged(depth, tower.merger)],
            deepstack_features=[[video.merged(index, merger)] for index, merger in mergers.items()],
            importance=importance,
            attention_keys=keys,
            computed_patches=video.layout.patches_row_by_row(video.plan.is_computed),
            rows_by_layer=video.plan.rows_by_layer,
        )


def shown_states(output_hidden_states: bool | int | list[int] | None, depth: int) -> set[int]:
    """The hidden states that are asked for, counted from the front, of a tower of `depth` blocks."""
    if output_hidden_states is True:
        return {*range(depth + 1)}
    asked = output_hidden_states or ()
    return {index % (depth + 1) for index in ([asked] if isinstance(asked, int) else asked)}


def deepstack_mergers(tower: nn.Module) -> dict[int, nn.Module]:
    """A tower's DeepStack mergers, by the hidden state that each takes."""
    blocks = getattr(tower, "deepstack_visual_indexes", None) or ()
    return dict(sorted((block + 1, tower.deepstack_merger_list[number]) for number, block in enumerate(blocks)))


def packed_video(
    tower: nn.Module,
    chunks: Iterable[torch.Tensor],
    size: tuple[int, int],
    settings: MergingSettings,
    wanted: set[int],
    frames_at_once: int,
) -> PackedVideo:
    """
    A video after all blocks of a tower.

    Args:
        tower: Of Qwen2.5-VL, Qwen3-VL or a newer one.
        chunks: (f*P, C) flat patches, together those of all frames.
        size: Of frames, in patches.
        settings, frames_at_once: As in [`encode_changes`].
        wanted: Indices of hidden states.
    """
    start = settings.vision_reuse_layer
    layout, dense = first_states(tower, chunks, size, start, wanted)
    num_frames = len(dense[start])
    plan = plan_patches(dense[start], [num_frames], settings)
    plan.rows_by_layer = torch.from_numpy(plan.num_rows).repeat(len(tower.blocks), 1)
    plan.rows_by_layer[:start] = plan.slot.shape[1]
    rows = {index: plan.gather(dense.pop(index)) for index in list(dense)}
    angles = tuple(plan.gather(values.expand(num_frames, -1, -1)) for values in layout.angles)
    pieces = [PackedPiece(piece, layout, angles) for piece in plan.pieces(frames_at_once)]
    current = rows[start]
    for index, block in enumerate(tower.blocks[start:], start):
        current = torch.cat([piece.after_block(index, block, current) for piece in pieces])
        if index + 1 in wanted:
            rows[index + 1] = current
    return PackedVideo(layout, plan, pieces, rows)


def first_states(
    tower: nn.Module, chunks: Iterable[torch.Tensor], size: tuple[int, int], num_blocks: int, wanted: set[int]
) -> tuple[FrameLayout, dict[int, torch.Tensor]]:
    """The frames' layout, and (F, P, D) hidden states by index: the wanted ones of the first blocks, and the last."""
    layout, by_chunk = None, []
    for pixels in chunks:
        layout = layout or FrameLayout.of(tower, *size, pixels.device)
        states = layout.embedded(tower, pixels)
        arguments = layout.block_arguments(len(pixels) // layout.num_patches)
        kept = {0: states} if 0 in wanted else {}
        for index, block in enumerate(tower.blocks[:num_blocks]):
            states = block(states, **arguments[layout.sees_frame[index]])
            if index + 1 in wanted or index + 1 == num_blocks:
                kept[index + 1] = states
        by_chunk.append(kept)
    joined = {index: torch.cat([states.pop(index) for states in by_chunk]) for index in list(by_chunk[0])}
    return layout, {index: states.unflatten(0, (-1, layout.num_patches)) for index, states in joined.items()}


@dataclass
class PackedPiece:
    """
    Some frames of a video, which need nothing of the others.

    Attributes:
        piece: Their plan, and which of the video's rows they use.
        layout: Of a frame.
        of_rows: Angles of the rotary embedding of all of the video's rows, (N, head_dim) each.
    """

    piece: PatchPiece
    layout: FrameLayout
    of_rows: tuple[torch.Tensor, torch.Tensor]

    @cached_property
    def angles(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, head_dim) each, of the rows that are used."""
        return tuple(map(self.piece.take, self.of_rows))

    @cached_property
    def arguments(self) -> dict[bool, dict | AttentionGroups]:
        """What blocks take beside rows, by whether they see the frame."""
        plan = self.piece.plan
        if plan.is_dense:
            return self.layout.block_arguments(len(plan.num_rows))
        return {sees_frame: AttentionGroups.of(plan, bounds) for sees_frame, bounds in self.layout.bounds.items()}

    def after_block(self, index: int, block: nn.Module, rows: torch.Tensor) -> torch.Tensor:
        """What a block makes of these frames' own rows, of all rows (N, D) that go into it."""
        taken, arguments = self.piece.take(rows), self.arguments[self.layout.sees_frame[index]]
        if self.piece.plan.is_dense:
            return self.piece.own(block(taken, **arguments))
        return self.piece.own(packed_block(block, taken, arguments, self.angles))


@dataclass
class PackedVideo:
    """
    What a tower computed of a video.

    Attributes:
        layout: Of its frames.
        plan: Which patches are computed, in the tower's order.
        pieces: The frames that are computed together.
        rows: (N, D) by index of the hidden state, as transformers counts them.
    """

    layout: FrameLayout
    plan: PatchPlan
    pieces: list[PackedPiece]
    rows: dict[int, torch.Tensor]

    def frames(self, index: int) -> torch.Tensor:
        """(F*P, D), a hidden state at every place, in the tower's order."""
        rows = self.rows[index]
        return rows[self.plan.slot.flatten().to(rows.device)]

    @cached_property
    def tokens(self) -> PatchPlan:
        """The plan once more, of tokens; it waits for the device, to know how many are computed."""
        is_computed = self.plan.is_computed.unflatten(1, (-1, self.layout.square**2)).any(2)
        return PatchPlan.of(is_computed, self.plan.first_frame.tolist())

    @cached_property
    def squares(self) -> torch.Tensor:
        """(M, square^2), the rows that make each of the tokens that are computed."""
        return self.tokens.gather(self.plan.slot.unflatten(1, (-1, self.layout.square**2)))

    def merged(self, index: int, merger: nn.Module) -> torch.Tensor:
        """(F*T, E), the tokens that a merger makes of a hidden state, as the frames have them."""
        rows = self.rows[index]
        at_once = max(len(piece.piece.plan.num_rows) for piece in self.pieces) * self.tokens.slot.shape[1]
        parts = [merger(rows[squares.flatten()]) for squares in self.squares.to(rows.device).split(at_once)]
        computed = torch.cat(parts)
        return self.layout.row_by_row(computed[self.tokens.slot.to(computed.device)]).flatten(0, 1)

    @torch.no_grad()
    def importance(self, index: int, block: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """
        What each token receives of a block's attention, as [`block_importance`] has it of all patches.

        Args:
            index: Of the hidden state that goes into it.
            block: It sees the frame.

        Returns:
            (F, T) float32, and (F, T, head_dim).
        """
        received, keys = [], []
        for piece in self.pieces:
            rows = block.norm1(piece.piece.take(self.rows[index]))
            query, key, _, plain = rotated_heads(block.attn, rows, piece.angles)
            slot = piece.piece.own_slot.to(query.device)
            query, key = query[slot].transpose(1, 2), key[slot].transpose(1, 2)
            received.append(received_attention(query, key, block.attn.scaling))
            keys.append(plain.mean(1)[slot])
        of_patches = (torch.cat(parts).unflatten(1, (-1, self.layout.square**2)) for parts in (received, keys))
        return tuple(self.layout.row_by_row(values.mean(2)) for values in of_patches)
