"""How the stages grow with frames, batch and retention: measurements, fitted laws, plots."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..configuration import HoliTomConfig
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
    "patch plan": "F",
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

    Raises:
        ValueError: If there are fewer than two numbers of frames, or one is below 2.
    """
    if len(set(frames)) < 2 or min(frames) < 2:
        raise ValueError(f"growth needs two or more numbers of frames, each at least 2, got {list(frames)}")
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
        # Transfers to the host can't be seen on a CPU: stage 1's table, and how many patches are computed.
        waits = counts.waits + {"segmentation": 1, "stages 1+2": 1, "patch plan": 2}.get(stage, 0)
        work = f"{result.least_bytes[stage] / 2**20:.1f} MiB | {result.least_operations[stage] / 1e6:.0f} M"
        times = f"{milliseconds(floor)} | {milliseconds(taken)} | {floor / taken:.0%}"
        rows.append(f"| {stage} | {work} | {times} | {counts.launches} | {waits} |")
    return "\n".join(rows)


def plot_scaling(results: Sequence[StageResult], path: Path) -> None:
    """Writes the picture of [`scaling_figure`]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scaling_figure(results).savefig(path, dpi=120)


def scaling_figure(results: Sequence[StageResult]):
    """
    Draws time and memory against frames, batch and retention, as a matplotlib figure: all axes are logarithmic, and
    panels side by side share theirs, so that a straight line is a power and two lines can be compared anywhere.
    """
    from matplotlib.figure import Figure

    usual = results[0].retention_ratio
    series = sorted(over_frames(results), key=lambda r: r.num_frames)
    others = [r.num_frames for r in results if r.batch_size > 1 or r.retention_ratio != usual]
    at = others[0] if others else series[-1].num_frames
    there = [r for r in results if r.num_frames == at]
    batches = sorted((r for r in there if r.retention_ratio == usual), key=lambda r: r.batch_size)
    ratios = sorted((r for r in there if r.batch_size == 1), key=lambda r: r.retention_ratio)
    columns = (
        ([r.num_frames for r in series], series, "frames", f"one video, R = {usual:.0%}"),
        ([r.batch_size for r in batches], batches, "videos at once", f"videos of {at} frames, R = {usual:.0%}"),
        ([100 * r.retention_ratio for r in ratios], ratios, "R in percent", f"one video of {at} frames"),
    )
    figure = Figure(figsize=(13, 8), layout="constrained")
    axes = figure.subplots(2, 3, sharey="row")
    for (above, below), (x, runs, label, title) in zip(axes.T, columns):
        _draw_times(above, x, runs, results)
        _draw_memory(below, x, runs)
        above.set_title(title, fontsize=12)
        for axis in (above, below):
            axis.set(xscale="log", yscale="log")
            axis.set_xticks(x, [f"{value:g}" for value in x], minor=False)
            axis.set_xticks([], minor=True)
            axis.set_xlabel(label, fontsize=11)
            axis.yaxis.set_major_formatter("{x:,g}")
            axis.yaxis.set_minor_formatter("")
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("milliseconds", fontsize=11)
    axes[1, 0].set_ylabel("MiB", fontsize=11)
    # One legend for all panels, outside of them: no line runs behind it.
    drawn = {line.get_label(): line for axis in axes[:, 0] for line in axis.lines}
    figure.legend(
        drawn.values(), drawn.keys(), loc="outside upper center", ncols=4, frameon=False, fontsize=10, handlelength=3
    )
    return figure


def _draw_times(axis, x: list[float], runs: Sequence[StageResult], results: Sequence[StageResult]) -> None:
    """Every stage's time, and the least that the machine needs."""
    for stage, marker in zip(STAGES, "v^osDP"):
        text = f"{stage} ~ F$^{{{growth(results, stage):.2f}}}$"
        # Segmentation holds the similarity and is little more: one shines through the other.
        style = "--" if stage == "similarity" else "-"
        times = [1000 * r.seconds[stage].median for r in runs]
        axis.plot(x, times, style, marker=marker, markersize=5, zorder=3 if stage == "similarity" else 2, label=text)
    floor = [1000 * r.floor["stages 1+2"] for r in runs]
    axis.plot(x, floor, color="black", linestyle=":", label="the machine's limit, stages 1+2")


def _draw_memory(axis, x: list[float], runs: Sequence[StageResult]) -> None:
    """Most memory of stages 1 and 2, where it is known, beside their input."""
    memory = [(value, r.peak_bytes / 2**20) for value, r in zip(x, runs) if r.peak_bytes is not None]
    if memory:
        axis.plot(
            *zip(*memory), color="tab:cyan", marker="o", markersize=5, label="stages 1+2: memory beyond their input"
        )
    inputs = [r.batch_size * r.num_frames * r.tokens_per_frame * r.dim * 4 / 2**20 for r in runs]
    axis.plot(x, inputs, color="black", linestyle="-.", label="their input in float32")
