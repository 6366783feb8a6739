"""Stages 1 and 2 over one video: features and importance of every token -> fewer tokens, and where they came from."""

import math

import torch

from .average_pooling import merge_average_pooling
from .configuration_holitom import HoliTomConfig
from .fixed_windows import merge_fixed_windows
from .frame_subsampling import merge_frame_subsampling
from .holitom_merging import merge_holitom
from .merged_video import MergedVideo, TokenKind, take_tokens
from .random_tokens import merge_random_tokens
from .visionzip_merging import merge_visionzip


# What `HoliTomConfig.outer_method` names. All take the arguments of `merge_video_tokens`, checked; `newline` is None
# where no rows end with one. A new method is a file with such a function, a line here, its name in
# `configuration_holitom.OUTER_METHODS` and its file in `REMOTE_CODE_FILES` there.
OUTER_METHODS = {
    "holitom": merge_holitom,
    "fixed_windows": merge_fixed_windows,
    "visionzip": merge_visionzip,
    "frame_subsampling": merge_frame_subsampling,
    "random_tokens": merge_random_tokens,
    "average_pooling": merge_average_pooling,
}


def merge_video_tokens(
    features: torch.Tensor,
    importance: torch.Tensor,
    config: HoliTomConfig,
    newline: torch.Tensor | None = None,
    keys: torch.Tensor | None = None,
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
    if config.newline_position == "row":
        if newline is None:
            raise ValueError('newline_position="row" needs the newline embedding')
        if math.isqrt(features.shape[1]) ** 2 != features.shape[1]:
            raise ValueError(f'newline_position="row" needs a square grid, got {features.shape[1]} tokens a frame')
    newline = newline if config.newline_position == "row" else None
    if not config.has_outer_stage:
        everything = torch.arange(features.shape[0] * features.shape[1], device=features.device)
        return take_tokens(features, everything, 1.0, newline)
    return OUTER_METHODS[config.outer_method](features, importance, config, newline, keys)


def merge_encoded_videos(
    features: list[torch.Tensor],
    importance: list[torch.Tensor] | None,
    keys: list[torch.Tensor] | None,
    tokens_per_frame: int,
    config: HoliTomConfig,
) -> tuple[list[MergedVideo], list[torch.Tensor]]:
    """
    [`merge_video_tokens`] for every video as the vision tower leaves it, and the newline behind it.

    Args:
        features: A (F_v*T+1, D) tensor for each of V videos, the newline last.
        importance, keys: As there, for each video; `None` where the settings need none.
        tokens_per_frame: T.
        config: The settings.

    Returns:
        The V records, and the (N_v, D) embeddings that go into the prompt.

    Raises:
        ValueError: As [`merge_video_tokens`], and if importance is missing or a video has more tokens than before.
    """
    if config.has_outer_stage and importance is None:
        raise ValueError(
            "the encoded videos carry no importance: encode them with this model's get_video_features(..., "
            "holitom_config=...) and the settings they will be merged with"
        )
    merged, embeddings = [], []
    for index, tokens in enumerate(features):
        frames = tokens[:-1].view(-1, tokens_per_frame, tokens.shape[-1])
        video = merge_video_tokens(
            frames,
            importance[index].to(frames.device) if config.has_outer_stage else frames.new_zeros(frames.shape[:2]),
            config,
            newline=tokens[-1],
            keys=keys[index].to(frames.device) if config.has_outer_stage and keys is not None else None,
        )
        has_end = config.newline_position == "end" or not config.has_outer_stage
        merged.append(video)
        embeddings.append(torch.cat([video.embeddings, tokens[-1:]]) if has_end else video.embeddings)
        if len(embeddings[-1]) > len(tokens):
            raise ValueError(
                f"with newline_position={config.newline_position!r} and retention_ratio={config.retention_ratio} "
                f"video {index} has {len(embeddings[-1])} tokens, more than its {len(tokens)} placeholders: lower the "
                "ratio"
            )
    return merged, embeddings


__all__ = ["OUTER_METHODS", "MergedVideo", "TokenKind", "merge_encoded_videos", "merge_video_tokens"]
