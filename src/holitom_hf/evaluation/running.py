"""Answers a set of video questions with many settings of one model, and keeps every answer as it comes."""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
from transformers import BatchFeature

from ..answering.answerer import Answerer
from ..answering.prompts import PIXELS, ExpandedVideo, encode_videos, frames_of, joined_prompts
from ..answering.savings import row_savings
from ..bundled.questions import VideoQuestion
from ..configuration import HoliTomConfig
from ..models.upstream import cache_of
from ..models.vision import HoliTomVideoFeatures
from .methods import Run
from .operations import EncodedVideo, counted, encoded_video, first_token_operations, merging_operations


@dataclass
class Result:
    """
    One question answered with one run's settings.

    Attributes:
        run: The run's name.
        id: The question's.
        video: Its video.
        type: The question's type.
        answer: What the model said.
        is_right: Whether that is the answer, apart from case, space around it and a full stop.
        tokens_outer: Visual tokens before the decoder.
        tokens_inner: After stage 3.
        flops: The decoder's for the prompt, by the paper's formula.
        flops_counted: As torch counts them, merging and the output layer included; `None` where not counted.
        seconds: For merging, prompt and answer: the batch's time by its size.
        settings: The run's, those that are not the defaults.
        operations: All up to the first token, the vision tower's among them, as torch counts; `None` in files that
            were written before there was this field.
        first_answer: What the run said to the question before, if there was one.
    """

    run: str
    id: str
    video: str
    type: str
    answer: str
    is_right: bool
    tokens_outer: int
    tokens_inner: int
    flops: float
    flops_counted: float | None
    seconds: float
    settings: dict = field(default_factory=dict)
    operations: float | None = None
    first_answer: str | None = None


class AnswerFile:
    """The results so far, one JSON object a line; a line that was cut off is taken off."""

    def __init__(self, path: Path, subject: dict):
        """
        Args:
            path: File to write to and go on from.
            subject: What the results are about, kept in the first line.

        Raises:
            ValueError: If the file's results are about something else.
        """
        self.path, self.results = path, []
        text = path.read_text() if path.is_file() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole:
            first, *rest = (json.loads(line) for line in whole.splitlines())
            if first != json.loads(json.dumps(subject)):
                raise ValueError(
                    f"{path} holds answers of another model or another set of questions: choose another folder or "
                    "remove it"
                )
            self.results = [Result(**line) for line in rest]
        else:
            whole = json.dumps(subject) + "\n"
        if whole != text:
            path.write_text(whole)

    def add(self, results: list[Result]) -> None:
        """Appends results."""
        with open(self.path, "a") as file:
            file.write("".join(json.dumps(asdict(result)) + "\n" for result in results))
        self.results += results


def describe(answerer: Answerer, questions: list[VideoQuestion]) -> dict:
    """
    What all runs of an evaluation share: architecture, the start of every weight, dtype, and the questions. How a run
    compresses is kept with its results.
    """
    config = answerer.config.to_dict()
    for name in ("transformers_version", "holitom_config"):
        config.pop(name, None)
    weights = [parameter.flatten()[:16].tolist() for parameter in answerer.model.parameters() if not parameter.is_meta]
    asked = [asdict(question) for question in questions]
    for question in asked:
        if question["before"] is None:  # as before there was this field
            del question["before"]
    texts = json.dumps([config, str(answerer.model.dtype), weights, asked], sort_keys=True, default=str)
    return {"model": Path(answerer.name).name, "sha256": hashlib.sha256(texts.encode()).hexdigest()}


