"""How a Qwen-VL vision tower has the patches of a frame: in which order, at which places, and what attends to what."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from ...merging.host_numbers import on_device


@dataclass
class FrameLayout:
    """
    Frames of one size: P patches, of which squares make T tokens, in a tower's own order.

    Attributes:
        num_tokens: Rows and columns of tokens.
        square: Side of a token in patches.
        order: (T,) int64: row by row, the number of each of the tower's tokens; `None`: they are in that order.
        bounds: By whether a block sees the whole frame: where places that attend to each other begin, and P; on the
            host.
        sees_frame: Of every block.
        angles: Of the rotary embedding, cos and sin, (P, head_dim) each.
        positions: (P, D), what is added to patches, row by row of squares; `None` where a tower adds nothing.
    """

    num_tokens: tuple[int, int]
    square: int
    order: torch.Tensor | None
    bounds: dict[bool, np.ndarray]
    sees_frame: list[bool]
    angles: tuple[torch.Tensor, torch.Tensor]
    positions: torch.Tensor | None

    @classmethod
    def of(cls, tower: nn.Module, height: int, width: int, device: torch.device) -> FrameLayout:
        """
        The layout of a tower for frames of so many patches.

        Args:
            tower: Of Qwen2.5-VL, Qwen3-VL or a newer one.
            height, width: In patches.
            device: Where pixels are.
        """
        square, depth = tower.spatial_merge_size, len(tower.blocks)
        grid = torch.tensor([[1, height, width]])  # transformers' functions read it on the host
        places = get_vision_position_ids(grid, square).to(device)
        angles, positions, order = tower.rotary_pos_emb(places, places), None, None
        bounds, sees_frame = {True: np.array([0, height * width])}, [True] * depth
        if hasattr(tower, "pos_embed"):
            indices, weights = get_vision_interpolation_indices_and_weights(
                grid,
                num_grid_per_side=tower.num_grid_per_side,
                mode=tower.interpolation_mode,
                align_corners=tower.interpolation_align_corners,
                spatial_merge_size=square,
            )
            positions = (tower.pos_embed(indices.to(device)) * weights.to(device)[:, :, None]).sum(1)
        if hasattr(tower, "window_size"):
            order, ends = get_vision_window_index(
                grid, square, window_size=tower.window_size, patch_size=tower.patch_size
            )
            order = order.to(device)
            bounds[False] = ends.numpy()
            sees_frame = [block in tower.fullatt_block_indexes for block in range(depth)]
        num_tokens = height // square, width // square
        layout = cls(num_tokens, square, order, bounds, sees_frame, angles, positions)
        layout.angles = tuple(map(layout.in_towers_order, angles))
        return layout

    @property
    def num_patches(self) -> int:
        """P."""
        return int(self.bounds[True][-1])

    def embedded(self, tower: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        """(f*P, D), what goes into the tower's first block, of the flat patches (f*P, C) of f frames."""
        states = tower.patch_embed(pixels)
        if self.positions is not None:
            positions = self.positions.to(states)
            states = (states.unflatten(0, (-1, len(positions))) + positions).flatten(0, 1)
        return self.in_towers_order(states)

    def in_towers_order(self, patches: torch.Tensor) -> torch.Tensor:
        """Flat patches, (f*P, D), as blocks take them."""
        if self.order is None:
            return patches
        squares = patches.unflatten(0, (-1, len(self.order), self.square**2))
        return squares[:, self.order.to(patches.device)].flatten(0, 2)

    def row_by_row(self, tokens: torch.Tensor) -> torch.Tensor:
        """The tokens of frames in the tower's order, (f, T, ...), as the frame has them."""
        return tokens if self.order is None else tokens[:, self.order.argsort().to(tokens.device)]

    def patches_row_by_row(self, patches: torch.Tensor) -> torch.Tensor:
        """The patches of frames in the tower's order, (f, P), as the frame has them."""
        squares = self.row_by_row(patches.unflatten(1, (-1, self.square**2)))
        return squares.view(len(patches), *self.num_tokens, self.square, self.square).transpose(2, 3).flatten(1)

    def block_arguments(self, num_frames: int) -> dict[bool, dict]:
        """What the tower's blocks take beside the patches of whole frames, by whether they see the frame."""
        angles = tuple(values.repeat(num_frames, 1) for values in self.angles)
        found = {}
        for sees_frame, bounds in self.bounds.items():
            starts = bounds[-1] * np.arange(num_frames)[:, None] + bounds[:-1]
            found[sees_frame] = {
                "cu_seqlens": on_device([*starts.flatten().tolist(), bounds[-1] * num_frames], angles[0].device).int(),
                "max_seqlen": int(np.diff(bounds).max()),
                "position_embeddings": angles,
            }
        return found
