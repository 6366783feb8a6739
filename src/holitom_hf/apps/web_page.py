"""A web page that answers questions about a video twice, uncompressed and with HoliTom, side by side."""

import io
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gradio as gr
import numpy as np
import torch
from PIL import Image
from transformers import TextIteratorStreamer
from transformers.utils import logging
from transformers.video_utils import VideoMetadata

from ..answering.answerer import Answer, Answerer, PreparedQuestion
from ..bundled.questions import Question, draw_set, is_countable, uniform_times
from ..configuration import HoliTomConfig
from ..evaluation.methods import full_run
from ..video.decoding import read_video
from ..video.encoding import write_video
from ..video.limits import VideoLimits
from .picture_files import figure_of, merge_frames


logger = logging.get_logger(__name__)

MAX_UPLOAD = "200mb"
MAX_SECONDS = 3600
MAX_QUESTION = 500  # characters
MAX_NEW_TOKENS = 128
TOKEN_TIMEOUT = 600.0  # seconds to wait for the next piece of an answer
EXAMPLE_TYPES, EXAMPLE_SEED = ("motion", "scene order", "relation"), 7
TITLE = "HoliTom: video language models on a tenth of the tokens"
ABOUT = (
    f"# {TITLE}\nThe same model answers twice: from all of the video's tokens, and from those that "
    "[HoliTom](https://arxiv.org/abs/2505.21334) leaves. Times are of runs like one before: the first of its kind "
    "takes longer, and is not shown."
)
RATIO_HELP = "Of all the video's tokens, how many the decoder gets. Less is faster, and loses more."
THRESHOLD_HELP = (
    "Where a patch of the picture resembles the same patch of the next frame more than this (cosine similarity, 1: no "
    "difference), it counts as standing still, and one token does for all those frames. Lower: more counts as still."
)
BROKEN = "This file can't be read as a video. It may be damaged, cut off, too large, or hold no pictures: try another."


class DemoError(Exception):
    """What a visitor is told; nothing in it comes from the machine."""


def draw_examples(folder: Path) -> list[tuple[str, Question]]:
    """
    Writes drawn clips to try, one for each of [`EXAMPLE_TYPES`].

    Returns:
        A video's path and a question for each.
    """
    examples = []
    for clip, questions in draw_set(200, "test", seed=EXAMPLE_SEED):
        wanted = [q for q in questions if q.type == EXAMPLE_TYPES[len(examples)]]
        if wanted and is_countable(clip):
            path = folder / f"clip{len(examples) + 1}.mp4"
            write_video(path, clip.render(uniform_times(48), 224), fps=8)
            examples.append((str(path), wanted[0]))
        if len(examples) == len(EXAMPLE_TYPES):
            break
    return examples


def check_request(video: str | None, question: str | None) -> str:
    """
    The question, tidied.

    Raises:
        DemoError: If something is missing, or more than the page is for.
    """
    question = " ".join((question or "").split())
    if not video:
        raise DemoError("Upload or record a video first, or choose an example.")
    if not question:
        raise DemoError("Ask something about the video.")
    if len(question) > MAX_QUESTION:
        raise DemoError(f"The question is too long: at most {MAX_QUESTION} characters.")
    return question


def figures_text(answer: Answer, peak_memory: int | None, settings: HoliTomConfig) -> str:
    """What an answer took, as a Markdown table."""
    seconds = answer.seconds
    speed = (answer.num_answer_tokens - 1) / seconds["generate"] if answer.num_answer_tokens > 1 else None
    after = (
        f", {answer.visual_tokens_inner} after layer {answer.inner_merge_layer}" if answer.inner_merge_layer else ""
    )
    own = f"R = {100 * settings.retention_ratio:g} %, tau = {settings.similarity_threshold:g}"
    rows = [
        ("set", own if settings.shortens else "all tokens"),
        ("video tokens", f"{answer.visual_tokens_outer} of {answer.visual_tokens_before}{after}"),
        ("prefill FLOPs", f"{answer.flops_share:.1%}"),
        ("first token", f"{seconds['encode'] + seconds['first_token']:.2f} s ({seconds['encode']:.2f} s vision)"),
        ("then", f"{speed:.1f} tokens/s" if speed else "one token"),
        ("KV cache", f"{answer.cache_bytes / 2**20:.1f} MiB"),
    ]
    if answer.computed_patches is not None:
        rows.insert(1, ("patches computed", f"{answer.computed_patches:.1%} in the tower's later layers"))
    if peak_memory is not None:
        rows.append(("peak GPU memory", f"{peak_memory / 2**30:.2f} GiB"))
    head, *lines = (f"| {name} | {value} |" for name, value in rows)
    return "\n".join([head, "| --- | --- |", *lines])


