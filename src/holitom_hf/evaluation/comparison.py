"""Many methods over several sets and models at equal operations: one page, one plot."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .methods import ROWS
from .report import Row, environment, legend_height, markdown_table, method_style
from .resampling import MIN_VIDEOS, Resampled, interpolated, interval
from .running import Result


REFERENCE = "holitom"
EXPLANATION = (
    "Differences in accuracy from {reference} at as many operations up to the first token (tower included) as it "
    "takes at each R: along the straight line between two points of a method's own curve, the uncompressed model "
    "being the end of every curve. In percentage points, paired over the same questions, with 95 % bootstrap "
    "intervals over videos; **bold** where the interval does not hold zero, none otherwise. `>`: the method's "
    "cheapest point takes more operations than that, and is compared as it is."
)


@dataclass
class Panel:
    """
    What one model did on one set.

    Attributes:
        title: Of both.
        rows: Its runs in numbers, the uncompressed one among them.
        results: What they sum up.
    """

    title: str
    rows: list[Row]
    results: list[Result]

    @property
    def full(self) -> Row:
        """The uncompressed run."""
        return next(row for row in self.rows if row.method == "full")

    @property
    def videos(self) -> frozenset[str]:
        """Their names."""
        return frozenset(result.video for result in self.results)

    def curve(self, method: str) -> list[Row]:
        """What shows that it runs of a method, from the fewest operations on."""
        rows = [row for row in self.rows if row.method == method and row.is_running]
        return sorted(rows, key=lambda row: row.operations_share)


@dataclass
class Difference:
    """
    A method's accuracy less the reference's at equal operations, with its 95 % interval.

    Attributes:
        method: Its name in [`ROWS`].
        ratio: The reference's R, whose operations are taken.
        panel: The set and model; `None`: the mean over all that have both.
        value, low, high: As shares.
        is_dearer: Whether its cheapest point takes more operations, in some panel at least.
    """

    method: str
    ratio: float
    panel: str | None
    value: float
    low: float
    high: float
    is_dearer: bool

    @property
    def is_none(self) -> bool:
        """Whether the interval holds zero."""
        return self.low <= 0 <= self.high


def compare(panels: list[Panel]) -> list[Difference]:
    """
    Every method against HoliTom at equal operations: in each panel, and the mean over panels.

    Panels of the same videos are resampled together, so that models that share a set share its luck.

    Args:
        panels: Nothing is said of one over fewer than `MIN_VIDEOS` videos.
    """
    resampled: dict[frozenset[str], Resampled] = {}
    differences, of_all = [], {}
    for panel in panels:
        if len(panel.videos) < MIN_VIDEOS:
            continue
        videos = resampled.setdefault(panel.videos, Resampled(set(panel.videos), seed=len(resampled)))
        accuracies = {
            row.run: videos.accuracies(result for result in panel.results if result.run == row.run)
            for row in panel.rows
        }
        references = panel.curve(REFERENCE)
        for method in ROWS:
            curve = [*panel.curve(method), panel.full]
            if method == REFERENCE or len(curve) == 1:
                continue
            places = [row.operations_share for row in curve]
            for reference in references:
                at = max(reference.operations_share, places[0])
                value = float(np.interp(at, places, [row.accuracy for row in curve])) - reference.accuracy
                samples = interpolated(at, places, [accuracies[row.run] for row in curve])
                samples = samples - accuracies[reference.run]
                is_dearer = at > reference.operations_share
                key = method, reference.retention_ratio
                differences.append(Difference(*key, panel.title, value, *interval(samples), is_dearer))
                of_all.setdefault(key, []).append((value, samples, is_dearer))
    for key, found in of_all.items():
        values, samples, dearer = zip(*found)
        differences.append(Difference(*key, None, float(np.mean(values)), *interval(np.mean(samples, 0)), any(dearer)))
    return differences


def write_comparison(panels: list[Panel], command: str, out: Path) -> list[Path]:
    """
    Writes `comparison.md` and, with matplotlib, `comparison.png`.

    Args:
        panels: What to compare on.
        command: What was typed, for the record.
        out: Folder.

    Returns:
        The files.
    """
    (out / "comparison.md").write_text(_markdown(panels, compare(panels), command))
    files = [out / "comparison.md"]
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        return files
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3}):
        _plot(panels, Figure).savefig(out / "comparison.png", dpi=110)
    return [*files, out / "comparison.png"]


def _cell(difference: Difference | None) -> str:
    if difference is None:
        return ""
    value, low, high = (f"{100 * number:+.1f}" for number in (difference.value, difference.low, difference.high))
    text = f"{value if difference.is_none else f'**{value}**'} [{low}, {high}]"
    return f"> {text}" if difference.is_dearer else text


def _markdown(panels: list[Panel], differences: list[Difference], command: str) -> str:
    where = ", ".join(f"{name} {value}" for name, value in environment().items())
    sizes = "; ".join(f"{p.title}: {p.full.num_questions} questions, {len(p.videos)} videos" for p in panels)
    text = f"`{command}`\n\n{where}. {sizes}.\n"
    if differences:
        text += "\n" + EXPLANATION.format(reference=ROWS[REFERENCE].label) + "\n\n" + _mean_table(differences)
        text += "\n" + _verdicts(differences)
    else:
        text += (
            f"\nNothing is compared: {MIN_VIDEOS} videos are needed, and {ROWS[REFERENCE].label} among the methods.\n"
        )
    for panel in panels:
        text += (
            f"\n## {panel.title}\n\nUncompressed: {panel.full.accuracy:.1%}. Accuracy at each R, with all operations "
        )
        text += (
            "up to the first token as a share of the uncompressed model's in brackets; below it, the difference at "
        )
        text += "equal operations.\n\n" if differences else "below.\n\n"
        text += _panel_table(panel, [d for d in differences if d.panel == panel.title])
    return text


def _mean_table(differences: list[Difference]) -> str:
    of_all = {(d.method, d.ratio): d for d in differences if d.panel is None}
    ratios = sorted({ratio for _, ratio in of_all}, reverse=True)
    means = {m: np.mean([d.value for (name, _), d in of_all.items() if name == m]) for m, _ in of_all}
    lines = [
        [ROWS[method].label, *(_cell(of_all.get((method, ratio))) for ratio in ratios)]
        for method in sorted(means, key=means.get, reverse=True)
    ]
    return markdown_table(["mean over all sets and models", *(f"R = {ratio:.0%}" for ratio in ratios)], lines)


def _verdicts(differences: list[Difference]) -> str:
    of_all = [d for d in differences if d.panel is None]
    text = ""
    for ratio in sorted({d.ratio for d in of_all}, reverse=True):
        here = [d for d in of_all if d.ratio == ratio]
        groups = {
            "ahead": [d for d in here if d.low > 0],
            "behind": [d for d in here if d.high < 0],
            "no difference can be told": [d for d in here if d.is_none],
        }
        said = [f"{name}: {', '.join(ROWS[d.method].label for d in some)}" for name, some in groups.items() if some]
        text += f"- At what {ROWS[REFERENCE].label} takes at R = {ratio:.0%}: {'; '.join(said)}.\n"
    text += (
        f"- Of {len(differences)} intervals of 95 % on this page, about {len(differences) / 20:.0f} would not hold "
    )
    return text + "zero if all methods were alike.\n"


def _panel_table(panel: Panel, differences: list[Difference]) -> str:
    ratios = sorted({row.retention_ratio for row in panel.rows if row.method in ROWS}, reverse=True)
    found = {(row.method, row.retention_ratio): row for row in panel.rows}
    by_key = {(d.method, d.ratio): d for d in differences}
    lines = []
    for method in dict.fromkeys(row.method for row in panel.rows if row.method in ROWS):
        cells = []
        for ratio in ratios:
            row = found.get((method, ratio))
            cell = "" if row is None else f"{row.accuracy:.1%} ({row.operations_share:.1%})"
            cell += "" if row is None or row.is_running else " **not running**"
            cells.append("<br>".join(filter(None, (cell, _cell(by_key.get((method, ratio)))))))
        lines.append([ROWS[method].label, *cells])
    return markdown_table(["method", *(f"R = {ratio:.0%}" for ratio in ratios)], lines)


def _plot(panels: list[Panel], figure_class):
    """Accuracy against all operations, a panel for every model and set."""
    columns = min(len(panels), 2)
    num_rows = -(-len(panels) // columns)
    figure = figure_class(figsize=(5.2 * columns + 2.6, 4.2 * num_rows), layout="constrained")
    all_axes = figure.subplots(num_rows, columns, squeeze=False).flatten()
    for axes, panel in zip(all_axes, panels):
        axes.axhline(100 * panel.full.accuracy, color="black", linestyle="--", linewidth=1, label="uncompressed")
        for method in ROWS:
            rows = panel.curve(method)
            if rows:
                places = [100 * row.operations_share for row in rows]
                axes.plot(places, [100 * row.accuracy for row in rows], markersize=5, **method_style(method))
        axes.set(title=panel.title)
    for axes in all_axes[len(panels) :]:
        axes.set_visible(False)
    figure.supxlabel("all operations up to the first token, % of the uncompressed model's")
    figure.supylabel("accuracy, %")
    handles = {}
    for axes in all_axes:
        handles |= dict(zip(*axes.get_legend_handles_labels()[::-1]))
    figure.set_figheight(max(figure.get_figheight(), legend_height(handles)))
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False)
    return figure
