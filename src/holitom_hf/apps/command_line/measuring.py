"""Commands that measure: `questions`, `evaluate`, `flops`, `bench`."""

import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from ...bundled import BUNDLED_NAME
from .options import (
    MODEL_HELP,
    Device,
    Dtype,
    ManyValues,
    Preset,
    RetentionRatio,
    find_model,
    one_line_errors,
    progress_bar,
    quiet,
    settings_of,
)


app = typer.Typer()
SIZES = ("0.5b", "7b", "72b", "tiny")  # of models with random weights
LLAVA_VIDEO_SIZES = ("llava-video-7b", "llava-video-small")
QWEN_SIZES = ("qwen2.5-vl-7b", "qwen3-vl-8b", "qwen3-vl-30b-a3b", "qwen3.5-9b", "qwen3.5-35b-a3b")
QWEN_SIZES += ("qwen2.5-vl-small", "qwen3-vl-small", "qwen3-vl-moe-small", "qwen3.5-small", "qwen3.5-moe-small")
ALL_SIZES = (*SIZES, *QWEN_SIZES, *LLAVA_VIDEO_SIZES)
USUAL_FRAMES = "64 for LLaVA-Video, 32 for others."
# Options of drawn sets.
SPLIT_HELP = (
    "train, validation (to choose by), test, unseen (of another kind), or unseen-turns (the same kind, each question "
    "after another one); they never meet."
)
Split = Annotated[str, typer.Option(help=SPLIT_HELP)]
Seed = Annotated[int, typer.Option(min=0, help="Another seed, another set.")]
# Options that the benchmarks share.
Redundancy = Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of synthetic tokens that repeat.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of the CPU; default: torch's.")]
Rounds = Annotated[int, typer.Option(min=1, help="Measurements of each step.")]
Compare = Annotated[Path | None, typer.Option(help="Earlier result: tell what got slower since.")]
FrameSize = Annotated[
    tuple[int, int] | None,
    typer.Option(help="Height and width of frames in pixels, for models that take several; default: 14 x 14 tokens."),
]


@app.command()
def questions(
    out: Annotated[Path, typer.Argument(help="Folder for the videos and questions.jsonl.")],
    num_questions: Annotated[int, typer.Option(min=1, help="Number of questions.")] = 1000,
    split: Split = "test",
    seed: Seed = 0,
    side: Annotated[int, typer.Option(help="Width and height of the videos in pixels.")] = 224,
) -> None:
    """Draws clips with questions and exact answers, and writes them as H.264 files."""
    with one_line_errors():
        from ...bundled.questions import write_set

        written = write_set(out, num_questions, split, seed, side, progress=progress_bar("Writing videos"))
        num_videos = len({question.video for question in written})
        counts = f"{len(written)} question{'s' * (len(written) > 1)} about {num_videos} video{'s' * (num_videos > 1)}"
        print(f"Wrote {counts} to {out}.")


