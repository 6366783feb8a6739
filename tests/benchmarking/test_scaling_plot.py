"""The picture of the scaling benchmark can be read."""

import itertools
import json
from pathlib import Path

import pytest

from holitom_hf.benchmarking.measuring import OperationCounts, Spread
from holitom_hf.benchmarking.scaling import scaling_figure
from holitom_hf.benchmarking.stage_benchmark import StageResult


RESULT = Path(__file__).parents[2] / "examples" / "benchmark" / "scaling.json"


@pytest.fixture(scope="module")
def results():
    """Those of the repository, as the command wrote them."""
    return [
        StageResult(
            **entry
            | {"seconds": {stage: Spread(**spread) for stage, spread in entry["seconds"].items()}}
            | {"operations": {stage: OperationCounts(**counts) for stage, counts in entry["operations"].items()}}
        )
        for entry in json.loads(RESULT.read_text())["result"]
    ]


def test_numbers_can_be_read_off_and_nothing_lies_over_anything(results):
    figure = scaling_figure(results)
    figure.canvas.draw()
    panels = figure.axes
    assert len(panels) == 6
    frames = sorted({r.num_frames for r in results})
    for panel in panels[:1] + panels[3:4]:
        assert [label.get_text() for label in panel.get_xticklabels()] == [str(count) for count in frames]
    [legend] = figure.legends
    assert not any(panel.get_legend() for panel in panels)
    around = legend.get_window_extent()
    for panel in panels:
        assert not around.overlaps(panel.get_window_extent())
        x_low, x_high, y_low, y_high = *panel.get_xlim(), *panel.get_ylim()
        for line in panel.lines:
            assert all(x_low <= x <= x_high and y_low <= y <= y_high for x, y in line.get_xydata())
        for labels in (panel.get_xticklabels(), panel.get_yticklabels()):
            boxes = [label.get_window_extent() for label in labels if label.get_visible() and label.get_text()]
            assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert len({panel.get_ylim() for panel in panels[:3]}) == 1  # times can be compared across panels


def test_lines_are_the_measurements(results):
    panel = scaling_figure(results).axes[0]
    usual = results[0].retention_ratio
    runs = sorted((r for r in results if r.batch_size == 1 and r.retention_ratio == usual), key=lambda r: r.num_frames)
    [line] = [line for line in panel.lines if line.get_label().startswith("stage 3")]
    assert line.get_xydata().tolist() == [[r.num_frames, 1000 * r.seconds["stage 3"].median] for r in runs]
