"""
Positions that depend on what was kept of a video, in an engine that counts positions before it encodes.

A prompt's positions are those of the uncompressed prompt, but for a video's range of placeholders, all of which have
the position that the range begins with. How far each of its tokens stands behind that travels with its embedding, and
is added where the decoder begins. So no runner has to know of it.
"""

import torch


# Digits of a number, each exact in bfloat16, for each of the three axes.
NUM_DIGITS, DIGIT = 3, 256
NUM_CHANNELS = 3 * NUM_DIGITS


def as_channels(offsets: torch.Tensor) -> torch.Tensor:
    """(N, 9) digits below 256 of offsets (N, 3)."""
    powers = DIGIT ** torch.arange(NUM_DIGITS, device=offsets.device)
    return (offsets[..., None] // powers % DIGIT).flatten(1)


def from_channels(channels: torch.Tensor) -> torch.Tensor:
    """(N, 3) offsets of their digits (N, 9)."""
    powers = DIGIT ** torch.arange(NUM_DIGITS, device=channels.device)
    return (channels.long().unflatten(1, (3, NUM_DIGITS)) * powers).sum(-1)


def video_offsets(place: torch.Tensor, times: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """
    (N, 3), how far the tokens of a video without text inside stand behind its first one, uncompressed.

    Args:
        place: (N,) int64, in the uncompressed video.
        times: (F,) int64, how far a frame's are behind along the first axis.
        grid: Rows and columns of tokens in a frame.
    """
    in_frame = place % (grid[0] * grid[1])
    return torch.stack([times[place // (grid[0] * grid[1])], in_frame // grid[1], in_frame % grid[1]], dim=1)


def timed_offsets(
    is_video: torch.Tensor, is_end: torch.Tensor, place: torch.Tensor, grid: tuple[int, int]
) -> torch.Tensor:
    """
    (N, 3), how far the tokens of a video with text between its frames stand behind its first one, uncompressed.

    Args:
        is_video: (N,) bool, which tokens are the video's; the others are text.
        is_end: (N,) bool, which end a frame.
        place: (M,) int64, ascending, of the video's tokens in the uncompressed video.
        grid: Rows and columns of tokens in a frame.
    """
    num_text = (~is_video).cumsum(0) - (~is_video).long()
    offsets = (num_text + max(grid) * is_end.cumsum(0))[:, None].repeat(1, 3)
    offsets[is_video, 1] += place % (grid[0] * grid[1]) // grid[1]
    offsets[is_video, 2] += place % grid[1]
    return offsets


def prompt_positions(num_tokens: int, media: list[tuple[int, torch.Tensor, int]]) -> tuple[torch.Tensor, int]:
    """
    (3, L) positions of a prompt, and what is added to the number of a token behind it to get its position.

    Args:
        num_tokens: L.
        media: Of every image and video, in the order of the prompt: where its placeholders begin, how far each stands
            behind the first (3, n), and how many positions all of it takes.
    """
    parts, end, position = [], 0, 0
    for begin, offsets, extent in [*media, (num_tokens, torch.zeros(3, 0, dtype=torch.long), 0)]:
        parts.append((torch.arange(begin - end) + position).expand(3, -1))
        position += begin - end
        parts.append(offsets + position)
        end, position = begin + offsets.shape[1], position + extent
    return torch.cat(parts, 1), position - num_tokens
