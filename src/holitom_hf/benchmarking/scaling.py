"""How the stages grow with frames, batch and retention: measurements, fitted laws, plots."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..configuration_holitom import HoliTomConfig
from .report import milliseconds
from .stage_benchmark import STAGES, MachineLimits, StageResult, run_stage_benchmark


FRAMES = (8, 16, 32, 64, 128, 256, 512, 1024)
BATCH_SIZES = (1, 2, 4, 8)
RETENTION_RATIOS = (0.05, 0.1, 0.15, 0.25, 0.5)
# What the stages must grow like (F frames, B videos, R retention): the power of each, at fixed others.
EXPECTED = {
    "similarity": "F",
    "segmentation": "F, and F^2 / 2 steps of the dynamic programme, which are small",
    "stages 1+2": "F",
    "compaction": "F",
    "stage 3": "F^2: every removed token is compared with every kept one",
}


def run_scaling(
    settings: HoliTomConfig,
    device: torch.device | str,
    dtype: torch.dtype,
    limits: MachineLimits,
    dim: int = 3584,
    frames: Sequence[int] = FRAMES,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    retention_ratios: Sequence[float] = RETENTION_RATIOS,
    rounds: int = 7,
    progress: Callable = iter,
) -> list[StageResult]:
    """
    Runs the stage benchmark over frames, batch sizes and retention ratios, one of them at a time.

    Args:
        settings: Those of the run; its retention ratio is that of the runs over frames and batch.
        device, dtype, dim, limits: As in [`run_stage_benchmark`].
        frames, batch_sizes, retention_ratios: What is tried; batch and retention at 32 frames.
        rounds: How often each stage is measured; the largest videos half as often.
        progress: Wraps the runs, as a progress bar does.
    """
    runs = [(settings, count, 1) for count in frames]
    runs += [(settings, min(32, max(frames)), size) for size in batch_sizes if size > 1]
    runs += [
        (replace(settings, retention_ratio=ratio), min(32, max(frames)), 1)
        for ratio in retention_ratios
        if ratio != settings.retention_ratio
    ]
    return [
        run_stage_benchmark(
            run,
            count,
            dim=dim,
            batch_size=size,
            device=device,
            dtype=dtype,
            rounds=max(3, rounds // 2) if count > 128 else rounds,
            limits=limits,
        )
        for run, count, size in progress(runs)
    ]


def growth(results: Sequence[StageResult], stage: str) -> float:
    """The exponent p of seconds ~ F^p over the larger half of the runs that differ only in their frames."""
    points = sorted((r.num_frames, r.seconds[stage].median) for r in over_frames(results))
    points = points[len(points) // 2 - 1 :]
    x, y = [math.log(f) for f, _ in points], [math.log(s) for _, s in points]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / sum((a - mean_x) ** 2 for a in x)


def over_frames(results: Sequence[StageResult]) -> list[StageResult]:
    """The runs that differ only in their number of frames."""
    usual = results[0].retention_ratio
    return [r for r in results if r.batch_size == 1 and r.retention_ratio == usual]


def scaling_table(results: Sequence[StageResult]) -> str:
    """All runs as a Markdown table, and the growth of each stage with the frames."""
    rows = [
        "| frames | batch | R | tokens left | " + " | ".join(STAGES) + " | share of the limit | memory |",
        "| ---: | ---: | ---: | ---: |" + " ---: |" * (len(STAGES) + 2),
    ]
    for r in results:
        seconds = " | ".join(milliseconds(r.seconds[stage].median) for stage in STAGES)
        share = r.floor["stages 1+2"] / r.seconds["stages 1+2"].median
        memory = f"{r.peak_bytes / 2**20:.0f} MiB" if r.peak_bytes is not None else ""
        asked = f"{r.num_frames} | {r.batch_size} | {r.retention_ratio:.0%}"
        rows.append(f"| {asked} | {r.num_tokens} | {seconds} | {share:.0%} | {memory} |")
    rows += [
        "",
        "| stage | expected | time grows with frames to the power of | launches at the fewest and most frames |",
    ]
    rows += ["| --- | --- | ---: | ---: |"]
    series = sorted(over_frames(results), key=lambda r: r.num_frames)
    for stage in STAGES:
        launches = [r.operations[stage].launches for r in (series[0], series[-1])]
        rows.append(f"| {stage} | {EXPECTED[stage]} | {growth(results, stage):.2f} | {launches[0]}, {launches[1]} |")
    return "\n".join(rows)


def roofline_table(result: StageResult) -> str:
    """What each stage must move and compute, what it takes, and the share of the machine's speed that it reaches."""
    rows = ["| stage | bytes | operations | limit | measured | share | launches | waits |"]
    rows += ["| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for stage in STAGES:
        floor, taken, counts = result.floor[stage], result.seconds[stage].median, result.operations[stage]
        # The one transfer of stage 1's table can't be seen on a CPU.
        waits = counts.waits + (stage in ("segmentation", "stages 1+2"))
        work = f"{result.least_bytes[stage] / 2**20:.1f} MiB | {result.least_operations[stage] / 1e6:.0f} M"
        times = f"{milliseconds(floor)} | {milliseconds(taken)} | {floor / taken:.0%}"
        rows.append(f"| {stage} | {work} | {times} | {counts.launches} | {waits} |")
    return "\n".join(rows)


def plot_scaling(results: Sequence[StageResult], path: Path) -> None:
    """Writes a picture: time against frames, memory against frames, time against batch and retention."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    axes = figure.subplots(2, 2)
    series = sorted(over_frames(results), key=lambda r: r.num_frames)
    frames = [r.num_frames for r in series]
    for stage in STAGES:
        times = [1000 * r.seconds[stage].median for r in series]
        axes[0, 0].plot(frames, times, marker="o", label=f"{stage}: F^{growth(results, stage):.2f}")
    floor = [1000 * r.floor["stages 1+2"] for r in series]
    axes[0, 0].plot(frames, floor, color="black", linestyle=":", label="limit of the machine, stages 1+2")
    axes[0, 0].set(xscale="log", yscale="log", xlabel="frames F", ylabel="ms", title="time against frames")
    axes[0, 0].legend(fontsize=8)

    memory = [(r.num_frames, r.peak_bytes / 2**20) for r in series if r.peak_bytes is not None]
    if memory:
        axes[0, 1].plot(*zip(*memory), marker="o", label="stages 1+2, beyond the input")
    item = 4
    inputs = [r.num_frames * r.tokens_per_frame * r.dim * item / 2**20 for r in series]
    axes[0, 1].plot(frames, inputs, color="black", linestyle=":", label="the input, float32")
    axes[0, 1].set(xscale="log", yscale="log", xlabel="frames F", ylabel="MiB", title="memory against frames")
    axes[0, 1].legend(fontsize=8)

    usual = series[0].retention_ratio
    at = next(r.num_frames for r in results if r.batch_size > 1 or r.retention_ratio != usual)
    batches = sorted(
        (r for r in results if r.num_frames == at and r.retention_ratio == usual), key=lambda r: r.batch_size
    )
    ratios = sorted((r for r in results if r.num_frames == at and r.batch_size == 1), key=lambda r: r.retention_ratio)
    for stage in STAGES:
        axes[1, 0].plot(
            [r.batch_size for r in batches], [1000 * r.seconds[stage].median for r in batches], marker="o", label=stage
        )
        axes[1, 1].plot(
            [r.retention_ratio for r in ratios],
            [1000 * r.seconds[stage].median for r in ratios],
            marker="o",
            label=stage,
        )
    axes[1, 0].set(xlabel=f"videos of {at} frames", ylabel="ms", title="time against batch")
    axes[1, 1].set(xlabel="retention ratio R", ylabel="ms", title=f"time against retention, {at} frames")
    axes[1, 0].legend(fontsize=8)
    axes[1, 1].legend(fontsize=8)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