@app.command(cls=ManyValues)
def evaluate(
    model: Annotated[
        list[str] | None,
        typer.Option(help=f"{MODEL_HELP} Several are compared on one page.", show_default=BUNDLED_NAME),
    ] = None,
    methods: Annotated[list[str] | None, typer.Option(help="Methods to compare; all, the default: every one.")] = None,
    preset: Annotated[list[str] | None, typer.Option(help="Rows of these presets or JSON files.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option(help="Rows of the model's settings with these fields of JSON in their place.")
    ] = None,
    retention_ratios: Annotated[
        list[float] | None, typer.Option(help="Values of R; default: 0.25 ... 0.02, or what a preset or settings say.")
    ] = None,
    ablations: Annotated[bool, typer.Option(help="The paper's ablations, too.")] = False,
    vision: Annotated[bool, typer.Option(help="A vision tower that leaves something out, too.")] = False,
    questions: Annotated[Path | None, typer.Option(help="A set of questions; default: one drawn into --out.")] = None,
    num_questions: Annotated[int, typer.Option(min=1, help="Size of the set that is drawn.")] = 1000,
    split: Annotated[
        list[str] | None,
        typer.Option(help=f"{SPLIT_HELP} Several are compared on one page.", show_default="test"),
    ] = None,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="Folder for answers, tables and plots; a stopped run goes on.")] = Path(
        "evaluation"
    ),
    batch_size: Annotated[int, typer.Option(min=1, help="Questions at once.")] = 32,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """
    Accuracy against FLOPs on drawn video questions, for HoliTom and the methods it competes with.

    With several models or splits each pair has its folder in --out, and comparison.md and comparison.png say who is
    ahead at equal operations.
    """
    with one_line_errors():
        names, splits = model or [BUNDLED_NAME], split or ["test"]
        found = [find_model(name) for name in names]
        from ...bundled.questions import read_set, write_set
        from ...evaluation import methods as rows

        quiet()
        from ...answering.answerer import Answerer
        from ...evaluation.comparison import Panel, write_comparison
        from ...evaluation.report import summarize, write_report
        from ...evaluation.running import evaluate as answer_all

        labels = [Path(name).name for name in names]
        if questions is not None and len(splits) > 1:
            raise ValueError("--questions is one set: give it without --split")
        if len(set(labels)) < len(labels) or len(set(splits)) < len(splits):
            raise ValueError(
                "each model needs a name of its own, as each split has: their folders in --out have these names"
            )
        command = "holitom-hf " + shlex.join(sys.argv[1:])
        is_single = len(names) == len(splits) == 1
        panels = []
        for label, (name, hub) in zip(labels, found):
            answerer = Answerer(name, device=device, dtype=dtype, hub=hub)
            own = answerer.config.holitom_config
            given = [*(preset or []), *map(_json_object, settings or [])]
            wanted = methods or ([] if given or vision else list(rows.ROWS))
            runs = rows.method_runs(own, wanted, retention_ratios or list(rows.RETENTION_RATIOS))
            runs += rows.settings_runs(own, given, retention_ratios)
            if ablations:
                runs += rows.ablation_runs(own, answerer.config.text_config.num_hidden_layers)
            if vision:
                runs += rows.vision_runs(own)
            answerer.load_model()
            for part in splits:
                folder = questions or out / f"{part}-{seed}-{num_questions}"
                if questions is None and not (folder / "questions.jsonl").is_file():
                    write_set(folder, num_questions, part, seed, progress=progress_bar("Writing videos"))
                asked = read_set(folder)
                title = f"{label}, {part}"
                here = out if is_single else out / f"{label}-{part}"
                bar = progress_bar("Answering" if is_single else f"Answering {title}")
                results = answer_all(answerer, folder, asked, runs, here, batch_size, progress=bar)
                panels.append(Panel(title, summarize(results, runs), results))
                files = write_report(panels[-1].rows, results, command, here)
        page = out / ("table.md" if is_single else "comparison.md")
        if not is_single:
            files = write_comparison(panels, command, out)
        print(page.read_text())
        print("Wrote " + ", ".join(map(str, files)) + ".")


