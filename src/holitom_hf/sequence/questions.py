"""Videos with the text that they come with, for methods that look at it."""

from dataclasses import replace

import torch

from ..merging.video_tokens import VideoTokens
from .placeholders import assign_videos


def with_questions(
    videos: list[VideoTokens], prompt_embeds: torch.Tensor, video_mask: torch.Tensor, is_real: torch.Tensor
) -> list[VideoTokens]:
    """
    Videos with the text of their rows. It waits for the device, to know which rows those are.

    Args:
        videos: In the order of the prompts.
        prompt_embeds: (B, P, D), the prompts of a call of L >= P positions.
        video_mask, is_real: (B, L) bool, placeholders and what is no padding.
    """
    num_placeholders = (video_mask & is_real).sum(1).tolist()
    is_text = (is_real & ~video_mask)[:, : prompt_embeds.shape[1]]
    videos = list(videos)
    for row, of_row in enumerate(assign_videos(num_placeholders, [video.num_slots for video in videos])):
        for v in of_row:
            videos[v] = replace(videos[v], question=prompt_embeds[row, is_text[row]])
    return videos
