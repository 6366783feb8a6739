"""The tables, claims and plots of an evaluation."""

import itertools
import json
import operator
import platform
from collections.abc import Collection
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from ..bundled.questions import QUESTION_TYPES
from ..merging.vision_methods import REUSE, VISION_METHODS
from .methods import COLORS, MARKERS, ROWS, Run
from .resampling import MIN_VIDEOS, Resampled, interpolated, interval, points, verdict
from .running import Result
from .statistics import is_running, mcnemar


# Which share of the full accuracy is to be kept, by method and retention ratio: the paper's claims, and our aims.
TO_KEEP = {"holitom": {0.15: 0.99, 0.10: 0.98}, "farthest": {0.15: 0.99, 0.10: 0.98, 0.05: 0.96}}

LEGEND_INSIDE = 9  # names that a plot has room for
CAPTION = (
    "Operations up to the first token, as shares of the uncompressed model's. FLOPs: the decoder's, by the paper's "
    "formula. Counted: of merging, decoder and output layer, by torch's counter over a few questions. All operations: "
    "those and vision tower, projector and, for rows that use it, importance, of every question; products and "
    "convolutions, merging as torch counts it while it runs, the rest by formulas that tests hold equal to its count."
)


@dataclass
class Row:
    """
    A run in numbers; intervals are 95 % bootstrap intervals over videos.

    Attributes:
        run, method, retention_ratio, ablation: As in [`Run`].
        num_questions: How many questions were answered.
        accuracy: Share of right answers, with its interval.
        relative: The accuracy as a share of the uncompressed model's, with its interval (same videos in both); `None`
            if that never was right.
        fields: Its settings, those that are not the defaults.
        by_type: Per type of question: accuracy, low, high.
        tokens_outer, tokens_inner: Mean visual tokens before the decoder and after stage 3.
        flops_share: Decoder operations for the prompt as a share of the uncompressed model's, the paper's formula.
        flops_share_counted: The same, as torch counts them over a few questions; `None` where they were not counted.
        operations_share: All operations up to the first token, the vision tower's among them, as a share of the
            uncompressed model's over the same questions; `None` where no result has them.
        seconds: Median time for a question.
        is_running: Whether it shows that it shortens videos, as [`is_running`] has it; a run that does not gets no
            verdict. The uncompressed run is.
        baseline: The run that it is compared with.
        only_ours, only_full: Questions that this run alone, or that one alone, has right.
        mcnemar: Probability of counts at least that unequal by chance (McNemar's exact test).
    """

    run: str
    method: str | None
    retention_ratio: float | None
    ablation: str | None
    num_questions: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    relative: float | None
    relative_low: float | None
    relative_high: float | None
    fields: dict
    by_type: dict[str, tuple[float, float, float]]
    tokens_outer: float
    tokens_inner: float
    flops_share: float
    flops_share_counted: float | None
    operations_share: float | None
    seconds: float
    is_running: bool
    baseline: str
    only_ours: int
    only_full: int
    mcnemar: float

    @property
    def vision_method(self) -> str | None:
        """What the vision tower leaves out; `None`: nothing."""
        return self.fields.get("vision_method", REUSE) if "vision_reuse_layer" in self.fields else None


def _accuracy(results: list[Result]) -> float:
    return sum(result.is_right for result in results) / len(results)


def summarize(results: list[Result], runs: list[Run]) -> list[Row]:
    """
    Numbers per run, in the order of `runs`.

    Args:
        results: Of all runs, the one named "full" among them.
        runs: What was evaluated.
    """
    by_run: dict[str, list[Result]] = {run.name: [] for run in runs}
    for result in results:
        by_run[result.run].append(result)
    full = by_run["full"]
    resampled = Resampled({result.video for result in results})
    full_accuracy, full_resampled = _accuracy(full), resampled.accuracies(full)
    full_flops = np.mean([result.flops for result in full])
    rows = []
    for run in runs:
        own = by_run[run.name]
        accuracies = resampled.accuracies(own)
        by_type = {}
        for kind in QUESTION_TYPES:
            of_type = [result for result in own if result.type == kind]
            if of_type:
                by_type[kind] = (_accuracy(of_type), *interval(resampled.accuracies(of_type)))
        low, high = interval(accuracies)
        baseline = by_run[run.baseline]
        only_ours, only_full, probability = mcnemar(own, baseline)
        relative = relative_low = relative_high = None
        if full_accuracy:
            relative = _accuracy(own) / full_accuracy
            relative_low, relative_high = interval(accuracies / np.where(full_resampled, full_resampled, np.nan))
        rows.append(
            Row(
                run=run.name,
                method=run.method,
                retention_ratio=run.retention_ratio,
                ablation=run.ablation,
                num_questions=len(own),
                accuracy=_accuracy(own),
                accuracy_low=low,
                accuracy_high=high,
                relative=relative,
                relative_low=relative_low,
                relative_high=relative_high,
                fields=own[0].settings,
                by_type=by_type,
                tokens_outer=float(np.mean([result.tokens_outer for result in own])),
                tokens_inner=float(np.mean([result.tokens_inner for result in own])),
                flops_share=float(np.mean([result.flops for result in own]) / full_flops),
                flops_share_counted=_share(own, full, "flops_counted"),
                operations_share=_share(own, full, "operations"),
                seconds=float(np.median([result.seconds for result in own])),
                is_running=run.method == "full" or is_running(own, baseline),
                baseline=run.baseline,
                only_ours=only_ours,
                only_full=only_full,
                mcnemar=probability,
            )
        )
    return rows