class SideBySide:
    """Answers one visitor's question after another."""

    def __init__(self, answerer: Answerer, num_frames: int | None = None):
        """
        Args:
            answerer: With its weights loaded.
            num_frames: Frames to take of each video, of a shorter one all; `None`: as many as the processor's.
        """
        self.answerer = answerer
        if num_frames is not None:
            answerer.processor.video_processor.num_frames = num_frames
        self.own = answerer.config.holitom_config
        self.plain = full_run(self.own).settings
        self.warm_at: set[int] = set()  # numbers of frames that the machine has seen
        self.is_cuda = answerer.model.device.type == "cuda"

    def settings(self, retention_percent: float, similarity_threshold: float) -> HoliTomConfig:
        """The checkpoint's settings with the sliders' values."""
        return replace(self.own, retention_ratio=retention_percent / 100, similarity_threshold=similarity_threshold)

    def answer(
        self, video: str | None, question: str | None, retention_percent: float, similarity_threshold: float
    ) -> Iterator[tuple[str, str, str, str, Image.Image | None]]:
        """
        Both answers as they grow: plain text, its figures, HoliTom's text, its figures, and at last the picture, if
        anything was merged.

        Raises:
            gr.Error: With one sentence, whatever went wrong.
        """
        try:
            question = check_request(video, question)
            yield from self._answer_both(video, question, self.settings(retention_percent, similarity_threshold))
        except DemoError as error:
            raise gr.Error(str(error), print_exception=False) from None
        except Exception as error:
            logger.error("a question could not be answered", exc_info=error)
            raise gr.Error(
                "Something went wrong here. Try another video or question.", print_exception=False
            ) from None

    def _answer_both(self, video: str, question: str, settings: HoliTomConfig):
        frames, metadata = self._read(video)
        if len(frames) not in self.warm_at:
            self._warm_up(frames, metadata, question, settings)
        prepared, peak = self._encoded(frames, metadata, question)
        shown = ["", "", "", ""]
        for column, chosen in ((0, self.plain), (2, settings)):
            for text, figures in self._answer(prepared, chosen, peak):
                shown[column : column + 2] = text, figures
                yield (*shown, None)
        if not settings.has_outer_stage:
            return  # R = 100 %: there is nothing to show
        file = io.BytesIO()
        view = merge_frames(self.answerer, frames, settings, question, metadata)
        figure_of(view).savefig(file, format="png", dpi=130)
        yield (*shown, Image.open(file))

    def _read(self, video: str) -> tuple[torch.Tensor, VideoMetadata]:
        """(F, 3, H, W) frames of an uploaded file, which is a stranger's, though it lies here, and their times."""

        def chosen(metadata: VideoMetadata) -> np.ndarray:
            if metadata.duration > MAX_SECONDS:
                raise DemoError(f"The video is longer than {MAX_SECONDS // 60} minutes: cut it first.")
            return self.answerer.processor.video_processor.frames_to_read(metadata)

        try:
            return read_video(video, chosen, VideoLimits())
        except (OSError, ValueError) as error:
            raise DemoError(BROKEN) from error

    def warm_up(self, video: str, question: Question) -> None:
        """Before the first visitor, whose video will mostly be as long as this one."""
        self._warm_up(*self._read(video), question.text, self.own)

    def _warm_up(self, frames: torch.Tensor, metadata: VideoMetadata, question: str, settings: HoliTomConfig) -> None:
        """Runs both columns once for nothing: the first run at a length would be a slow one, of the first column."""
        prepared, peak = self._encoded(frames, metadata, question)
        for chosen in (self.plain, settings):
            for _ in self._answer(prepared, chosen, peak):
                pass
        self.warm_at.add(len(frames))

    def _encoded(self, frames: torch.Tensor, metadata: VideoMetadata, question: str) -> tuple[PreparedQuestion, int]:
        """What both columns start from, since the vision tower does the same for both; and the memory it took."""
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        prepared = self.answerer.prepare(frames, question, metadata=metadata)
        self.answerer.encode(prepared)
        return prepared, torch.cuda.max_memory_allocated() if self.is_cuda else 0

    def _answer(
        self, prepared: PreparedQuestion, settings: HoliTomConfig, tower_peak: int
    ) -> Iterator[tuple[str, str]]:
        """One answer as it grows, and its figures at the end."""
        answerer, tokenizer = self.answerer, self.answerer.processor.tokenizer
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=TOKEN_TIMEOUT)
        outcome: list[Answer | Exception] = []

        def work():
            try:
                if self.is_cuda:
                    torch.cuda.reset_peak_memory_stats()
                outcome.append(answerer.generate(prepared, MAX_NEW_TOKENS, streamer, settings))
            except Exception as error:
                outcome.append(error)
                streamer.end()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        text = ""
        for piece in streamer:
            text += piece
            yield text, ""
        thread.join()
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        peak = max(tower_peak, torch.cuda.max_memory_allocated()) if self.is_cuda else None
        yield outcome[0].text, figures_text(outcome[0], peak, settings)


