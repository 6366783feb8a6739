"""Which videos, masks and positions of a call belong to which placeholders of the prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..merging.spatial import masked_positions


if TYPE_CHECKING:
    from transformers.cache_utils import Cache


def cached_length(cache: Cache | None) -> int:
    """Number of positions that the first layer of a cache holds."""
    return int(cache.get_seq_length()) if cache is not None else 0


def check_mask(attention_mask: torch.Tensor, shape: tuple[int, int]) -> None:
    """Raises a `ValueError` if a mask is not a 2D one over everything that was passed, dropped tokens included."""
    if tuple(attention_mask.shape) != shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; with compressed videos it must be 2D and cover "
            f"the full length, placeholders and cached tokens included: {shape}"
        )


def check_position_ids(position_ids: torch.Tensor, num_new: int, num_dims: int = 2) -> None:
    """Raises a `ValueError` unless position ids are (B, L), or (A, B, L) if `num_dims` is 3, for a call's L tokens."""
    if not 2 <= position_ids.ndim <= num_dims or position_ids.shape[-1] != num_new:
        raise ValueError(f"position_ids must have shape (batch, {num_new}), got {tuple(position_ids.shape)}")


def assign_videos(num_placeholders: list[int], num_slots: list[int]) -> list[list[int]]:
    """
    Which videos belong to which row: each row takes the next ones until its placeholders are used up.

    Args:
        num_placeholders: Video placeholders of every row.
        num_slots: Placeholders that every video needs.

    Raises:
        ValueError: If they don't match.
    """
    rows, video = [], 0
    for row, total in enumerate(num_placeholders):
        videos, left = [], total
        while left > 0 and video < len(num_slots):
            left -= num_slots[video]
            videos.append(video)
            video += 1
        if left != 0:
            raise ValueError(
                f"row {row} of the prompt has {total} video placeholders, but its videos need "
                f"{sum(num_slots[v] for v in videos)}: expand <video> with the model's processor, and pass the videos "
                "in the order of the prompts"
            )
        rows.append(videos)
    if video < len(num_slots):
        raise ValueError(
            f"{len(num_slots)} videos were passed, but the prompts have placeholders for {video} of them: put one "
            "<video> into the text for each"
        )
    return rows


def last_real(is_real: torch.Tensor, length: int) -> torch.Tensor:
    """(B, 1) int64: the last real one of the first `length` positions of every row of `is_real` (B, L) bool."""
    num_positions = is_real.shape[1]
    is_candidate = is_real & (torch.arange(num_positions, device=is_real.device) < length)
    return num_positions - 1 - is_candidate.flip(1).to(torch.int8).argmax(1, keepdim=True)


def token_positions(
    video_mask: torch.Tensor, videos_of_row: list[list[int]], num_tokens: list[int]
) -> list[list[torch.Tensor]]:
    """Positions of every video's tokens in every row of `video_mask` (B, N) bool, from their numbers alone."""
    return [
        list(masked_positions(video_mask[row], sum(lengths)).split(lengths)) if lengths else []
        for row, lengths in enumerate([num_tokens[v] for v in videos] for videos in videos_of_row)
    ]