@torch.inference_mode()
def evaluate(
    answerer: Answerer,
    folder: Path,
    questions: list[VideoQuestion],
    runs: list[Run],
    out: Path,
    batch_size: int = 32,
    max_new_tokens: int = 8,
    num_counted: int = 8,
    progress: Callable[[Iterable], Iterable] = iter,
) -> list[Result]:
    """
    Answers every question with every run's settings. Every video goes once through the vision tower, or once for each
    way that runs have of leaving something out there.

    Where a question comes after another one, the run answers that one first, and what it said stays in the
    conversation, which goes through the decoder as a whole again; figures are those of the second answer.

    Args:
        answerer: With its weights loaded.
        folder: Where the questions' videos are.
        questions: A video's questions stand behind each other.
        runs: Settings to compare.
        out: Folder for `answers.jsonl`; what is there already is not answered again, unless the run of that name had
            other settings.
        batch_size: Questions at once.
        max_new_tokens: Longest answer.
        num_counted: Operations are counted for so many questions, one of a video, by running them once more.
        progress: Wraps the list of batches, e.g. to show a bar.

    Returns:
        The results of these runs.

    Raises:
        OSError, ValueError: If a video can't be read, or `out` holds answers about something else.
    """
    out.mkdir(parents=True, exist_ok=True)
    file = AnswerFile(out / "answers.jsonl", describe(answerer, questions))
    settings = {run.name: changed_settings(run.settings) for run in runs}
    done = {(r.run, r.id) for r in file.results if settings.get(r.run) == r.settings}
    first_of_video = [next(group) for _, group in groupby(questions, key=lambda question: question.video)]
    counted = {question.id for question in first_of_video[:num_counted]}
    for batch in progress(list(_batches(questions, batch_size))):
        pending = [(run, [q for q in batch if (run.name, q.id) not in done]) for run in runs]
        if not any(missing for _, missing in pending):
            continue
        decoded, encoded = _decode(answerer, folder, batch), {}
        for run, missing in pending:
            if missing:
                how = str(_vision_fields(run.settings))  # fields may be lists
                if how not in encoded:
                    encoded[how] = _encode(answerer, decoded, run.settings)
                file.add(_answer(answerer, run, missing, encoded[how], max_new_tokens, counted))
    return [result for result in file.results if settings.get(result.run) == result.settings]


def changed_settings(settings: HoliTomConfig) -> dict:
    """The settings that are not the defaults: a field that comes to exist leaves older results as they are."""
    defaults = HoliTomConfig().to_dict()
    return {name: value for name, value in settings.to_dict().items() if value != defaults[name]}


def is_right(answer: str, truth: str) -> bool:
    """Whether an answer is the true one, apart from case, space around it and a full stop."""
    return answer.strip().rstrip(".").lower() == truth.strip().lower()


def _batches(questions: list[VideoQuestion], batch_size: int) -> Iterator[list[VideoQuestion]]:
    """Whole videos together until a batch is full."""
    batch: list[VideoQuestion] = []
    for _, group in groupby(questions, key=lambda question: question.video):
        group = list(group)
        if batch and len(batch) + len(group) > batch_size:
            yield batch
            batch = []
        batch += group
    if batch:
        yield batch


def _decode(answerer: Answerer, folder: Path, questions: list[VideoQuestion]) -> dict[str, tuple]:
    """For every video its pixels, and what the processor writes into prompts for it."""
    decoded = {}
    for question in questions:
        if question.video not in decoded:
            features = answerer.prepare(str(folder / question.video), question.text, question.num_frames).features
            prompt = ExpandedVideo.of(features, _text(answerer, question, None), answerer.processor)
            decoded[question.video] = features[PIXELS], prompt
    return decoded


def _vision_fields(settings: HoliTomConfig) -> dict:
    """What settings say of the vision tower."""
    return {name: value for name, value in settings.to_dict().items() if name.startswith("vision_")}


def _encode(answerer: Answerer, decoded: dict[str, tuple], settings: HoliTomConfig) -> dict[str, EncodedVideo]:
    """Every video through the tower as the settings have it, with what any method may ask for."""
    fields = _vision_fields(settings) | {"retention_ratio": 0.5, "inner_method": "none"}
    settings, model, encoded = HoliTomConfig(**fields), answerer.model, {}
    for video, (pixels, prompt) in decoded.items():
        inputs = BatchFeature(prompt.features | {PIXELS: pixels.to(model.device, model.dtype)})
        [num_frames] = frames_of(inputs, answerer.processor)
        encode = partial(_features, model, inputs)
        encoded[video] = encoded_video(encode, model.config, num_frames, settings, prompt)
    return encoded


def _features(model, inputs: BatchFeature, settings: HoliTomConfig) -> HoliTomVideoFeatures:
    return encode_videos(model, inputs, vision_batch_size=32, holitom_config=settings)


def _together(encoded: dict[str, EncodedVideo], questions: list[VideoQuestion]) -> HoliTomVideoFeatures:
    """The questions' videos as one output of the tower, one entry a question."""
    videos = [encoded[question.video].features for question in questions]
    fields = {
        name: [getattr(video, name)[0] for video in videos]
        for name in ("pooler_output", *videos[0].per_video)
        if getattr(videos[0], name) is not None
    }
    if getattr(videos[0], "deepstack_features", None):
        layers = zip(*(video.deepstack_features for video in videos))
        fields["deepstack_features"] = [[of_video for [of_video] in layer] for layer in layers]
    return type(videos[0])(**fields)