@app.command()
def flops(
    model: Annotated[
        str,
        typer.Option(help=f"{', '.join(ALL_SIZES)}, bundled, or a folder or Hub repository (its config)."),
    ] = "7b",
    preset: Preset = None,
    retention_ratio: RetentionRatio = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of the video; default: " + USUAL_FRAMES)] = None,
    size: FrameSize = None,
    text_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt beside the video's.")] = 34,
    redundancy: Redundancy = 0.6,
    computed: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of patches computed where the tower leaves some out.")
    ] = 0.35,
) -> None:
    """Operations of a prompt up to its first token: by the paper's formula, and exactly."""
    with one_line_errors():
        name, hub = (model, {}) if model in ALL_SIZES else find_model(model)
        settings = settings_of(preset, retention_ratio)
        quiet()
        from ...benchmarking.architectures import architecture, usual_frames
        from ...benchmarking.exact_flops import compare_flops
        from ...benchmarking.models import check_loads
        from ...benchmarking.report import flops_table
        from ...merging.registry import METHODS
        from ...models.registry import backbone_class, backbone_of

        if model in ALL_SIZES:
            config = architecture(model, settings)
        else:
            options = {} if settings is None else {"holitom_config": settings}
            config = backbone_class(backbone_of(name, **hub), "config").from_pretrained(name, **options, **hub)
        if retention_ratio is not None:
            config.holitom_config.retention_ratio = retention_ratio
        check_loads(config)
        frames = frames or usual_frames(config)
        print(flops_table(*compare_flops(config, frames, text_tokens, redundancy, computed, size)))
        print(
            f"\n{frames} frames, {text_tokens} tokens of text, R = {config.holitom_config.retention_ratio:.0%}. The "
            "paper's formula counts a multiplication and its addition\nas one operation, the exact rows as two, as "
            "torch does."
        )
        if config.holitom_config.has_outer_stage and config.holitom_config.newline_position == "row":
            print("Newlines are those of rows with a token, if what is left lies anywhere in its frame.")
        if config.holitom_config.has_vision_stage:
            first = config.holitom_config.vision_reuse_layer + 1
            print(f"From the tower's layer {first} on {computed:.0%} of the patches are computed (--computed).")
        if config.holitom_config.outer_method == "holitom":
            print(f"Exact for scenes of 8 frames in which {redundancy:.0%} of the tokens repeat.")
        elif config.holitom_config.has_outer_stage and (
            METHODS[config.holitom_config.outer_method].group == "ablation"
        ):
            print(f"What {config.holitom_config.outer_method} itself computes before the decoder is not counted.")


@app.command(cls=ManyValues)
def bench(
    arch: Annotated[str, typer.Option(help=f"With random weights: {', '.join(ALL_SIZES)}.")] = "tiny",
    preset: Preset = None,
    retention_ratio: RetentionRatio = None,
    frames: Annotated[int | None, typer.Option(min=2, help="Frames of each video; default: " + USUAL_FRAMES)] = None,
    size: FrameSize = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at once, each with a video.")] = 1,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 32,
    redundancy: Redundancy = 0.6,
    rounds: Rounds = 5,
    largest_batch: Annotated[
        int | None, typer.Option(min=1, help="Measure throughput, too, up to this batch.")
    ] = None,
    attn: Annotated[str, typer.Option(help="eager, sdpa, flash_attention_2, ...")] = "sdpa",
    compile_vision: Annotated[bool, typer.Option(help="Run the vision tower through torch.compile.")] = False,
    vision_reuse_layer: Annotated[
        int | None,
        typer.Option(min=1, help="Measure HoliTom, too, with a tower that leaves something out from this layer on."),
    ] = None,
    vision_methods: Annotated[
        list[str] | None, typer.Option(help="What it leaves out: reuse, frames, tome; default: the first.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 or mps; auto: the best there is.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16; auto: bfloat16 but on a CPU.")] = "auto",
    threads: Threads = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    compare: Compare = None,
) -> None:
    """
    Upstream's class against ours, step by step, with random weights; where there is none (LLaVA-Video), ours without
    compression.
    """
    with one_line_errors():
        settings = settings_of(preset, retention_ratio)

        from ...benchmarking import report
        from ...benchmarking.architectures import architecture, usual_frames
        from ...benchmarking.measuring import machine
        from ...benchmarking.measuring import threads as torch_threads
        from ...benchmarking.model_benchmark import run_model_benchmark

        quiet()
        old = report.read_result(compare) if compare is not None else None
        config = architecture(arch, settings)
        if settings is None:
            # The paper's for 7B, as far as the depth allows.
            config.holitom_config.similarity_threshold = 0.65
            config.holitom_config.retention_ratio = 0.1 if retention_ratio is None else retention_ratio
        config.holitom_config.check_decoder_depth(config.text_config.num_hidden_layers)
        place, kind = _place(device, dtype)
        with torch_threads(threads):
            result = run_model_benchmark(
                config,
                frames or usual_frames(config),
                batch_size,
                place,
                kind,
                attn,
                redundancy,
                new_tokens,
                rounds,
                largest_batch,
                compile_vision,
                _vision_variants(vision_reuse_layer, vision_methods),
                progress_bar("Measuring"),
                size,
            )
            print(report.model_table(result))
            _finish(out, old, machine(place), result)


