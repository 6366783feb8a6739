"""The command line, `holitom-hf`."""

import contextlib
import json
import os
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TimeRemainingColumn
from rich.table import Table

from ...bundled import BUNDLED_ABOUT, BUNDLED_NAME
from .calibrating import app as calibrating
from .measuring import app as measuring
from .options import (
    Device,
    Dtype,
    Fps,
    Frames,
    Host,
    MaxNewTokens,
    MaxPixels,
    MinPixels,
    Model,
    Port,
    Preset,
    RetentionRatio,
    check_sampling,
    find_model,
    one_line_errors,
    quiet,
    settings_of,
)
from .vision_calibration import app as vision_calibration


ENGINES = ("transformers", "vllm")
app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(measuring)
app.add_typer(calibrating)
app.add_typer(vision_calibration)

# torch and transformers are imported where a command needs them, so that `--help` is there at once.


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"holitom-hf {version('holitom-hf')}")
        raise typer.Exit()


@app.callback()
def main(
    is_version_asked: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """HoliTom: video language models on a tenth of the tokens, inside transformers."""


@app.command()
def answer(
    video: Annotated[str, typer.Argument(help="Video file or URL.")],
    question: Annotated[str, typer.Argument(help="What to ask about it.")],
    model: Model = BUNDLED_NAME,
    preset: Preset = None,
    retention_ratio: RetentionRatio = None,
    frames: Frames = None,
    fps: Fps = None,
    min_pixels: MinPixels = None,
    max_pixels: MaxPixels = None,
    max_new_tokens: MaxNewTokens = 256,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, nothing else.")] = False,
) -> None:
    """Answers a question about a video, and tells what the compression saved."""
    console = Console(stderr=True)

    def step(text: str):
        return contextlib.nullcontext() if as_json else console.status(text)

    with one_line_errors():
        if not question.strip():
            raise ValueError("the question is empty: ask something about the video")
        check_sampling(frames, fps, min_pixels, max_pixels)
        name, hub = find_model(model)
        settings = settings_of(preset, retention_ratio)
        with step("Loading torch and transformers"):
            from ...answering.answerer import Answerer, TextPrinter
        quiet()
        with step("Decoding the video"):
            answerer = Answerer(name, settings, retention_ratio, device=device, dtype=dtype, hub=hub)
            inputs = answerer.prepare(
                video, question, num_frames=frames, fps=fps, min_pixels=min_pixels, max_pixels=max_pixels
            )
        with step(f"Loading {model}"):
            answerer.load_model()
        with step(f"Encoding {inputs.num_frames} frames"):
            answerer.encode(inputs)
        printer = None if as_json else TextPrinter(answerer.processor.tokenizer)
        result = answerer.generate(inputs, max_new_tokens=max_new_tokens, streamer=printer)

    if as_json:
        print(json.dumps(result.to_dict()))
        return
    newlines = ""
    if hasattr(answerer.model.model, "image_newline"):
        newlines = " (the newline after the video is one of them)"
    if getattr(answerer.config, "newline_layout", None) == "grid":
        newlines = " (newlines after rows are among them)"
    Console().print(_summary(result, newlines, frames))
    if model == BUNDLED_NAME:
        console.print(BUNDLED_ABOUT, style="dim")


def _segments(count: int) -> str:
    return f"{count} segment{'' if count == 1 else 's'}"


def _summary(result, newlines: str, asked: int | None) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column()
    is_cut = result.num_segments < result.num_frames  # else nothing was joined
    taken = f"{result.num_frames}"
    if asked is not None and asked < result.num_frames:
        taken += f" (the last of {asked} repeated: this model takes frames in pairs)"
    table.add_row("frames", f"{taken}, in {_segments(result.num_segments)}" if is_cut else taken)
    if result.computed_patches is not None:
        table.add_row("vision tower", f"{result.computed_patches:.1%} of the patches computed in its later layers")
    tokens = f"{result.visual_tokens_before} -> {result.visual_tokens_outer} before the decoder"
    if result.inner_merge_layer is not None:
        tokens += f" -> {result.visual_tokens_inner} from layer {result.inner_merge_layer} on"
    table.add_row("visual tokens", tokens + newlines)
    table.add_row("prefill FLOPs", f"{result.flops_share:.1%} of the uncompressed decoder's (the paper's formula)")
    seconds = result.seconds
    table.add_row(
        "seconds",
        f"{seconds['decode']:.2f} decode, {seconds['encode']:.2f} encode, {seconds['first_token']:.2f} merge and "
        f"first token, {seconds['generate']:.2f} answer ({result.num_answer_tokens} tokens)",
    )
    return table


@app.command()
def batch(
    inputs: Annotated[str, typer.Argument(help="Folder of videos, JSONL of {id, video, question}, or a dataset.")],
    output: Annotated[Path, typer.Argument(help="JSONL file to write; a stopped run goes on.")],
    question: Annotated[str | None, typer.Option(help="Asked of every video without a question of its own.")] = None,
    split: Annotated[str, typer.Option(help="Of a dataset.")] = "train",
    model: Model = BUNDLED_NAME,
    preset: Preset = None,
    retention_ratio: RetentionRatio = None,
    frames: Frames = None,
    fps: Fps = None,
    min_pixels: MinPixels = None,
    max_pixels: MaxPixels = None,
    max_new_tokens: MaxNewTokens = 256,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Videos at once on each process; default: 8, with --engine vllm 64.")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode ahead, for each process.")] = 2,
    retry_errors: Annotated[bool, typer.Option(help="Try inputs again that ended in an error.")] = False,
    untrusted: Annotated[
        bool,
        typer.Option("--untrusted", help="A stranger wrote the inputs: only files of their folder and public hosts."),
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    engine: Annotated[
        str, typer.Option(help="transformers, or vllm: stages 1 and 2, in continuous batches.")
    ] = ENGINES[0],
    engine_options: Annotated[
        str | None, typer.Option(help="JSON of arguments of vllm.LLM, such as tensor_parallel_size.")
    ] = None,
) -> None:
    """Answers questions about many videos; alone, or under accelerate launch on many GPUs and machines."""
    with one_line_errors():
        check_sampling(frames, fps, min_pixels, max_pixels)
        given_options = _engine_options(engine, engine_options)
        name, hub = find_model(model)
        settings = settings_of(preset, retention_ratio)
        if engine == "vllm":
            from ...models.registry import backbone_of
            from ...vllm import check_installed
            from ...vllm.settings import check_asked

            check_asked(settings, device, backbone_of(name, **hub).keeps_positions)
            check_installed()
        from ..batch.inputs import input_ids, read_inputs

        asked = read_inputs(inputs, question, split)
        quiet()
        from ..batch.answering import answer_all, missing_inputs, run_name
        from ..batch.records import BatchRecords
        from ..batch.untrusted import stranger_sources

        if engine == "vllm":
            from ...vllm.offline import OfflineAnswerer
            from ..batch.engine import OnlyProcess, answer_all_in_engine

            state, answer_everything, of_engine = OnlyProcess(), answer_all_in_engine, {"engine": engine}
            answerer = OfflineAnswerer(name, settings, retention_ratio, dtype, hub, given_options)
        else:
            from accelerate import PartialState

            from ...answering.answerer import Answerer

            state, answer_everything, of_engine = PartialState(cpu=device == "cpu"), answer_all, {}
            if state.num_processes > 1:
                _end_with_launcher()
                device = str(state.device) if device == "auto" else device
            answerer = Answerer(name, settings, retention_ratio, device=device, dtype=dtype, hub=hub)
        limits = answerer.given_limits({"fps": fps, "min_pixels": min_pixels, "max_pixels": max_pixels})
        run = run_name(
            answerer, frames=frames, max_new_tokens=max_new_tokens, question=question, **limits, **of_engine
        )
        records = BatchRecords(output, run)
        if state.is_main_process:
            records.prepare()
        state.wait_for_everyone()
        missing = missing_inputs(asked, records, retry_errors)
        state.wait_for_everyone()  # before anyone adds to what the others still read
        num_before = records.count()
        answerer.load_model()
        sources = stranger_sources(inputs) if untrusted else None
        with _videos_bar(len(missing), is_shown=state.is_main_process) as bar:
            task = bar.tasks[0]

            def add(new: list[dict]) -> None:
                records.add(new, state.process_index)
                bar.update(task.id, completed=records.count() - num_before)

            share = missing[state.process_index :: state.num_processes]
            size = batch_size or (64 if engine == "vllm" else 8)
            answer_everything(answerer, asked, share, add, size, workers, frames, max_new_tokens, sources, limits)
            records.mark_done(state.process_index)
            if state.is_main_process:
                records.wait_for_all(state.num_processes)
                bar.update(task.id, completed=len(missing))
        if state.is_main_process:
            written = records.finish(input_ids(asked))
            num_errors = sum("error" in record for record in written.values())
            print(
                f"Wrote {output}: {len(written)} records, {num_errors} of them errors; {len(missing)} new in "
                f"{task.finished_time or task.elapsed:.1f} s ({_videos_a_second(task)})."
            )
            if written and num_errors == len(written):
                raise ValueError(f"no input was answered; the first one: {next(iter(written.values()))['error']}")


