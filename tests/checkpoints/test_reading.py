"""What the command line loads: whole or refused, in one line, and without waiting for a Hub that does not answer."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from holitom_hf.answering.answerer import Answerer
from holitom_hf.apps.command_line.app import app


def rewrite(change):
    """A change of the checkpoint's tensors by name."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def with_bytes(cut):
    """A change of the weights' bytes."""
    return lambda folder: (folder / "model.safetensors").write_bytes(cut((folder / "model.safetensors").read_bytes()))


def with_settings(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text()) | {"holitom_config": 5}
    (folder / "config.json").write_text(json.dumps(values))


NORM = "language_model.model.layers.0.input_layernorm.weight"
LOADED = NORM.replace("language_model.model", "model.language_model")
BROKEN = {
    "missing": (rewrite(lambda tensors: tensors.pop(NORM)), f"weights are missing .* random: {LOADED}$"),
    "shape": (rewrite(lambda tensors: tensors.update({NORM: tensors[NORM][:1]})), f"another shape.* {LOADED}$"),
    "many": (lambda folder: rewrite(lambda t: [t.pop(n) for n in sorted(t)[:9]])(folder), "and 6 more$"),
    "half": (with_bytes(lambda data: data[: len(data) // 2]), "safetensors file is cut off or damaged"),
    "short": (with_bytes(lambda data: data[:5]), "safetensors file is cut off or damaged"),
    "empty": (with_bytes(lambda data: b""), "safetensors file is cut off or damaged"),
    "list": (
        lambda folder: (folder / "config.json").write_text("[]"),
        "config.json of .*list must hold one JSON object",
    ),
    "null": (lambda folder: (folder / "config.json").write_text("null"), "config.json of .*null must hold one JSON"),
    "five": (with_settings, r"holitom_config in config.json of .*five must be an object, got 5"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_is_refused_in_one_line_and_nothing_is_written(demo, tmp_path, name):
    import re

    change, message = BROKEN[name]
    folder = tmp_path / name
    shutil.copytree(demo / "model", folder)
    change(folder)
    for arguments in (
        ["answer", demo / "clip.mp4", "?", "--model", folder, "--max-new-tokens", 1],
        ["convert", folder, tmp_path / "out"],
    ):
        result = CliRunner(env={"COLUMNS": "200"}).invoke(app, list(map(str, arguments)))
        assert (result.exit_code, result.stdout) == (1, "")
        [line] = result.stderr.strip().splitlines()
        assert line.startswith("error: ")
        assert re.search(message, line), line
        assert not (tmp_path / "out").exists()


UNREACHABLE = "http://127.0.0.1:9"  # where nothing listens
TIMED = """
import sys, time
from holitom_hf.apps.command_line.app import app
import holitom_hf.answering.answerer, holitom_hf.apps.converting  # what loading torch takes is not the Hub's
start = time.perf_counter()
try:
    app(sys.argv[1:], standalone_mode=True)
finally:
    sys.stdout.write(f"TOOK {time.perf_counter() - start}")
"""


@pytest.mark.parametrize("command", ["answer", "convert"])
def test_a_hub_that_does_not_answer_is_asked_once_and_that_is_said_in_one_line(demo, tmp_path, command):
    name = "llava-hf/llava-onevision-qwen2-7b-ov-hf"
    arguments = {
        "answer": ["answer", str(demo / "clip.mp4"), "?", "--model", name],
        "convert": ["convert", name, str(tmp_path / "out")],
    }[command]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": UNREACHABLE, "HF_HOME": str(tmp_path / "home")}
    run = subprocess.run(
        [sys.executable, "-c", TIMED, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert run.returncode == 1, run.stderr
    [line] = run.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert "the Hub does not answer" in line
    assert f"{name} is not in the local cache" in line
    assert float(run.stdout.split("TOOK ")[1]) < 5


def test_a_hub_that_never_answers_costs_its_seconds_once(demo, monkeypatch):
    from holitom_hf.checkpoints import reading

    asked = []

    def hang(url, timeout):
        asked.append(url)
        time.sleep(2)

    monkeypatch.setattr(reading, "get_hf_file_metadata", hang)
    monkeypatch.setattr(reading, "SECONDS", 0.1)
    start = time.perf_counter()
    with pytest.raises(OSError, match=r"the Hub does not answer \(no answer\)"):
        Answerer("user/none", device="cpu")
    assert time.perf_counter() - start < 1.5
    assert len(asked) == 1
    Answerer(str(demo / "model"), device="cpu")
    assert len(asked) == 1, "a folder needs no Hub"