@app.command(cls=ManyValues)
def scaling(
    out: Annotated[Path, typer.Argument(help="Folder for scaling.json, scaling.md and scaling.png.")],
    preset: Preset = "llava-onevision-7b-r10",
    frames: Annotated[list[int] | None, typer.Option(help="Numbers of frames; default: 8 ... 1024.")] = None,
    batch_sizes: Annotated[list[int] | None, typer.Option(help="Batch sizes; default: 1 ... 8.")] = None,
    retention_ratios: Annotated[list[float] | None, typer.Option(help="Values of R; default: 0.05 ... 0.5.")] = None,
    dim: Annotated[int, typer.Option(min=1, help="Size of a token.")] = 3584,
    rounds: Rounds = 7,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 or mps; auto: the best there is.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16; auto: bfloat16 but on a CPU.")] = "auto",
    threads: Threads = None,
    compare: Compare = None,
) -> None:
    """Time and memory of HoliTom's stages against frames, batch and retention."""
    with one_line_errors():
        settings = settings_of(preset, None)
        try:
            import matplotlib  # noqa: F401
        except ModuleNotFoundError as error:
            raise ImportError("plots need matplotlib: pip install 'holitom-hf[plots]'") from error
        from ...benchmarking import report
        from ...benchmarking import scaling as growth
        from ...benchmarking.measuring import machine
        from ...benchmarking.measuring import threads as torch_threads
        from ...benchmarking.stage_benchmark import machine_limits

        old = report.read_result(compare) if compare is not None else None
        place, kind = _place(device, dtype)
        with torch_threads(threads):
            limits = machine_limits(place)
            results = growth.run_scaling(
                settings,
                place,
                kind,
                limits,
                dim,
                frames or growth.FRAMES,
                batch_sizes or growth.BATCH_SIZES,
                retention_ratios or growth.RETENTION_RATIOS,
                rounds,
                progress_bar("Measuring"),
            )
            usual = next(r for r in results if r.num_frames == min(32, max(r.num_frames for r in results)))
            table = growth.scaling_table(results) + (
                f"\n\nThis machine reads {limits.bytes_per_second / 1e9:.1f} GB/s and multiplies "
                f"{limits.operations_per_second / 1e9:.0f} GFLOP/s in float32. At {usual.num_frames} frames:\n\n"
                + growth.roofline_table(usual)
            )
            print(table)
            _finish(out / "scaling.json", old, machine(place), results)
        (out / "scaling.md").write_text(table + "\n")
        growth.plot_scaling(results, out / "scaling.png")
        print(f"Wrote {out / 'scaling.md'}, {out / 'scaling.png'}.")


def _vision_variants(layer: int | None, methods: list[str] | None) -> dict[str, dict]:
    """Settings of the vision tower to measure, by the method's name."""
    from ...merging.vision_methods import VISION_METHODS

    if layer is None:
        return {}
    return {name: {"vision_method": name, "vision_reuse_layer": layer} for name in methods or VISION_METHODS[:1]}


def _json_object(text: str) -> dict:
    """Fields of settings, typed as JSON."""
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--settings takes a JSON object of settings, got {text!r}: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"--settings takes a JSON object of settings, got {text!r}")
    return fields


def _place(device: str, dtype: str):
    """The torch device and dtype that options name."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, but torch finds no CUDA GPU here: pass --device cpu")
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, got {dtype!r}")
    try:
        return torch.device(device), getattr(torch, dtype)
    except RuntimeError as error:
        raise ValueError(f"there is no device {device!r}: pass auto, cpu, cuda, cuda:1 or mps") from error


def _finish(out: Path | None, old: dict | None, machine: dict, result) -> None:
    """Writes a result and tells what got slower since an earlier one."""
    from ...benchmarking.report import compare, write_result

    with tempfile.TemporaryDirectory() as folder:
        new = write_result(
            out or Path(folder) / "result.json", "holitom-hf " + shlex.join(sys.argv[1:]), machine, result
        )
    if out is not None:
        print(f"Wrote {out}.")
    if old is not None:
        lines = compare(old, new)
        print("\n".join(lines) if lines else "Nothing got slower, larger or more.")