@app.command()
def visualize(
    video: Annotated[str, typer.Argument(help="Video file or URL.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A .png, .mp4 or .html file to write.")],
    question: Annotated[
        str | None, typer.Option(help="What stage 3 is asked; it keeps what matters for that.")
    ] = None,
    model: Model = BUNDLED_NAME,
    preset: Preset = None,
    retention_ratio: RetentionRatio = None,
    frames: Frames = None,
    fps: Fps = None,
    min_pixels: MinPixels = None,
    max_pixels: MaxPixels = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Shows segments, and which tokens of a video are kept, merged and dropped."""
    with one_line_errors():
        check_sampling(frames, fps, min_pixels, max_pixels)
        name, hub = find_model(model)
        settings = settings_of(preset, retention_ratio)
        from ...merging.merged_video import TokenKind

        try:
            from ..picture_files import QUESTION, view_merging, writer_for
        except ModuleNotFoundError as error:
            raise ImportError(f"pictures need {error.name}: pip install 'holitom-hf[plots]'") from error
        write = writer_for(out)
        answerer = _loaded(name, hub, settings, retention_ratio, device, dtype)
        view = view_merging(
            answerer, video, frames, question or QUESTION, fps=fps, min_pixels=min_pixels, max_pixels=max_pixels
        )
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".holitom.") as folder:
            write(view, Path(folder) / out.name)
            os.replace(Path(folder) / out.name, out)
        merged = view.merged
        is_token = merged.kind.cpu() != TokenKind.NEWLINE
        left = ""
        if view.survives is not None:
            left = f", {int((view.survives.cpu() & is_token).sum())} left by stage 3"
        print(
            f"Wrote {out}: {merged.num_input_tokens} tokens of {len(view.frames)} frames in "
            f"{_segments(len(merged.segments))}, {int(is_token.sum())} kept{left}."
        )


@app.command()
def demo(
    model: Model = BUNDLED_NAME,
    preset: Preset = None,
    retention_ratio: RetentionRatio = None,
    frames: Frames = None,
    host: Host = "127.0.0.1",
    port: Port = 7860,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Starts a web page that answers with and without HoliTom, side by side."""
    with one_line_errors():
        name, hub = find_model(model)
        settings = settings_of(preset, retention_ratio)
        try:
            from ..web_page import LAUNCH_OPTIONS, build_app
        except ModuleNotFoundError as error:
            raise ImportError(f"the web page needs {error.name}: pip install 'holitom-hf[demo]'") from error
        answerer = _loaded(name, hub, settings, retention_ratio, device, dtype)
        page = build_app(answerer, BUNDLED_ABOUT if model == BUNDLED_NAME else "", frames)
        page.launch(server_name=host, server_port=port, **LAUNCH_OPTIONS)


@app.command()
def serve(
    model: Model = BUNDLED_NAME,
    preset: Preset = None,
    retention_ratio: RetentionRatio = None,
    frames: Frames = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key: Annotated[str | None, typer.Option(help="What clients must send as Authorization: Bearer.")] = None,
    allowed_hosts: Annotated[
        list[str] | None, typer.Option(help="Name that this server is known by, besides localhost; may be repeated.")
    ] = None,
    allowed_local_media_path: Annotated[
        Path | None, typer.Option(help="Folder whose files requests may name; default: none.")
    ] = None,
    allowed_media_domains: Annotated[
        list[str] | None,
        typer.Option(help="Host that videos may come from, a private one too; may be repeated; default: public ones."),
    ] = None,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Of a request, data URLs included.")] = 2**26,
    max_media_bytes: Annotated[int, typer.Option(min=1, help="Of a downloaded video or picture.")] = 2**28,
    max_fetch_seconds: Annotated[float, typer.Option(min=0, help="Of a download.")] = 60.0,
    max_decode_seconds: Annotated[float, typer.Option(min=0, help="Of decoding a video.")] = 60.0,
    max_pixels: Annotated[int, typer.Option(min=1, help="Of a frame.")] = 4096 * 2304,
    max_frames: Annotated[int, typer.Option(min=1, help="To take of a video.")] = 128,
    max_videos: Annotated[int, typer.Option(min=0, help="Videos and pictures of a request.")] = 4,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="Of a request, videos uncompressed.")] = 32768,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 2048,
    max_queue: Annotated[int, typer.Option(min=1, help="Requests at once, those that wait included.")] = 64,
    max_seconds: Annotated[float, typer.Option(min=0, help="Of a request, waiting included.")] = 300.0,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Starts an OpenAI-compatible server for one compressed model."""
    with one_line_errors():
        name, hub = find_model(model)
        settings = settings_of(preset, retention_ratio)
        try:
            from ..serving.limits import ServingLimits
            from ..serving.server import run_server
        except ImportError as error:
            raise ImportError(f"serving needs more ({error}): pip install 'holitom-hf[serving]'") from error
        from ...video.sources import MediaSources

        limits = ServingLimits(
            max_body_bytes=max_body_bytes,
            max_media_bytes=max_media_bytes,
            max_fetch_seconds=max_fetch_seconds,
            max_decode_seconds=max_decode_seconds,
            max_pixels=max_pixels,
            max_frames=max_frames,
            max_videos=max_videos,
            max_prompt_tokens=max_prompt_tokens,
            max_new_tokens=max_new_tokens,
            max_queue=max_queue,
            max_seconds=max_seconds,
        )
        sources = MediaSources(
            allowed_local_media_path, allowed_media_domains or (), max_media_bytes, max_fetch_seconds
        )
        answerer = _loaded(name, hub, settings, retention_ratio, device, dtype)
        run_server(answerer, model, host, port, frames, limits, sources, allowed_hosts or (), api_key)


@app.command()
def convert(
    base: Annotated[
        str,
        typer.Argument(
            help="Folder or Hub repository, in the format of transformers or of LLaVA's authors; or bundled."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist or be empty.")],
    config_only: Annotated[
        bool,
        typer.Option(help="Write no weights, only where they come from; needs trust_remote_code=True, then."),
    ] = False,
    preset: Preset = None,
    retention_ratio: RetentionRatio = None,
) -> None:
    """Writes a checkpoint that loads compressed with trust_remote_code=True; with weights, uncompressed without."""
    with one_line_errors():
        if out.is_file() or (out.is_dir() and any(out.iterdir())):
            raise ValueError(f"{out} exists and is not an empty folder: choose another")
        base, hub = find_model(base)
        settings = settings_of(preset, retention_ratio)
        from ...checkpoints.writing import is_local
        from ..converting import write_checkpoint

        quiet()
        start = time.perf_counter()
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
            # Written beside, then moved: what stands under the name is never half a checkpoint.
            write_checkpoint(base, Path(folder), settings, retention_ratio, config_only, hub)
            if out.is_dir():
                out.rmdir()
            os.chmod(folder, 0o755)
            os.rename(folder, out)
            Path(folder).mkdir()
        size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
        print(f"Wrote {out} ({size / 2**20:.2f} MiB) in {time.perf_counter() - start:.1f} s.")
        if config_only and is_local(base):
            print(f"Its weights stay in {os.path.abspath(base)}: only this machine can load it.", file=sys.stderr)


def _loaded(name: str, hub: dict, settings, retention_ratio: float | None, device: str, dtype: str):
    """An `Answerer` with its weights."""
    quiet()
    from ...answering.answerer import Answerer

    answerer = Answerer(name, settings, retention_ratio, device=device, dtype=dtype, hub=hub)
    answerer.load_model()
    return answerer


def _engine_options(engine: str, options: str | None) -> dict:
    """
    What `--engine-options` says.

    Raises:
        ValueError: If it is no JSON object, or the engine is none or takes none.
    """
    if engine not in ENGINES:
        raise ValueError(f"--engine is {' or '.join(ENGINES)}, not {engine!r}")
    if options is None:
        return {}
    if engine != "vllm":
        raise ValueError("--engine-options are vLLM's: pass --engine vllm with them")
    try:
        given = json.loads(options)
    except ValueError as error:
        raise ValueError(f"--engine-options: no JSON ({error})") from error
    if not isinstance(given, dict):
        raise ValueError("--engine-options is a JSON object of arguments of vllm.LLM")
    return given


def _end_with_launcher() -> None:
    """Ends this process soon after its launcher: one that was killed takes none along, and they would wait for it."""
    launcher = os.getppid()

    def watch():
        while os.getppid() == launcher:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _videos_bar(total: int, is_shown: bool):
    """A progress bar on stderr with videos a second and the time that is left."""
    columns = ("Answering", BarColumn(), MofNCompleteColumn(), _Speed(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), disable=not is_shown)
    bar.add_task("videos", total=total)
    return bar


class _Speed(ProgressColumn):
    """Videos a second."""

    def render(self, task):
        """Overrides ProgressColumn.render."""
        return _videos_a_second(task)


def _videos_a_second(task) -> str:
    """Over the whole run, so that the bar ends with what is said afterwards; rich's own forgets how it began."""
    seconds = task.finished_time or task.elapsed
    return f"{task.completed / seconds if seconds else 0:.2f} videos/s"


if __name__ == "__main__":
    app()