def _share(own: list[Result], full: list[Result], name: str) -> float | None:
    """A field summed up as a share of the uncompressed run's, over the questions of which both have it."""
    before = {r.id: getattr(r, name) for r in full if getattr(r, name) is not None}
    both = [r for r in own if getattr(r, name) is not None and r.id in before]
    return sum(getattr(r, name) for r in both) / sum(before[r.id] for r in both) if both else None


@dataclass
class Claim:
    """What the paper says or we aim at, what was measured with its 95 % interval, and what can be said of it here."""

    text: str
    measured: str
    verdict: str


def check_claims(rows: list[Row], results: list[Result]) -> list[Claim]:
    """
    Claims against what was measured; those whose runs are missing are left out.

    A claim holds, or does not, only if all of its interval says so. Two runs are compared over the same questions, and
    a difference whose interval holds zero is none. Nothing is said of a run that is not running, nor of any over fewer
    than `MIN_VIDEOS` videos.

    Args:
        rows: From [`summarize`].
        results: What they sum up.
    """
    videos = {result.video for result in results}
    if len(videos) < MIN_VIDEOS:
        return []
    rows = [row for row in rows if row.is_running]
    found = {row.run: row for row in rows}
    by_run: dict[str, list[Result]] = {row.run: [] for row in rows}
    for result in results:
        if result.run in by_run:
            by_run[result.run].append(result)
    resampled = Resampled(videos)
    accuracies = {run: resampled.accuracies(own) for run, own in by_run.items()}
    claims = []
    for method, ratio, wanted in ((m, r, wanted) for m, aims in TO_KEEP.items() for r, wanted in aims.items()):
        row = found.get(f"{method}@{ratio:g}")
        if row is not None and row.relative is not None:
            claims.append(
                Claim(
                    f"{ROWS[method].label} keeps >= {wanted:.0%} of the accuracy at R = {ratio:.0%}",
                    f"{row.relative:.1%} [{row.relative_low:.1%}, {row.relative_high:.1%}]",
                    verdict(row.relative_low - wanted, row.relative_high - wanted),
                )
            )
    for row in rows:
        if row.method not in TO_KEEP:
            continue
        for method in ROWS:
            curve = sorted((o for o in rows if o.method == method), key=lambda other: other.flops_share)
            if method == row.method or not curve or (row.method, method) == ("holitom", "holitom-outer"):
                continue
            flops = [other.flops_share for other in curve]
            at = max(row.flops_share, flops[0])
            other = float(np.interp(at, flops, [other.accuracy for other in curve]))
            low, high = interval(accuracies[row.run] - interpolated(at, flops, [accuracies[o.run] for o in curve]))
            measured = f"{row.accuracy:.1%} against {other:.1%} at {row.flops_share:.1%} of the FLOPs"
            if row.flops_share < flops[0]:
                measured = f"{row.accuracy:.1%} against {other:.1%} of its cheapest point, at {at:.1%} of the FLOPs"
            measured += f": {points(row.accuracy - other, low, high)}"
            text = f"{_name(row)} at R = {row.retention_ratio:.0%} is ahead of {ROWS[method].label} at equal FLOPs"
            claims.append(Claim(text, measured, verdict(low, high, undecided="no difference")))
    for row in rows:
        without = found.get(f"holitom-outer@{row.retention_ratio:g}") if row.method == "holitom" else None
        if without is not None:
            low, high = interval(accuracies[without.run] - accuracies[row.run])
            claims.append(
                Claim(
                    f"Stage 3 costs less than 1 point at R = {row.retention_ratio:.0%}",
                    points(without.accuracy - row.accuracy, low, high),
                    verdict(0.01 - high, 0.01 - low),
                )
            )
    return claims + _vision_claims(found, accuracies)


