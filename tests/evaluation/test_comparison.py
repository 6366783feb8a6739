"""Many methods over several sets at equal operations, from made-up answers."""

import numpy as np
import pytest
from typer.testing import CliRunner

from holitom_hf import HoliTomConfig
from holitom_hf.apps.command_line.app import app
from holitom_hf.bundled.tiny_model import tiny_model, tiny_processor
from holitom_hf.evaluation.comparison import Panel, compare, write_comparison
from holitom_hf.evaluation.methods import method_runs
from holitom_hf.evaluation.report import summarize
from holitom_hf.evaluation.running import Result


NUM = 400
RATIOS = [0.25, 0.05]


def answered(run, right, share, videos):
    """A question a video, right where `right` says so, at a share of the uncompressed model's operations."""
    return [
        Result(run, f"q{v}", v, "color", run, bool(r), 100, 100, share, None, 0.1, operations=100 * share)
        for r, v in zip(right, videos)
    ]


def panel(title, curves, videos):
    """Of curves by method: for each of `RATIOS` the share of operations and what is right."""
    results = answered("full", np.ones(NUM), 1.0, videos)
    for method, points in curves.items():
        for ratio, (share, right) in zip(RATIOS, points):
            results += answered(f"{method}@{ratio:g}", right, share, videos)
    rows = summarize(results, method_runs(HoliTomConfig(), list(curves), RATIOS))
    return Panel(title, rows, results)


def rights(seed, share):
    return np.random.default_rng(seed).random(NUM) < share


def paired_interval(ours, theirs):
    """Of the mean of paired differences, by its standard error: what the bootstrap must come near to."""
    difference = np.asarray(ours, float) - np.asarray(theirs, float)
    error = 1.96 * difference.std(ddof=1) / len(difference) ** 0.5
    return difference.mean(), difference.mean() - error, difference.mean() + error


def test_a_method_is_compared_at_the_operations_of_the_reference():
    own = [(0.6, rights(1, 0.8)), (0.5, rights(2, 0.7))]
    other = [(0.55, rights(3, 0.9)), (0.45, rights(4, 0.5))]
    dear = [(0.9, rights(5, 0.95)), (0.7, rights(6, 0.72))]
    videos = [f"v{i}" for i in range(NUM)]
    found = {
        (d.method, d.ratio): d
        for d in compare([panel("a", {"holitom": own, "frames": other, "fastv": dear}, videos)])
        if d.panel == "a"
    }
    # At 0.5 halfway between its points; at 0.6 a ninth of the way from its dearest point to the uncompressed model.
    expected = {
        ("frames", 0.05): paired_interval((other[0][1] + 1.0 * other[1][1]) / 2, own[1][1]),
        ("frames", 0.25): paired_interval(other[0][1] * 8 / 9 + 1 / 9, own[0][1]),
        ("fastv", 0.05): paired_interval(dear[1][1], own[1][1]),
        ("fastv", 0.25): paired_interval(dear[1][1], own[0][1]),
    }
    assert found.keys() == expected.keys()
    for key, (value, low, high) in expected.items():
        assert found[key].value == pytest.approx(value)
        assert (found[key].low, found[key].high) == pytest.approx((low, high), abs=0.006)
        assert found[key].is_dearer == (key[0] == "fastv")
        assert found[key].is_none == (low <= 0 <= high)


@pytest.mark.parametrize(("is_shared", "narrower"), [(True, 1.0), (False, 2**-0.5)])
def test_models_that_share_videos_share_their_luck(is_shared, narrower):
    """The mean of two panels with the same answers knows more than one of them only if the videos are others."""
    curves = {"holitom": [(0.6, rights(1, 0.6)), (0.5, rights(2, 0.6))]}
    curves["frames"] = [(0.6, rights(3, 0.6)), (0.5, rights(4, 0.6))]
    videos = [f"v{i}" for i in range(NUM)]
    others = videos if is_shared else [f"w{i}" for i in range(NUM)]
    differences = compare([panel("a", curves, videos), panel("b", curves, others)])
    widths = {(d.panel, d.ratio): d.high - d.low for d in differences}
    for ratio in RATIOS:
        assert widths[None, ratio] / widths["a", ratio] == pytest.approx(narrower, abs=0.06)
    means = {(d.panel, d.ratio): d.value for d in differences}
    assert means[None, 0.05] == pytest.approx((means["a", 0.05] + means["b", 0.05]) / 2)


def test_the_page_says_who_is_ahead_and_what_is_none(tmp_path):
    pytest.importorskip("matplotlib")
    videos = [f"v{i}" for i in range(NUM)]
    right = rights(1, 0.6)
    nearly = right.copy()
    nearly[:2] ^= True
    curves = {
        "holitom": [(0.6, right), (0.5, right)],
        "frames": [(0.6, right & rights(2, 0.5)), (0.5, right & rights(3, 0.5))],
        "farthest": [(0.6, right | rights(4, 0.5)), (0.5, right | rights(5, 0.5))],
        "random": [(0.6, nearly), (0.5, nearly)],
    }
    files = write_comparison([panel("a, test", curves, videos)], "holitom-hf evaluate", tmp_path)
    assert [file.name for file in files] == ["comparison.md", "comparison.png"]
    page = files[0].read_text()
    said = "ahead: farthest points; behind: fewer frames; no difference can be told: random tokens."
    assert page.count(said) == len(RATIOS)
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in lines[2:5]] == ["| farthest points", "| random tokens", "| fewer frames"]
    assert lines[2].count("**+") == lines[4].count("**-") == len(RATIOS)
    assert "**" not in lines[3]


@pytest.mark.parametrize("num_videos", [20, 30])
def test_few_videos_are_not_compared(num_videos, tmp_path):
    results, videos = [], [f"v{i}" for i in range(num_videos)]
    for run, share in (("full", 1.0), ("holitom@0.25", 0.5), ("frames@0.25", 0.5)):
        results += answered(run, rights(len(run), 0.5)[:num_videos], share, videos)
    few = Panel("a", summarize(results, method_runs(HoliTomConfig(), ["holitom", "frames"], [0.25])), results)
    assert bool(compare([few])) == (num_videos == 30)
    write_comparison([few], "", tmp_path)
    assert ("Nothing is compared" in (tmp_path / "comparison.md").read_text()) == (num_videos == 20)


def test_command_line_with_several_splits(tmp_path):
    processor = tiny_processor()
    processor.save_pretrained(tmp_path / "model")
    tiny_model(processor.tokenizer).save_pretrained(tmp_path / "model")
    options = ["--model", str(tmp_path / "model"), "--split", "test", "unseen", "--num-questions", "3"]
    options += ["--methods", "holitom", "frames", "--retention-ratios", "0.2", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["evaluate", *options])
    assert result.exit_code == 0, result.output
    for split in ("test", "unseen"):
        assert (tmp_path / "out" / f"model-{split}" / "table.md").is_file()
        assert f"## model, {split}" in result.output
    before = (tmp_path / "out" / "model-unseen" / "answers.jsonl").read_text()
    assert CliRunner().invoke(app, ["evaluate", *options]).exit_code == 0
    assert (tmp_path / "out" / "model-unseen" / "answers.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split", "test", "unseen", "--questions", "x"], "--questions is one set"),
        (["--split", "test", "test"], "a name of its own"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path):
    result = CliRunner().invoke(app, ["evaluate", "--out", str(tmp_path), *arguments])
    assert result.exit_code == 1
    assert message in result.output