def _conversation(question: VideoQuestion, first_answer: str | None) -> list[dict]:
    """The messages up to the question, the one before it and what was answered included."""
    turns = [("user", question.text)]
    if first_answer is not None:
        turns = [("user", question.before), ("assistant", first_answer), *turns]
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    messages[0]["content"].insert(0, {"type": "video"})
    return messages


def _text(answerer: Answerer, question: VideoQuestion, first_answer: str | None) -> str:
    messages = _conversation(question, first_answer)
    return answerer.processor.apply_chat_template(messages, add_generation_prompt=True)


def _prompts(answerer, questions, encoded, first_answers: list[str | None]) -> BatchFeature:
    """Left-padded prompts with what the processor wrote for the videos; without their pixels."""
    processor = answerer.processor
    rows = [
        encoded[question.video].prompt.prompt(_text(answerer, question, first_answer), processor)
        for question, first_answer in zip(questions, first_answers)
    ]
    return joined_prompts(rows, processor.tokenizer).to(answerer.model.device)


def _generate(answerer, run: Run, questions, encoded, first_answers, max_new_tokens):
    """The texts, the output of `generate`, and the prompts."""
    inputs = _prompts(answerer, questions, encoded, first_answers)
    outputs = answerer.model.generate(
        **inputs,
        mm_encoder_outputs={"video": _together(encoded, questions)},
        holitom_config=run.settings,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
    )
    new = outputs.sequences[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in answerer.processor.batch_decode(new, skip_special_tokens=True)], outputs, inputs


def _first_answers(answerer, run: Run, questions, encoded, max_new_tokens) -> list[str | None]:
    """What the run says to the questions that come before; `None` for those that come first themselves."""
    second = [question for question in questions if question.before is not None]
    if not second:
        return [None] * len(questions)
    before = [replace(question, text=question.before, before=None) for question in second]
    texts, _, _ = _generate(answerer, run, before, encoded, [None] * len(before), max_new_tokens)
    answers = {question.id: text for question, text in zip(second, texts)}
    return [answers.get(question.id) for question in questions]


def _answer(answerer, run: Run, questions, encoded, max_new_tokens, counted: set[str]) -> list[Result]:
    model = answerer.model
    first_answers = _first_answers(answerer, run, questions, encoded, max_new_tokens)
    start = time.perf_counter()
    texts, outputs, inputs = _generate(answerer, run, questions, encoded, first_answers, max_new_tokens)
    seconds = (time.perf_counter() - start) / len(questions)

    num_visual = [len(encoded[question.video].features.pooler_output[0]) for question in questions]
    savings = row_savings(cache_of(outputs), inputs["attention_mask"], num_visual, model.config.text_config)
    num_text = [n - visual for n, visual in zip(inputs["attention_mask"].sum(1).tolist(), num_visual)]
    merging: dict[str, float] = {}
    results = []
    for row, question in enumerate(questions):
        is_counted = question.id in counted
        video = encoded[question.video]
        if question.video not in merging or run.settings.needs_question:
            merging[question.video] = merging_operations(model, video, run.settings, num_text[row])
        results.append(
            Result(
                run=run.name,
                id=question.id,
                video=question.video,
                type=question.type,
                answer=texts[row],
                is_right=is_right(texts[row], question.answer),
                tokens_outer=savings[row].visual_tokens_outer,
                tokens_inner=savings[row].visual_tokens_inner,
                flops=savings[row].flops,
                flops_counted=_count(answerer, run, question, encoded, first_answers[row]) if is_counted else None,
                seconds=seconds,
                settings=changed_settings(run.settings),
                operations=first_token_operations(
                    model, video, run.settings, savings[row], num_text[row], merging[question.video]
                ),
                first_answer=first_answers[row],
            )
        )
    return results


def _count(answerer, run: Run, question: VideoQuestion, encoded, first_answer: str | None) -> float:
    """Operations of merging, decoder and one output token as torch counts them."""
    inputs = _prompts(answerer, [question], encoded, [first_answer])
    together = {"video": _together(encoded, [question])}
    return counted(
        lambda: answerer.model(**inputs, mm_encoder_outputs=together, holitom_config=run.settings, logits_to_keep=1)
    )