def build_app(answerer: Answerer, about: str = "", num_frames: int | None = None) -> gr.Blocks:
    """
    The page.

    Args:
        answerer: With its weights loaded.
        about: What visitors should know of the model.
        num_frames: Frames to take of each video, of a shorter one all; `None`: at most the processor's.

    Returns:
        An app for `launch(**LAUNCH_OPTIONS)`.
    """
    side_by_side = SideBySide(answerer, num_frames)
    own = side_by_side.own
    examples = draw_examples(Path(tempfile.mkdtemp(prefix="holitom-examples-")))
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 3600)) as app:
        gr.Markdown(f"{ABOUT}\n\n{about}")
        with gr.Row():
            with gr.Column(scale=2):
                video = gr.Video(label="Video", sources=["upload", "webcam"], height=320)
            with gr.Column(scale=3):
                question = gr.Textbox(
                    label="Question", max_length=MAX_QUESTION, placeholder=f"for example: {examples[0][1].text}"
                )
                percent = round(100 * own.retention_ratio, 1)
                ratio = gr.Slider(2, 100, percent, step=1, label="R: percent of the tokens to keep", info=RATIO_HELP)
                threshold = gr.Slider(
                    0.5,
                    0.99,
                    own.similarity_threshold,
                    step=0.01,
                    label="tau: what counts as standing still",
                    info=THRESHOLD_HELP,
                )
                ask = gr.Button("Ask", variant="primary")
        with gr.Row():
            outputs = []
            for name in ("Uncompressed", "HoliTom"):
                with gr.Column():
                    outputs.append(gr.Textbox(label=name, lines=3, interactive=False, elem_id=name.lower()))
                    outputs.append(gr.Markdown())
        gr.Markdown("### What HoliTom made of every token")
        picture = gr.Image(show_label=False, interactive=False, buttons=["download", "fullscreen"])
        inputs = [video, question, ratio, threshold]
        gr.Examples([[path, question.text] for path, question in examples], [video, question], cache_examples=False)
        # One after another: answers that share the machine would spoil each other's times.
        for event in (ask.click, question.submit):
            event(side_by_side.answer, inputs, [*outputs, picture], concurrency_limit=1, concurrency_id="model")
    side_by_side.warm_up(*examples[0])
    return app


LAUNCH_OPTIONS = {"max_file_size": MAX_UPLOAD, "show_error": False, "footer_links": []}
