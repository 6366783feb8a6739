"""What encoding videos has in common: chunks of frames, broken pixels, and what travels with the features."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling


# Bytes that a chunk of frames may take in the vision tower where the device's memory can't be asked for.
CHUNK_BYTES = 2 * 2**30
# Share of a GPU's free memory that it may take.
CHUNK_SHARE = 0.25


@dataclass
class HoliTomVideoFeatures(BaseModelOutputWithPooling):
    """
    Videos after vision tower, projector and pooling, at full length, with what merging needs to know.

    `last_hidden_state`, `hidden_states` and `attentions` are the vision tower's, of the frames of all videos.

    Attributes:
        pooler_output: (V, F*T+1, D) features of V videos, the newline last; a list of (F_v*T+1, D) if their numbers
            of frames differ.
        importance: A list of V tensors (F_v, T), float32: what each token receives of the attention.
        attention_keys: A list of V tensors (F_v, T, K): the attention's keys, averaged over heads.
        computed_patches: A list of V tensors (F_v, P) bool: which patches the tower computed in its later layers;
            `None`: all.
        rows_by_layer: A list of V tensors (L, F_v) int64 on the host: how many rows of every frame go into each of the
            tower's layers that run; `None`: all patches.
        patch_groups: A list of V tensors (F_v, P) int64: for every patch the first one of its frame that it was merged
            with; `None` where nobody asks.
    """

    # Of these a batch of beams needs copies, video by video. A backbone with more per-video fields adds them.
    per_video = ("importance", "attention_keys", "computed_patches", "rows_by_layer", "patch_groups")

    importance: list[torch.Tensor] | None = None
    attention_keys: list[torch.Tensor] | None = None
    computed_patches: list[torch.Tensor] | None = None
    rows_by_layer: list[torch.Tensor] | None = None
    patch_groups: list[torch.Tensor] | None = None


def joined_chunks(chunks: list[tuple[torch.Tensor | None, ...] | None]) -> tuple[torch.Tensor | None, ...] | None:
    """What the tower returned layer by layer for chunks of frames, a tuple each, as for all frames at once."""
    if len(chunks) < 2 or chunks[0] is None:
        return chunks[0] if chunks else None
    return tuple(None if layer[0] is None else torch.cat(layer) for layer in zip(*chunks))


def check_finite(pixels: torch.Tensor, num_rows: list[int], rows_per_frame: list[int] | None = None) -> None:
    """
    Raises a `ValueError` that names the first frame with a pixel that is not finite.

    Args:
        pixels: (R, ...), the frames of all videos, or their patches.
        num_rows: Of every video.
        rows_per_frame: Of every video; `None`: a row is a frame.
    """
    # A sum is one pass without copies, and finite only if all are; that it is not may be an overflow.
    if torch.compiler.is_compiling() or pixels.flatten(1).sum(1, dtype=torch.float32).isfinite().all():
        return
    is_finite = torch.isfinite(pixels.flatten(1)).all(1)
    if not is_finite.all():
        row = int(is_finite.logical_not().nonzero()[0])
        video = next(v for v in range(len(num_rows)) if row < sum(num_rows[: v + 1]))
        frame = (row - sum(num_rows[:video])) // (rows_per_frame[video] if rows_per_frame else 1)
        raise ValueError(
            f"video {video} has NaN or infinite pixels in frame {frame}: check how it was decoded and normalized"
        )


def frames_at_once(num_frames: int, bytes_per_frame: int, device: torch.device) -> int:
    """
    How many frames a device has the memory for, in chunks of equal size.

    Args:
        num_frames: How many there are.
        bytes_per_frame: What the vision tower needs for one.
        device: Where it lies.
    """
    budget = CHUNK_BYTES
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        budget = CHUNK_SHARE * (torch.cuda.mem_get_info(device)[0] + unused)
    most = max(1, int(budget // bytes_per_frame))
    num_chunks = -(-num_frames // most)
    return -(-num_frames // num_chunks)


def chunks_on_device(pixels: torch.Tensor, size: int | list[int], device: torch.device) -> Iterator[torch.Tensor]:
    """
    Frames chunk by chunk on the vision tower's device; the next chunk is on its way while one is used.

    Args:
        pixels: (F, C, H, W), or patches, anywhere.
        size: Number of frames in a chunk, or of rows in each.
        device: Where they are needed. Offloaded weights lie on no device that counts: frames stay where they are.
    """
    chunks = pixels.split(size)
    if device.type != "cuda" or pixels.device == device:
        yield from (chunk if device.type == "meta" else chunk.to(device) for chunk in chunks)
        return
    copies = torch.cuda.Stream(device)

    def send(chunk: torch.Tensor) -> torch.Tensor:
        with torch.cuda.stream(copies):
            return (chunk.pin_memory() if chunk.device.type == "cpu" else chunk).to(device, non_blocking=True)

    following = send(chunks[0])
    for number in range(1, len(chunks) + 1):
        current, user = following, torch.cuda.current_stream(device)
        user.wait_stream(copies)
        current.record_stream(user)
        if number < len(chunks):
            following = send(chunks[number])
        yield current