def _vision_claims(found: dict[str, Row], accuracies: dict[str, np.ndarray]) -> list[Claim]:
    """Of towers that leave something out: what that costs, and who is ahead at equal operations."""
    claims = []
    rows = [row for row in found.values() if row.ablation and row.vision_method]
    for row in rows:
        whole = found.get(row.baseline)
        if whole is not None:
            low, high = interval(accuracies[row.run] - accuracies[whole.run])
            text, measured = f"{row.run} loses against all patches", points(row.accuracy - whole.accuracy, low, high)
            claims.append(Claim(text, measured, verdict(-high, -low, undecided="no difference")))
    for row in rows:
        if row.vision_method != REUSE:
            continue
        for other in VISION_METHODS:
            curve = [o for o in rows if o.ablation == row.ablation and o.vision_method == other]
            curve = sorted(curve, key=lambda o: o.operations_share)
            if other == REUSE or not curve:
                continue
            shares = [o.operations_share for o in curve]
            at = min(max(row.operations_share, shares[0]), shares[-1])
            theirs = float(np.interp(at, shares, [o.accuracy for o in curve]))
            difference = accuracies[row.run] - interpolated(at, shares, [accuracies[o.run] for o in curve])
            low, high = interval(difference)
            measured = f"{row.accuracy:.1%} at {row.operations_share:.1%} of all operations against {theirs:.1%} at "
            measured += f"{at:.1%}: {points(row.accuracy - theirs, low, high)}"
            text = f"{row.run} is ahead of {other}"
            claims.append(Claim(text, measured, verdict(low, high, undecided="no difference")))
    return claims


def environment() -> dict[str, str]:
    """Date, machine and versions."""
    return {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads"
        + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""),
        "python": platform.python_version(),
        **{name: version(name) for name in ("holitom-hf", "torch", "transformers", "av")},
    }


def write_report(rows: list[Row], results: list[Result], command: str, out: Path) -> list[Path]:
    """
    Writes `table.json`, `table.md` and, with matplotlib, `accuracy_flops.png`, `accuracy_operations.png` and
    `accuracy_types.png`, and of towers that leave something out `accuracy_vision.png`.

    Args:
        rows: From [`summarize`].
        results: What they sum up.
        command: What was typed, for the record.
        out: Folder.

    Returns:
        The files.
    """
    claims, where = check_claims(rows, results), environment()
    content = {
        "command": command,
        **where,
        "rows": [asdict(row) for row in rows],
        "claims": [asdict(c) for c in claims],
    }
    (out / "table.json").write_text(json.dumps(content, indent=1) + "\n")
    num_videos = len({result.video for result in results})
    (out / "table.md").write_text(_markdown(rows, claims, command, where, num_videos))
    return [out / "table.md", out / "table.json", *_plots(rows, out)]


def _label(row: Row) -> str:
    return _name(row) + ("" if row.is_running else " (**not running**)")


def _name(row: Row) -> str:
    if row.method == "full":
        return "uncompressed"
    if row.ablation:
        return row.run.removeprefix(f"{row.ablation}: ")
    return ROWS[row.method].label if row.method else row.run


def markdown_table(head: list[str], lines: list[list[str]]) -> str:
    """Of Markdown, the first column to the left."""
    bars = ["---"] + ["---:"] * (len(head) - 1)
    return "".join("| " + " | ".join(cells) + " |\n" for cells in (head, bars, *lines))


def _line(row: Row) -> list[str]:
    counted = "" if row.flops_share_counted is None else f"{row.flops_share_counted:.1%}"
    return [
        _label(row),
        "" if row.method == "full" else f"{row.retention_ratio:.0%}",
        f"{row.tokens_outer:.0f}",
        f"{row.tokens_inner:.0f}",
        f"{row.flops_share:.1%}",
        counted,
        "" if row.operations_share is None else f"{row.operations_share:.1%}",
        f"{row.accuracy:.1%} [{row.accuracy_low:.1%}, {row.accuracy_high:.1%}]",
        "" if row.relative is None else f"{row.relative:.1%}",
        "" if row.method == "full" else f"+{row.only_ours} -{row.only_full}, p = {row.mcnemar:.2g}",
        f"{row.seconds:.3f}",
    ]


