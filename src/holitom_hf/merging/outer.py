"""Stages 1 and 2 over one video: features and importance of every token -> fewer tokens, and where they came from."""

from dataclasses import replace

import torch

from .merged_video import MergedVideo, take_tokens
from .registry import METHODS
from .representatives import with_representatives
from .settings import MergingSettings
from .video_tokens import VideoTokens


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


def merge_tokens(video: VideoTokens, config: MergingSettings) -> MergedVideo:
    """[`merge_video_tokens`] for what an encoder has put together."""
    if config.newline_position == "row":
        if video.newline is None:
            raise ValueError('newline_position="row" needs the newline embedding')
        video.grid_for('newline_position="row"')
    else:
        video = replace(video, newline=None)
    if not config.has_outer_stage:
        everything = torch.arange(video.num_frames * video.tokens_per_frame, device=video.features.device)
        merged = take_tokens(video, everything, 1.0)
    else:
        merged = METHODS[config.outer_method].merge(video, config)
    return with_representatives(merged, video.features) if config.proportional_attention else merged


def merge_videos(videos: list[VideoTokens], config: MergingSettings) -> tuple[list[MergedVideo], list[torch.Tensor]]:
    """
    [`merge_tokens`] for every video, and the newline behind it where the model has one.

    Args:
        videos: V videos as the encoder leaves them; without importance only where the settings need none.
        config: The settings.

    Returns:
        The V records, and the (N_v, D) embeddings that go into the prompt.

    Raises:
        ValueError: As [`merge_video_tokens`], and if importance is missing or a video has more tokens than before.
    """
    merged, embeddings = [], []
    for index, video in enumerate(videos):
        if config.needs_importance and video.importance is None:
            raise ValueError(
                "the encoded videos carry no importance: encode them with this model's get_video_features(..., "
                "holitom_config=...) and the settings they will be merged with"
            )
        merged.append(merge_tokens(video, config))
        tokens, has_end = merged[-1].embeddings, config.newline_position == "end" or not config.has_outer_stage
        if video.newline is not None and has_end:
            tokens = torch.cat([tokens, video.newline[None]])
        embeddings.append(tokens)
        if len(tokens) > video.num_slots:
            raise ValueError(
                f"with newline_position={config.newline_position!r} and retention_ratio={config.retention_ratio} "
                f"video {index} has {len(tokens)} tokens, more than its {video.num_slots} placeholders: lower the "
                "ratio"
            )
    return merged, embeddings
