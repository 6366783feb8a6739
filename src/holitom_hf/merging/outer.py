"""Stages 1 and 2 over one video: features and importance of every token -> fewer tokens, and where they came from."""

from collections.abc import Generator
from dataclasses import replace

import torch

from .host_numbers import Steps, in_lockstep
from .merged_video import MergedVideo, take_tokens
from .package import of_package
from .registry import METHODS
from .representatives import with_representatives
from .settings import MergingSettings
from .video_tokens import VideoTokens


merge_exactly = of_package("merging.budget", "merge_exactly", "is what exact_budget needs")


def merge_steps(video: VideoTokens, config: MergingSettings) -> Steps:
    """Shortens one video before the decoder (sections 3.1 and 3.2), as the settings have it: a [`MergedVideo`]."""
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
        merge = merge_exactly if config.exact_budget else METHODS[config.outer_method].merge
        merged = merge(video, config)
        if isinstance(merged, Generator):
            merged = yield from merged
    return (yield from with_representatives(merged, video.features)) if config.proportional_attention else merged


def merge_videos(
    videos: list[VideoTokens], *settings: MergingSettings
) -> tuple[list[MergedVideo], list[torch.Tensor]]:
    """
    [`merge_steps`] for every video, side by side, and the newline behind it where the model has one. With HoliTom's
    own method the device is waited for once, however many videos there are.

    Args:
        videos: V videos as the encoder leaves them; without importance only where the settings need none.
        settings: One for all videos, or one for each.

    Returns:
        The V records, and the (N_v, D) embeddings that go into the prompt.

    Raises:
        ValueError: As [`merge_video_tokens`], and if importance is missing or a video has more tokens than before.
    """
    pairs = [*zip(videos, settings * len(videos) if len(settings) == 1 else settings, strict=True)]
    for video, config in pairs:
        if config.needs_importance and video.importance is None:
            raise ValueError(
                "the encoded videos carry no importance: encode them with this model's get_video_features(..., "
                "holitom_config=...) and the settings they will be merged with"
            )
    merged = in_lockstep([merge_steps(*pair) for pair in pairs])
    embeddings = []
    for index, (video, config) in enumerate(pairs):
        tokens = merged[index].embeddings
        if video.newline is not None and config.newline_position == "end":
            tokens = torch.cat([tokens, video.newline[None]])
        embeddings.append(tokens)
        if len(tokens) > video.num_slots:
            raise ValueError(
                f"with newline_position={config.newline_position!r} and retention_ratio={config.retention_ratio} "
                f"video {index} has {len(tokens)} tokens, more than its {video.num_slots} placeholders: lower the "
                "ratio"
            )
    return merged, embeddings
