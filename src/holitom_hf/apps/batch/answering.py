"""Many questions about many videos: decoded ahead in other processes, answered in batches, shared among processes."""

import gc
import hashlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import BatchFeature
from transformers.utils import logging

from ...answering.answerer import Answerer
from ...answering.prompts import PIXELS, frames_of, joined_prompts
from ...answering.savings import row_savings
from ...models.upstream import cache_of
from ...video.sources import MediaSources
from ...vllm.settings import EngineEndedError
from .inputs import BatchInput, input_ids
from .records import BatchRecords
from .untrusted import allowed_video


logger = logging.get_logger(__name__)
BATCHES_AHEAD = 4  # batches whose inputs are looked at together to find those of like length
DIED = "the process that decoded it was killed: the video may need more memory than there is, or break the decoder"


@dataclass
class DecodedInput:
    """
    An input on its way to the model.

    Attributes:
        id: The input's.
        question: The input's; `None` if it could not be read.
        video: Its path or URL; `None` if there is only the file's content.
        features: What the processor made of it; `None` if it could not.
        error: Why not.
        seconds: For decoding and processing.
    """

    id: str
    question: str | None
    video: str | None
    features: BatchFeature | None
    error: str | None
    seconds: float

    @property
    def asked(self) -> dict:
        """The part of a record that says what was asked."""
        return {"id": self.id, "question": self.question, "video": self.video}

    @property
    def length(self) -> int:
        """Tokens of the uncompressed prompt."""
        return self.features["input_ids"].shape[1]


class DecodedInputs(Dataset):
    """Inputs as the model takes them, made where a `DataLoader`'s workers are."""

    def __init__(
        self,
        inputs: Sequence[BatchInput],
        chosen: list[int],
        processor,
        dtype,
        num_frames: int | None = None,
        sources: MediaSources | None = None,
        limits: dict[str, float] | None = None,
    ):
        """
        Args:
            inputs: All inputs.
            chosen: Indices of those to decode.
            processor: The model's.
            dtype: Of the pixels that are handed over, the model's.
            num_frames: Frames to take of each video; `None`: at most the processor's.
            sources: What inputs that a stranger wrote may name, see [`allowed_video`]; `None`: anything.
            limits: What the processor takes besides, [`Answerer.given_limits`] among others.
        """
        self.inputs, self.chosen, self.processor = inputs, chosen, processor
        self.dtype, self.sources = dtype, sources
        self.limits = {"num_frames": num_frames} | (limits or {})

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> DecodedInput:
        start = time.perf_counter()
        number = self.chosen[index]
        item, features, error = None, None, None
        try:
            item = self.inputs[number]
            features = self._features(item)
        except Exception as problem:  # whatever a file makes a decoder do, it is this input's own
            error = problem_text(problem)
        return self._decoded(number, item, features, error, time.perf_counter() - start)

    def of_dead(self, index: int) -> DecodedInput:
        """An input whose process died."""
        number = self.chosen[index]
        return self._decoded(number, self.inputs[number], None, DIED, 0.0)

    def _decoded(self, number: int, item: BatchInput | None, *outcome) -> DecodedInput:
        if item is None:  # a row that can't be read
            return DecodedInput(input_ids(self.inputs)[number], None, None, *outcome)
        video = item.video
        if isinstance(video, str):
            video = video.encode("utf-8", "backslashreplace").decode()
        return DecodedInput(item.id, item.question, video if isinstance(video, str) else None, *outcome)

    def _features(self, item: BatchInput) -> BatchFeature:
        video = item.video if self.sources is None else allowed_video(item.video, self.sources)
        text = prompt_of(item.question, self.processor)
        features = self.processor(text=text, videos=video, return_tensors="pt", **self.limits)
        features.update(BatchFeature({PIXELS: features[PIXELS]}).to(dtype=self.dtype))  # half as much to hand over
        return features


def prompt_of(question: str, processor) -> str:
    """A question about one video as the model's chat template writes it."""
    content = [{"type": "video"}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def problem_text(error: Exception) -> str:
    """One line for a record; what says nothing by itself, or was not foreseen, with the kind of error."""
    text, kind = " ".join(str(error).split()), type(error).__name__
    if isinstance(error, (OSError, ValueError, TypeError)) and text:
        return text
    return f"{kind}: {text}" if text else kind


def decode_ahead(decoded: DecodedInputs, num_workers: int, num_ahead: int) -> Iterator[DecodedInput]:
    """
    Decodes inputs in order, in other processes. One that dies, of a video that needs too much memory for instance,
    takes no other input along: those that were on their way are decoded again one at a time.

    Args:
        decoded: The inputs.
        num_workers: Processes; 0: in this one, which nothing protects.
        num_ahead: Inputs that each process may be ahead.
    """

    def loader(first: int, stop: int, workers: int) -> DataLoader:
        chosen = Subset(decoded, range(first, stop))
        ahead = min(num_ahead, stop - first) if workers else None
        start = _start_decoding if workers else None
        return DataLoader(chosen, batch_size=None, num_workers=workers, prefetch_factor=ahead, worker_init_fn=start)

    number, total, one_at_a_time_until = 0, len(decoded), 0
    while number < total:
        is_alone = number < one_at_a_time_until
        stop = number + 1 if is_alone else total
        try:
            for item in _started(loader(number, stop, min(1, num_workers) if is_alone else num_workers)):
                yield item
                number += 1
        except RuntimeError as error:  # of the loader: an input's own errors are in its `DecodedInput`
            logger.warning("a process that decodes died: %s", problem_text(error))
            if is_alone:
                yield decoded.of_dead(number)
                number += 1
            else:
                one_at_a_time_until = min(total, number + num_workers * num_ahead)


def _start_decoding(worker: int) -> None:
    """Readies a process that was forked to decode."""
    # Decoders that the other process has not yet collected have threads there and none here: freeing them would wait
    # for these forever.
    gc.freeze()
    # What this process has decoded can be taken from it when it is dead; a descriptor it has to hand over itself.
    torch.multiprocessing.set_sharing_strategy("file_system")


def _started(loader: DataLoader) -> Iterator[DecodedInput]:
    """
    An iterator whose dead processes are found out where the next input is asked for. torch's own handler of SIGCHLD
    raises wherever this process is, in the middle of an answer or of writing a record.
    """
    gc.collect()
    before = signal.getsignal(signal.SIGCHLD)
    items = iter(loader)
    if before is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before)
    return items


