"""Every example runs as it stands."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from holitom_hf.bundled import BUNDLED_MODEL


EXAMPLES = Path(__file__).parents[1] / "examples"


def run(*command, cwd: Path) -> str:
    """Standard output; the environment's own commands come first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_quickstart(tmp_path):
    output = run(sys.executable, EXAMPLES / "quickstart.py", cwd=tmp_path)
    kept = re.search(r"784 video tokens in (\d+) segments became (\d+)\.", output)
    assert int(kept[2]) < 0.2 * 784


def test_many_questions(demo, tmp_path):
    questions = ["How many shapes are there?", "Does a red cross appear in the video?"]
    arguments = [EXAMPLES / "many_questions_one_video.py", demo / "clip.mp4", BUNDLED_MODEL, *questions]
    lines = run(sys.executable, *arguments, cwd=tmp_path).splitlines()
    assert len(lines) == 3
    assert lines[1].split("?")[1].strip() in ("one", "two", "three", "four", "five", "six")
    assert lines[2].split("?")[1].strip() in ("yes", "no")


@pytest.mark.slow
def test_many_questions_without_arguments(tmp_path):
    lines = run(sys.executable, EXAMPLES / "many_questions_one_video.py", cwd=tmp_path).splitlines()
    assert len(lines) >= 4
    assert re.match(r"\d+\.\d\d s for the video, once", lines[0])
    for line in lines[1:]:
        assert re.fullmatch(r"\d+\.\d\d s  .+\?  \S.*", line), line
    assert not list(tmp_path.iterdir())


def test_batch(tmp_path):
    output = run("bash", EXAMPLES / "batch.sh", "out", "6", cwd=tmp_path)
    assert re.search(r"\d of 6 answers are right", output)
    assert len((tmp_path / "out" / "answers.jsonl").read_text().splitlines()) == 6


@pytest.mark.slow
def test_fine_tuning(tmp_path):
    options = ["--steps", "2", "--batch-size", "4", "--num-tested", "4", "--out", tmp_path / "lora"]
    output = run(sys.executable, EXAMPLES / "fine_tune_lora.py", *options, cwd=tmp_path)
    assert re.search(r"before: \d+% of 4 questions", output)
    assert re.search(r"after:  \d+%", output)
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_a_side_network_learns_from_stored_activations(tmp_path):
    options = ["--clips", "6", "--epochs", "4", "--batch-size", "3", "--num-uncompressed", "2"]
    output = run(sys.executable, EXAMPLES / "side_network.py", *options, cwd=tmp_path)
    assert "12 clips, stored in 12 runs of the decoder\n" in output
    compressed, whole = map(int, re.search(r"bytes of 2 of them: (\d+) compressed, (\d+) not", output).groups())
    # 8 layers of 784 tokens, a newline and some text, of 128 numbers of 2 bytes.
    assert 8 * 785 * 128 * 2 < whole / 2 < 8 * 840 * 128 * 2
    assert compressed < 0.25 * whole
    losses = [float(loss) for loss in re.findall(r"^epoch \d: loss (\d+\.\d+)", output, flags=re.MULTILINE)]
    assert losses[-1] < losses[0]
    assert "epochs ran the decoder 0 times; no weight of it has a gradient" in output
    assert re.search(r"^test, frozen: \d+% \[\d+%, \d+%\] of 3; chance 33%$", output, flags=re.MULTILINE)
    assert re.search(r"^\+\d -\d, p = .+: (no|a) difference$", output, flags=re.MULTILINE)


def test_merging_is_measured_with_what_it_needs(tmp_path):
    output = run(sys.executable, EXAMPLES / "measure_merging.py", "--frames", "2", "--rounds", "2", cwd=tmp_path)
    assert re.match(r"2 frames, R = 10%, \d+ threads, 2 rounds\n", output)
    number = r"(\d+\.\d+)"
    medians = {name: float(ms) for name, ms in re.findall(rf"^([^/\n]+): {number} ms \[", output, flags=re.MULTILINE)}
    assert set(medians) == {"importance", "stages 1 and 2", "farthest points", "HoliTom, importance and stages"}
    ratios = re.findall(rf"^farthest points / (.+): {number} \[{number}, {number}\]$", output, flags=re.MULTILINE)
    assert [name for name, *_ in ratios] == ["HoliTom, importance and stages", "stages 1 and 2"]
    assert all(float(low) <= float(median) <= float(high) for _, median, low, high in ratios)


