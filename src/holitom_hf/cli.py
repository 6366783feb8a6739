"""The command line: `holitom-hf answer` and `holitom-hf convert`."""

import contextlib
import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table


app = typer.Typer(
    help="HoliTom: video language models on a tenth of the tokens, inside transformers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
DEFAULT_MODEL = "llava-hf/llava-onevision-qwen2-7b-ov-hf"

# torch and transformers are imported where a command needs them, so that `--help` is there at once.


@contextlib.contextmanager
def _one_line_errors():
    """What a caller may have got wrong becomes one line on stderr and exit code 1."""
    try:
        yield
    except (OSError, ValueError, TypeError, ImportError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        print("interrupted", file=sys.stderr)
        raise typer.Exit(130) from error


def _settings(preset: str | None, retention_ratio: float | None):
    """The settings that the options ask for, or `None` for the checkpoint's own."""
    from .configuration_holitom import HoliTomConfig

    settings = HoliTomConfig.coerce(preset) if preset is not None else None
    if settings is not None and retention_ratio is not None:
        settings = replace(settings, retention_ratio=retention_ratio)
    return settings


def _quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@app.command()
def answer(
    video: Annotated[str, typer.Argument(help="Video file or URL.")],
    question: Annotated[str, typer.Argument(help="What to ask about it.")],
    model: Annotated[str, typer.Option(help="Folder or Hub repository of a LLaVA-OneVision model.")] = DEFAULT_MODEL,
    preset: Annotated[str | None, typer.Option(help="Settings by name, or a JSON file of them.")] = None,
    retention_ratio: Annotated[float | None, typer.Option(help="Share of visual tokens to keep, 0 < R <= 1.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames to take; default: at most the model's 32.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 256,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, or auto to spread the layers.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, nothing else.")] = False,
) -> None:
    """Answers a question about a video, and tells what the compression saved."""
    console = Console(stderr=True)

    def step(text: str):
        return contextlib.nullcontext() if as_json else console.status(text)

    with _one_line_errors():
        settings = _settings(preset, retention_ratio)
        with step("Loading torch and transformers"):
            from .answering import Answerer, TextPrinter
        _quiet()
        with step("Decoding the video"):
            answerer = Answerer(model, settings, retention_ratio, device=device, dtype=dtype)
            inputs = answerer.prepare(video, question, num_frames=frames)
        with step(f"Loading {model}"):
            answerer.load_model()
        with step(f"Encoding {inputs.num_frames} frames"):
            answerer.encode(inputs)
        printer = None if as_json else TextPrinter(answerer.processor.tokenizer)
        result = answerer.generate(inputs, max_new_tokens=max_new_tokens, streamer=printer)

    if as_json:
        print(json.dumps(result.to_dict()))
        return
    Console().print(_summary(result))


def _summary(result) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column()
    table.add_row("frames", f"{result.num_frames}, in {result.num_segments} segments")
    table.add_row(
        "visual tokens",
        f"{result.visual_tokens_before} -> {result.visual_tokens_outer} before the decoder -> "
        f"{result.visual_tokens_inner} after layer {result.inner_merge_layer}"
        if result.inner_merge_layer is not None
        else f"{result.visual_tokens_before} -> {result.visual_tokens_outer}",
    )
    table.add_row("prefill FLOPs", f"{result.flops_share:.1%} of the uncompressed decoder's (the paper's formula)")
    seconds = result.seconds
    table.add_row(
        "seconds",
        f"{seconds['decode']:.2f} decode, {seconds['encode']:.2f} encode, {seconds['first_token']:.2f} merge and "
        f"first token, {seconds['generate']:.2f} answer ({result.num_answer_tokens} tokens)",
    )
    return table


@app.command()
def convert(
    base: Annotated[str, typer.Argument(help="Folder or Hub repository of a LLaVA-OneVision model.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist or be empty.")],
    config_only: Annotated[bool, typer.Option(help="Write no weights, only where they come from.")] = False,
    preset: Annotated[str | None, typer.Option(help="Settings by name, or a JSON file of them.")] = None,
    retention_ratio: Annotated[float | None, typer.Option(help="Share of visual tokens to keep, 0 < R <= 1.")] = None,
) -> None:
    """Writes a checkpoint that loads compressed with trust_remote_code=True, and uncompressed without."""
    with _one_line_errors():
        if out.is_file() or (out.is_dir() and any(out.iterdir())):
            raise ValueError(f"{out} exists and is not an empty folder: choose another")
        settings = _settings(preset, retention_ratio)
        from .converting import write_checkpoint

        _quiet()
        start = time.perf_counter()
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
            # Written beside, then moved: what stands under the name is never half a checkpoint.
            write_checkpoint(base, Path(folder), settings, retention_ratio, config_only)
            if out.is_dir():
                out.rmdir()
            os.chmod(folder, 0o755)
            os.rename(folder, out)
            Path(folder).mkdir()
        size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
        print(f"Wrote {out} ({size / 2**20:.2f} MiB) in {time.perf_counter() - start:.1f} s.")


if __name__ == "__main__":
    app()