def run_name(answerer: Answerer, **options) -> str:
    """Stands for the model, its settings and options that answers depend on."""
    about = [answerer.name, answerer.config.holitom_config.to_dict(), options]
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:12]


def batches_by_length(decoded: Iterable[DecodedInput], batch_size: int) -> Iterator[list[DecodedInput]]:
    """
    Groups inputs of like length, looking a few batches ahead; those that could not be decoded come by themselves.
    """
    window = []
    for item in decoded:
        if item.error is not None:
            yield [item]
            continue
        window.append(item)
        if len(window) == BATCHES_AHEAD * batch_size:
            window.sort(key=lambda item: item.length)
            yield from (window[start : start + batch_size] for start in range(0, len(window), batch_size))
            window = []
    window.sort(key=lambda item: item.length)
    yield from (window[start : start + batch_size] for start in range(0, len(window), batch_size))


@torch.inference_mode()
def answer_batch(answerer: Answerer, batch: list[DecodedInput], max_new_tokens: int) -> list[dict]:
    """
    Answers inputs together.

    Returns:
        A record for each: id, question, video, answer, num_frames, visual tokens before and after, seconds.
    """
    start = time.perf_counter()
    model = answerer.model
    inputs = joined_prompts([item.features for item in batch], answerer.processor.tokenizer)
    inputs = inputs.to(model.device)
    outputs = model.generate(
        **inputs,
        vision_batch_size=32,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
    )
    texts = answerer.processor.batch_decode(
        outputs.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    num_visual = (inputs["input_ids"] == model.config.video_token_id).sum(1).tolist()
    savings = row_savings(cache_of(outputs), inputs["attention_mask"], num_visual, model.config.text_config)
    seconds = (time.perf_counter() - start) / len(batch)
    return [
        item.asked
        | {
            "answer": text.strip(),
            "num_frames": num_frames,
            "tokens_before": row.visual_tokens_before,
            "tokens_after": row.visual_tokens_outer,
            "tokens_after_stage_3": row.visual_tokens_inner,
            "seconds": {"decode": round(item.seconds, 4), "answer": round(seconds, 4)},
        }
        for item, text, num_frames, row in zip(batch, texts, frames_of(inputs, answerer.processor), savings)
    ]


def answer_or_tell(
    answerer: Answerer,
    batch: list[DecodedInput],
    max_new_tokens: int,
    answer: Callable[[Answerer, list[DecodedInput], int], list[dict]] = answer_batch,
) -> list[dict]:
    """
    As `answer`; what can't be answered gets its error for a record. A batch in which something fails, memory among
    others, is tried again in halves.

    Raises:
        EngineEndedError: If it is not the inputs' fault.
    """
    records = [item.asked | {"error": item.error} for item in batch if item.error is not None]
    whole = [item for item in batch if item.error is None]
    if not whole:
        return records
    try:
        return records + answer(answerer, whole, max_new_tokens)
    except EngineEndedError:
        raise
    except Exception as error:  # an input's own, whatever it is: alone in a batch it becomes its record
        problem = problem_text(error)
        logger.warning("%d inputs could not be answered together: %s", len(whole), problem)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if len(whole) == 1:
        return records + [whole[0].asked | {"error": problem}]
    half = len(whole) // 2
    for part in (whole[:half], whole[half:]):
        records += answer_or_tell(answerer, part, max_new_tokens, answer)
    return records


def missing_inputs(inputs: Sequence[BatchInput], records: BatchRecords, retry_errors: bool = False) -> list[int]:
    """Indices of the inputs that have no record yet, or an error that is to be tried again."""
    done = {name for name, record in records.read().items() if not (retry_errors and "error" in record)}
    return [number for number, name in enumerate(input_ids(inputs)) if name not in done]


def answer_all(
    answerer: Answerer,
    inputs: Sequence[BatchInput],
    chosen: list[int],
    add: Callable[[list[dict]], None],
    batch_size: int = 8,
    num_workers: int = 2,
    num_frames: int | None = None,
    max_new_tokens: int = 256,
    sources: MediaSources | None = None,
    limits: dict[str, float] | None = None,
) -> None:
    """
    Answers inputs; a record for each is handed on as soon as its batch is done.

    Args:
        answerer: With its weights loaded.
        inputs: All inputs.
        chosen: Indices of those to answer.
        add: Takes records, see [`BatchRecords.add`].
        batch_size: Inputs that are answered together.
        num_workers: Processes that decode ahead; 0 to decode in this one.
        num_frames: Frames to take of each video; `None`: at most the processor's.
        max_new_tokens: Longest answer.
        sources, limits: As in [`DecodedInputs`].
    """
    decoded = DecodedInputs(inputs, chosen, answerer.processor, answerer.model.dtype, num_frames, sources, limits)
    num_ahead = -(-2 * batch_size // max(1, num_workers))
    for batch in batches_by_length(decode_ahead(decoded, num_workers, num_ahead), batch_size):
        add(answer_or_tell(answerer, batch, max_new_tokens))
