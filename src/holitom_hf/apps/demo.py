"""Draws a clip and asks the bundled model five questions about it, plain and compressed."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from ..answering.answerer import Answer, Answerer
from ..bundled import BUNDLED_ABOUT, BUNDLED_MODEL
from ..bundled.questions import Question, draw_set, is_countable, uniform_times
from ..configuration import HoliTomConfig
from ..evaluation.methods import full_run
from ..evaluation.running import is_right
from ..video.encoding import write_video


NUM_QUESTIONS = 5


def write_clip(path: Path, num_frames: int = 64, side: int = 224) -> list[Question]:
    """
    Writes a H.264 clip that the model was not trained on.

    Args:
        path: File to write.
        num_frames: Length in frames, 8 a second.
        side: Width and height in pixels.

    Returns:
        Five questions of different types about it; the first is the one to ask first.
    """
    for clip, questions in draw_set(500, "test", seed=2026):
        by_type = {question.type: question for question in questions}
        if len(by_type) >= NUM_QUESTIONS and "motion" in by_type and len(clip.scenes) == 3 and is_countable(clip):
            write_video(path, clip.render(uniform_times(num_frames), side), fps=8)
            return [by_type.pop("motion"), *by_type.values()][:NUM_QUESTIONS]
    raise LookupError("no clip has questions of enough types")


def main(folder: Annotated[Path, typer.Argument(help="For the clip.")]) -> None:
    """Writes clip.mp4 and, in question.txt, what to ask about it into FOLDER, and answers questions about it."""
    console = Console(width=max(Console().width, 110))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "clip.mp4"
    questions = write_clip(path)
    (folder / "question.txt").write_text(questions[0].text + "\n")
    console.print(f"Wrote {path}. {BUNDLED_ABOUT}", soft_wrap=True)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    answerer = Answerer(str(BUNDLED_MODEL), device="cpu", dtype="float32")
    answerer.load_model()
    own = answerer.config.holitom_config

    def answer(question: Question, settings: HoliTomConfig) -> Answer:
        inputs = answerer.prepare(str(path), question.text)
        answerer.encode(inputs)
        return answerer.generate(inputs, max_new_tokens=8, settings=settings)

    table = Table("question", "truth", "uncompressed", "HoliTom", box=None, padding=(0, 3, 0, 0))
    for question in questions:
        plain, short = answer(question, full_run(own).settings), answer(question, own)
        marks = ["✓" if is_right(given.text, question.answer) else "✗" for given in (plain, short)]
        table.add_row(
            question.text,
            question.answer,
            f"{marks[0]} {plain.text}",
            f"{marks[1]} {short.text}",
        )
    console.print(table)
    console.print(
        f"HoliTom: {short.visual_tokens_before} visual tokens, {short.visual_tokens_outer} before the decoder, "
        f"{short.visual_tokens_inner} from layer {short.inner_merge_layer} on; "
        f"{short.flops_share:.1%} of the uncompressed decoder's FLOPs (the paper's formula; the last question).",
        soft_wrap=True,
    )


if __name__ == "__main__":
    typer.run(main)
