"""A video before merging: its tokens, and what methods may want to know of them."""

import math
from dataclasses import dataclass

import torch


@dataclass
class VideoTokens:
    """
    The tokens of one video, frame by frame.

    Attributes:
        features: (F, T, D) pooled, projected features; T is a frame's grid row by row.
        importance: (F, T), what each token receives of the vision tower's attention; `None` if no method needs it.
        keys: (F, T, K) attention keys averaged over heads; `None` if no method needs them.
        newline: (D,) the model's newline embedding; `None` for models without.
        grid: Rows and columns of a frame; `None`: a square, if T is one.
        groups: (F, T) int64, for each token the first one of its frame that the vision tower made equal to it; `None`
            where nobody asks.
        question: (Q, D) embeddings of the text that the video comes with; `None` if the method does not ask for it.
        maps: Further feature maps, each (F, T, E), which the same merge applies to.
    """

    features: torch.Tensor
    importance: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    newline: torch.Tensor | None = None
    grid: tuple[int, int] | None = None
    groups: torch.Tensor | None = None
    question: torch.Tensor | None = None
    maps: tuple[torch.Tensor, ...] = ()

    @property
    def num_frames(self) -> int:
        """F."""
        return self.features.shape[0]

    @property
    def tokens_per_frame(self) -> int:
        """T."""
        return self.features.shape[1]

    @property
    def num_slots(self) -> int:
        """Placeholders that the uncompressed video needs: one for each token, and one for a newline."""
        return self.num_frames * self.tokens_per_frame + (self.newline is not None)

    def grid_for(self, purpose: str) -> tuple[int, int]:
        """
        Rows and columns of a frame.

        Raises:
            ValueError: If none are given and T is no square; it names the `purpose`.
        """
        if self.grid is not None:
            return self.grid
        side = math.isqrt(self.tokens_per_frame)
        if side * side != self.tokens_per_frame:
            raise ValueError(f"{purpose} needs a square grid, got {self.tokens_per_frame} tokens a frame")
        return side, side