def _markdown(rows: list[Row], claims: list[Claim], command: str, where: dict[str, str], num_videos: int) -> str:
    head = ["method", "R", "tokens", "after stage 3", "FLOPs", "counted", "all operations", "accuracy [95 %]"]
    head += ["relative", "McNemar", "s/question"]
    methods = [row for row in rows if not row.ablation]
    text = f"`{command}`\n\n" + ", ".join(f"{name} {value}" for name, value in where.items())
    text += f"; {rows[0].num_questions} questions.\n\n{CAPTION}\n\n" + markdown_table(
        head, [_line(row) for row in methods]
    )
    types = [kind for kind in QUESTION_TYPES if kind in rows[0].by_type]
    lines = [[_label(row), _line(row)[1], *(f"{row.by_type[k][0]:.1%}" for k in types)] for row in methods]
    text += "\nAccuracy by type of question\n\n" + markdown_table(["method", "R", *types], lines)
    if num_videos < MIN_VIDEOS:
        text += f"\nNo verdicts: questions about {num_videos} videos are too few for intervals to mean something; "
        text += f"{MIN_VIDEOS} are needed.\n"
    if claims:
        lines = [[claim.text, claim.measured, claim.verdict] for claim in claims]
        text += "\nClaims on this set, the paper's and ours; differences are paired by video, with 95 % intervals, "
        text += "and none where the interval holds zero\n\n" + markdown_table(["claim", "measured", "verdict"], lines)
    for group in dict.fromkeys(row.ablation for row in rows if row.ablation):
        members = [row for row in rows if row.ablation == group]
        text += f"\nAblation at R = {members[0].retention_ratio:.0%}: {group}\n\n"
        if members[0].vision_method:  # the row that it is compared with stands elsewhere
            members.insert(0, next(row for row in rows if row.run == members[0].baseline))
        text += markdown_table([head[0], *head[2:]], [[_line(row)[0], *_line(row)[2:]] for row in members])
    return text


def _plots(rows: list[Row], out: Path) -> list[Path]:
    has_curves = any(row.method in ROWS for row in rows)
    has_vision = any(row.vision_method for row in rows if row.ablation)
    if not has_curves and not has_vision:
        return []  # single settings are no curve
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        return []
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3}):
        files = [_plot_vision(rows, Figure, out)] if has_vision else []
        if has_curves:
            files.append(_plot_cost(rows, Figure, out, "flops"))
            if all(row.operations_share is not None for row in rows):
                files.append(_plot_cost(rows, Figure, out, "operations"))
            files.append(_plot_types(rows, Figure, out))
        return files


def method_style(name: str) -> dict:
    """How the curve of a row of [`ROWS`] is drawn: those that there are claims of thicker, controls dotted."""
    row = ROWS[name]
    line = {"linewidth": 2.2 if name in TO_KEEP else 1.2, "linestyle": ":" if row.is_control else "-"}
    return {"color": row.color, "marker": row.marker, "label": row.label, **line}


def legend_height(labels: Collection[str]) -> float:
    """Inches that so many names take below each other."""
    return 0.24 * len(labels) + 0.5


