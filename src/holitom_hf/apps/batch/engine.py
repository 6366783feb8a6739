"""Many questions about many videos through vLLM's offline engine: its batches, the same records."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice

import numpy as np
import torch
from transformers import BatchFeature

from ...answering.prompts import GRIDS, PIXELS, frames_of
from ...video.sources import MediaSources
from .answering import DecodedInput, DecodedInputs, answer_or_tell, decode_ahead, prompt_of
from .inputs import BatchInput


# What is left to the engine's own processor: frames reach it in their size, as bytes, with what is known of the video.
RAW = {"do_rescale": False, "do_normalize": False, "return_metadata": True}


class OnlyProcess:
    """What accelerate's `PartialState` says of a process that is the only one: the engine has processes of its own."""

    process_index, num_processes, is_main_process = 0, 1, True

    def wait_for_everyone(self) -> None:
        """There is nobody to wait for."""


def consecutive_batches(decoded: Iterable[DecodedInput], batch_size: int) -> Iterator[list[DecodedInput]]:
    """Inputs as they come: the engine makes batches of its own of them."""
    decoded = iter(decoded)
    while batch := list(islice(decoded, batch_size)):
        yield batch


def engine_video(features: BatchFeature, processor) -> np.ndarray | tuple[np.ndarray, dict]:
    """
    A prompt's one video as the engine takes it.

    Args:
        features: What the processor made of the prompt with `RAW`.
        processor: Which one.

    Returns:
        (F, H, W, 3) uint8, of flat patches with its metadata, from which the engine's processor tells their times.
    """
    if GRIDS not in features:
        return features[PIXELS][0].permute(0, 2, 3, 1).numpy()
    frames = frames_of_patches(features[PIXELS], features[GRIDS][0].tolist(), processor.video_processor)
    return frames.numpy(), asdict(features["video_metadata"][0])


def frames_of_patches(patches: torch.Tensor, grid: list[int], video_processor) -> torch.Tensor:
    """
    The frames that a Qwen-VL family's video processor cut into flat patches, a last one that it repeated among them.

    Args:
        patches: (N, C * P_t * P * P), in the order of a merged token's patches.
        grid: Of patches, in time, rows and columns; N in all.
        video_processor: With the sides of patches and of merged tokens.

    Returns:
        (F, H, W, C).
    """
    num_times, num_rows, num_columns = grid
    merge, side = video_processor.merge_size, video_processor.patch_size
    rows, columns = num_rows // merge, num_columns // merge
    parts = patches.view(
        num_times, rows, columns, merge, merge, -1, video_processor.temporal_patch_size, side, side
    )  # (F / P_t, rows, columns, merge, merge, C, P_t, P, P)
    return parts.permute(0, 6, 1, 3, 7, 2, 4, 8, 5).reshape(-1, num_rows * side, num_columns * side, parts.shape[5])


def answer_in_engine(answerer, batch: list[DecodedInput], max_new_tokens: int) -> list[dict]:
    """
    Answers inputs together.

    Args:
        answerer: An [`OfflineAnswerer`](../../vllm/offline.py) with its engine.
        batch: Prepared with `RAW`.
        max_new_tokens: Longest answer.

    Returns:
        Records as those of [`answer_batch`]; without stage 3, the same number of tokens is left by it.
    """
    start = time.perf_counter()
    processor = answerer.processor
    videos = [engine_video(item.features, processor) for item in batch]
    answers = answerer.answer([prompt_of(item.question, processor) for item in batch], videos, max_new_tokens)
    seconds = (time.perf_counter() - start) / len(batch)
    return [
        item.asked
        | {
            "answer": answer.text.strip(),
            "num_frames": frames_of(item.features, processor)[0],
            "tokens_before": int((item.features["input_ids"] == processor.video_token_id).sum()),
            "tokens_after": answer.num_video_tokens,
            "tokens_after_stage_3": answer.num_video_tokens,
            "seconds": {"decode": round(item.seconds, 4), "answer": round(seconds, 4)},
        }
        for item, answer in zip(batch, answers)
    ]


def answer_all_in_engine(
    answerer,
    inputs: Sequence[BatchInput],
    chosen: list[int],
    add: Callable[[list[dict]], None],
    batch_size: int = 64,
    num_workers: int = 2,
    num_frames: int | None = None,
    max_new_tokens: int = 256,
    sources: MediaSources | None = None,
    limits: dict[str, float] | None = None,
) -> None:
    """
    As [`answer_all`], in vLLM.

    Args:
        answerer: As in [`answer_in_engine`].
        batch_size: Inputs that the engine gets at once.
        The rest: as there.

    Raises:
        EngineEndedError: If the engine's process is gone.
    """
    limits = (limits or {}) | RAW
    decoded = DecodedInputs(inputs, chosen, answerer.processor, torch.uint8, num_frames, sources, limits)
    num_ahead = -(-batch_size // max(1, num_workers))
    for batch in consecutive_batches(decode_ahead(decoded, num_workers, num_ahead), batch_size):
        add(answer_or_tell(answerer, batch, max_new_tokens, answer_in_engine))
