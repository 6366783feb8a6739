"""After merging: placeholders that no token is left for are dropped, and rows move together."""

from dataclasses import dataclass

import torch

from ..merging.spatial import masked_positions
from .packed_rows import PackedRows, take_rows
from .placeholders import assign_videos


@dataclass
class CompactedPrompt:
    """
    A batch of prompts whose videos have their merged tokens.

    Attributes:
        embeds: (B, N, D), rows padded to the longest.
        packed: Which of the L positions the N are.
        video_mask: (B, N) bool, which of them are video tokens.
        is_dropped: (B, L) bool, the placeholders that got no token.
        videos_of_row: The videos of every row.
        sizes: (B, N) float32, for how many uncompressed tokens each stands; `None` where that does not matter.
    """

    embeds: torch.Tensor
    packed: PackedRows
    video_mask: torch.Tensor
    is_dropped: torch.Tensor
    videos_of_row: list[list[int]]
    sizes: torch.Tensor | None = None


def compact_prompt(
    inputs_embeds: torch.Tensor,
    video_mask: torch.Tensor,
    is_real: torch.Tensor,
    embeddings: list[torch.Tensor],
    num_slots: list[int],
    slots: list[torch.Tensor | None] | None = None,
    sizes: list[torch.Tensor] | None = None,
) -> CompactedPrompt:
    """
    Puts merged tokens in place of placeholders.

    Args:
        inputs_embeds: (B, L, D) of the full length.
        video_mask: (B, L) bool, the placeholders.
        is_real: (B, L) bool, False at padding.
        embeddings: The (N_v, D) merged tokens of every video.
        num_slots: Placeholders of every video.
        slots: Which of its placeholders a video's tokens take, (N_v,) int64, ascending; `None`: the first ones.
        sizes: For how many uncompressed tokens a video's tokens stand, (N_v,) float32; `None` where that does not
            matter.

    Raises:
        ValueError: If placeholders and videos don't match.
    """
    device = inputs_embeds.device
    slots = slots or [None] * len(embeddings)
    is_unused = torch.cat(
        [
            torch.arange(total, device=device) >= len(tokens)
            if taken is None
            else torch.ones(total, dtype=torch.bool, device=device).index_fill_(0, taken.to(device), False)
            for total, tokens, taken in zip(num_slots, embeddings, slots)
        ]
    )
    is_dropped = is_real & torch.zeros_like(video_mask).masked_scatter(video_mask, is_unused)
    keep = is_real & ~is_dropped
    # The one transfer to the host: how long rows become, which videos are theirs, where they are padded.
    num_kept, num_placeholders, ends_real = torch.stack(
        [keep.sum(1), (video_mask & is_real).sum(1), is_real[:, -1].long()]
    ).tolist()
    videos_of_row = assign_videos(num_placeholders, num_slots)
    packed = PackedRows.of(keep, num_kept, "left" if all(ends_real) else "right")
    packed_video_mask = video_mask.gather(1, packed.index) & packed.mask
    tokens = (torch.cat(embeddings) if len(embeddings) > 1 else embeddings[0]).to(inputs_embeds)
    places = masked_positions(packed_video_mask.reshape(1, -1), len(tokens))[0]
    embeds = take_rows(inputs_embeds, packed.index)
    embeds.flatten(0, 1).index_copy_(0, places, tokens)
    if sizes is not None:
        ones = torch.ones(packed.mask.numel(), device=device)
        sizes = ones.index_copy_(0, places, torch.cat(sizes)).view(packed.mask.shape)
    return CompactedPrompt(embeds, packed, packed_video_mask, is_dropped, videos_of_row, sizes)