def test_what_repeats_in_files_is_measured(demo, tmp_path):
    options = ["--frames", "8", "100000", "--compared-frames", "8", "--layers", "1", "--thresholds", "0.9", "1"]
    output = run(sys.executable, EXAMPLES / "measure_redundancy.py", demo / "clip.mp4", *options, cwd=tmp_path)
    shares, features = output.strip().split("\n\n")
    head, _, *rows = shares.splitlines()
    assert head == "| file | frames | pixels | layer 1, 0.9 | layer 1, 1 |"
    [row] = rows
    pixels, some, everything = map(
        int, re.fullmatch(r"\| clip.mp4 \| 8 \| (\d+)% \| (\d+)% \| (\d+)% \|", row).groups()
    )
    assert 12 <= pixels < 100
    assert 12 <= some < everything == 100
    assert features.splitlines()[-2].startswith(f"| clip.mp4 | 1 | 0.9 | {some}% | 0.")
    assert features.splitlines()[-1] == "| clip.mp4 | 1 | 1 | 100% | 1.0000 | 1.0000 |"


def test_the_scripts_name_commands_and_options_that_exist():
    from holitom_hf import HoliTomConfig

    script = (EXAMPLES / "lmms_eval.sh").read_text()
    assert HoliTomConfig.coerce(re.search(r"preset=\$\{1:-(\S+)\}", script)[1]).retention_ratio == 0.15
    for name in ("batch.sh", "lmms_eval.sh"):
        subprocess.run(["bash", "-n", str(EXAMPLES / name)], check=True)


def test_two_runs_of_lmms_eval_are_compared(tmp_path):
    def write(run: str, task: str, answers: list[str]) -> None:
        folder = tmp_path / run / "model"
        folder.mkdir(parents=True, exist_ok=True)
        samples = [
            {"doc_id": i, "doc": {"question": "?"}, "target": "a", "filtered_resps": [answer]}
            | {f"{task}_accuracy": {"pred_answer": answer, "gt_answer": "a", "score": int(answer == "a")}}
            for i, answer in enumerate(answers)
        ]
        lines = "".join(json.dumps(sample) + "\n" for sample in samples)
        (folder / f"20260101_000000_samples_{task}.jsonl").write_text(lines)

    write("full", "mvbench", ["a"] * 12)
    write("short", "mvbench", ["a"] * 6 + ["b"] * 6)
    write("full", "same", ["a", "b"])
    write("short", "same", ["a", "b"])
    write("full", "few", ["a", "b"])
    write("short", "few", ["b", "a"])
    output = run(
        sys.executable, EXAMPLES / "compare_lmms_eval.py", tmp_path / "full", tmp_path / "short", cwd=tmp_path
    )
    assert "mvbench: 100.0% -> 50.0% of 12; +0 -6, p = 0.031: a difference" in output
    assert "same: all 2 answers are the same: the second run is not compressed, or not running" in output
    assert "few: 50.0% -> 50.0% of 2; +1 -1, p = 1: no difference" in output


@pytest.mark.slow
def test_the_notebook_runs_and_keeps_its_pictures(tmp_path):
    nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed")
    nbclient = pytest.importorskip("nbclient")
    stored = nbformat.read(EXAMPLES / "compare_methods.ipynb", as_version=4)
    notebook = nbformat.from_dict(json.loads(json.dumps(stored)))
    for cell in notebook.cells:
        cell.source = cell.source.replace("120, seed=5", "9, seed=5")
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    for book in (stored, notebook):
        outputs = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
        assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
        assert not [output for output in outputs if output.output_type == "error"]
    [table] = [
        output["data"]["text/markdown"]
        for cell in stored.cells
        for output in cell.get("outputs", [])
        if "text/markdown" in output.get("data", {})
    ]
    assert "| HoliTom |" in table


def test_the_space_is_complete(monkeypatch):
    gradio = pytest.importorskip("gradio")
    front = (EXAMPLES / "space" / "README.md").read_text().split("---")[1]
    assert "sdk: gradio" in front
    assert "app_file: app.py" in front
    monkeypatch.delenv("HOLITOM_MODEL", raising=False)
    names = runpy.run_path(str(EXAMPLES / "space" / "app.py"))
    assert isinstance(names["app"], gradio.Blocks)