def _legend(figure, axes) -> None:
    """Within the plot while there is room for it there, else beside."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) <= LEGEND_INSIDE:
        axes.legend(frameon=False)
        return
    figure.set_figwidth(figure.get_figwidth() + 2.6)
    figure.set_figheight(max(figure.get_figheight(), legend_height(labels)))
    figure.legend(handles, labels, loc="outside right upper", frameon=False)


def _singles(rows: list[Row]) -> list[Row]:
    """Rows of settings that were given one by one: points of their own."""
    return [row for row in rows if row.method is None and row.ablation is None]


def _plot_cost(rows: list[Row], figure_class, out: Path, cost: str) -> Path:
    """Accuracy against what the rows' field `{cost}_share` has."""
    names = {"flops": "FLOPs of the decoder", "operations": "all operations up to the first token"}
    share = operator.attrgetter(f"{cost}_share")
    figure = figure_class(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.subplots()
    full = next(row for row in rows if row.method == "full")
    axes.axhline(100 * full.accuracy, color="black", linestyle="--", linewidth=1)
    axes.text(0.01, 100 * full.accuracy, "uncompressed", transform=axes.get_yaxis_transform(), va="bottom")
    for name in ROWS:
        own = sorted((row for row in rows if row.method == name), key=share)
        if not own:
            continue
        middle = np.array([100 * row.accuracy for row in own])
        errors = [
            middle - [100 * row.accuracy_low for row in own],
            np.array([100 * row.accuracy_high for row in own]) - middle,
        ]
        places = [100 * share(row) for row in own]
        axes.errorbar(places, middle, errors, elinewidth=0.7, capsize=2, **method_style(name))
    for row, marker in zip(_singles(rows), itertools.cycle(MARKERS)):
        error = [[100 * (row.accuracy - row.accuracy_low)], [100 * (row.accuracy_high - row.accuracy)]]
        style = {"color": "black", "marker": marker, "label": _name(row), "capsize": 2, "linestyle": "none"}
        axes.errorbar(100 * share(row), 100 * row.accuracy, error, elinewidth=0.7, **style)
    axes.set(xscale="log", xlabel=f"{names[cost]}, % of the uncompressed model's", ylabel="accuracy, %")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="x", which="minor", labelsize=7)
    _legend(figure, axes)
    figure.savefig(out / f"accuracy_{cost}.png", dpi=130)
    return out / f"accuracy_{cost}.png"


def _plot_vision(rows: list[Row], figure_class, out: Path) -> Path:
    """Accuracy against all operations, tower included: a panel for every way to go on behind the tower."""
    groups = dict.fromkeys(row.ablation for row in rows if row.ablation and row.vision_method)
    figure = figure_class(figsize=(3.6 * len(groups), 3.6), layout="constrained")
    for axes, group in zip(figure.subplots(1, len(groups), sharey=True, squeeze=False)[0], groups):
        members = [row for row in rows if row.ablation == group and row.vision_method]
        whole = next(row for row in rows if row.run == members[0].baseline)
        axes.plot(100 * whole.operations_share, 100 * whole.accuracy, "k*", markersize=10, label="all patches")
        for method, color, marker in zip(VISION_METHODS, COLORS, MARKERS):
            own = sorted((r for r in members if r.vision_method == method), key=lambda r: r.operations_share)
            middle = np.array([100 * row.accuracy for row in own])
            low, high = ([100 * getattr(row, f"accuracy_{end}") for row in own] for end in ("low", "high"))
            places = [100 * row.operations_share for row in own]
            style = {"color": color, "marker": marker, "label": method, "capsize": 2, "elinewidth": 0.7}
            axes.errorbar(places, middle, [middle - low, np.array(high) - middle], **style)
        axes.set(title=group.removeprefix("vision tower, "), xlabel="all operations, % of the uncompressed")
    figure.axes[0].set_ylabel("accuracy, %")
    figure.axes[0].legend(frameon=False)
    figure.savefig(out / "accuracy_vision.png", dpi=130)
    return out / "accuracy_vision.png"


def _plot_types(rows: list[Row], figure_class, out: Path) -> Path:
    from matplotlib.ticker import LogLocator

    kinds = [kind for kind in QUESTION_TYPES if kind in rows[0].by_type]
    columns = 3
    figure = figure_class(figsize=(10, 2.6 * -(-len(kinds) // columns)), layout="constrained")
    panels = figure.subplots(-(-len(kinds) // columns), columns, sharex=True, sharey=True, squeeze=False).flatten()
    full = next(row for row in rows if row.method == "full")
    for axes, kind in zip(panels, kinds):
        axes.axhline(100 * full.by_type[kind][0], color="black", linestyle="--", linewidth=1, label="uncompressed")
        for name in ROWS:
            own = sorted((row for row in rows if row.method == name), key=lambda row: row.flops_share)
            if own:
                places = [100 * row.flops_share for row in own]
                axes.plot(places, [100 * row.by_type[kind][0] for row in own], markersize=4, **method_style(name))
        for row, marker in zip(_singles(rows), itertools.cycle(MARKERS)):
            place = 100 * row.flops_share, 100 * row.by_type[kind][0]
            axes.plot(*place, color="black", marker=marker, markersize=4, linestyle="none", label=_name(row))
        axes.set(xscale="log", title=kind)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # a narrow panel has no room for all of a decade
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
    for axes in panels[len(kinds) :]:
        axes.set_visible(False)
    figure.supxlabel("FLOPs of the decoder, % of the uncompressed model's")
    figure.supylabel("accuracy, %")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(out / "accuracy_types.png", dpi=110)
    return out / "accuracy_types.png"
