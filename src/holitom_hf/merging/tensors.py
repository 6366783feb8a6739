"""Stages 1 and 2 over tensors of any model."""

import torch

from .host_numbers import in_lockstep
from .merged_video import MergedVideo
from .outer import merge_steps
from .settings import MergingSettings
from .video_tokens import VideoTokens


def merge_tokens(video: VideoTokens, config: MergingSettings) -> MergedVideo:
    """Shortens one video before the decoder (sections 3.1 and 3.2), as the settings have it."""
    return in_lockstep([merge_steps(video, config)])[0]


def merge_video_tokens(
    features: torch.Tensor,
    importance: torch.Tensor,
    config: MergingSettings,
    newline: torch.Tensor | None = None,
    keys: torch.Tensor | None = None,
    grid: tuple[int, int] | None = None,
) -> MergedVideo:
    """
    Shortens one video before the decoder.

    Args:
        features: (F, T, D) pooled, projected features; T is the grid row by row.
        importance: (F, T), what each token receives of the vision tower's attention.
        config: The settings; `outer_method` picks the method.
        newline: (D,) embedding put after the rows of the grid with `newline_position="row"`; with `"end"` the model
            appends its newline itself.
        keys: (F, T, K) attention keys averaged over heads, for `outer_method="visionzip"`.
        grid: Rows and columns of a frame; `None`: a square.

    Returns:
        A [`MergedVideo`].

    Raises:
        ValueError: If shapes don't fit each other, there is no frame, or what the method needs is missing.

    Source: sections 3.1 and 3.2.
    """
    if features.ndim != 3 or 0 in features.shape:
        raise ValueError(f"features must have shape (frames, tokens, dim) without a 0, got {tuple(features.shape)}")
    if importance.shape != features.shape[:2]:
        raise ValueError(
            f"importance must have shape {tuple(features.shape[:2])} as the features do, got {tuple(importance.shape)}"
        )
    if grid is not None and grid[0] * grid[1] != features.shape[1]:
        raise ValueError(f"a grid of {grid[0]} x {grid[1]} does not have the {features.shape[1]} tokens of a frame")
    return merge_tokens(VideoTokens(features, importance, keys, newline, grid), config)
