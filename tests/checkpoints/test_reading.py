"""What the command line loads: whole or refused, in one line, and without waiting for a Hub that does not answer."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from holitom_hf.answering.answerer import Answerer
from holitom_hf.apps.command_line.app import app
from holitom_hf.apps.command_line.measuring import LLAVA_VIDEO_SIZES, QWEN_SIZES, SIZES
from holitom_hf.benchmarking.architectures import ARCHITECTURES, LLAVA_VIDEO_ARCHITECTURES, QWEN_ARCHITECTURES
from holitom_hf.checkpoints import hub as hub_module

from ..hub import LoopbackHub, Repository


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
RUN = """
import sys, time
from holitom_hf.apps.command_line.app import app
start = time.perf_counter()
try:
    app(sys.argv[1:], standalone_mode=True)
finally:
    print(*(name for name in ("torch", "transformers", "numpy") if name in sys.modules), time.perf_counter() - start)
"""
NAME = "llava-hf/llava-onevision-qwen2-7b-ov-hf"
COMMANDS = {
    "answer": ["answer", "clip.mp4", "?", "--model", NAME],
    "batch": ["batch", "clips", "answers.jsonl", "--question", "?", "--model", NAME],
    "visualize": ["visualize", "clip.mp4", "--out", "merged.png", "--model", NAME],
    "demo": ["demo", "--model", NAME],
    "serve": ["serve", "--model", NAME],
    "convert": ["convert", NAME, "out"],
    "evaluate": ["evaluate", "--model", NAME],
    "flops": ["flops", "--model", NAME],
}


@pytest.fixture
def hub():
    with LoopbackHub() as hub:
        yield hub


def refusal(arguments: list[str], folder: Path, endpoint: str) -> str:
    """The one line that a command ends with, within 5 seconds and before anything heavy is imported."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "home")}
    run = subprocess.run(
        [sys.executable, "-c", RUN, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
        check=False,
    )
    assert run.returncode == 1, run.stderr
    [line] = run.stderr.strip().splitlines()
    assert line.startswith("error: ")
    *heavy, seconds = run.stdout.split()
    assert heavy == []
    assert float(seconds) < 5
    return line


@pytest.mark.parametrize("command", COMMANDS)
def test_a_hub_that_does_not_answer_is_said_in_one_line_before_torch_is_imported(tmp_path, command):
    line = refusal(COMMANDS[command], tmp_path, UNREACHABLE)
    assert "the Hub does not answer" in line
    assert f"{NAME} is not in the local cache" in line


def test_a_hub_that_takes_requests_and_never_answers_is_said_in_one_line(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        line = refusal(COMMANDS["answer"], tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert "the Hub does not answer" in line


@pytest.mark.parametrize("name", ["user/nothing", "./nothing", "a/b/c", "nothing here"])
def test_a_model_that_is_nowhere_is_said_in_one_line_before_torch_is_imported(tmp_path, hub, name):
    line = refusal(["answer", "clip.mp4", "?", "--model", name], tmp_path, hub.url)
    assert f"there is no folder {name} here and no such repository on the Hub" in line


def test_a_repository_without_a_config_is_no_checkpoint(tmp_path, hub):
    hub.repositories["user/data"] = Repository(snapshots=[{"README.md": b"data"}])
    line = refusal(["answer", "clip.mp4", "?", "--model", "user/data"], tmp_path, hub.url)
    assert line.endswith("user/data has no config.json: it is no checkpoint")


def test_the_base_of_a_checkpoint_without_weights_is_asked_for_too(tmp_path, hub):
    settings = {"base_model_name_or_path": "user/base"}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"holitom_config": settings}))
    line = refusal(["answer", "clip.mp4", "?", "--model", "model"], tmp_path, hub.url)
    assert "model takes its weights from 'user/base', and there is no folder user/base here" in line


def test_the_command_line_knows_every_size_that_can_be_measured():
    assert set(SIZES) == set(ARCHITECTURES)
    assert set(LLAVA_VIDEO_SIZES) == set(LLAVA_VIDEO_ARCHITECTURES)
    assert set(QWEN_SIZES) == set(QWEN_ARCHITECTURES)


def test_a_hub_that_never_answers_costs_its_seconds_once(demo, monkeypatch):
    asked = []

    def hang(url, timeout):
        asked.append(url)
        time.sleep(2)

    monkeypatch.setattr(hub_module, "get_hf_file_metadata", hang)
    monkeypatch.setattr(hub_module, "SECONDS", 0.1)
    start = time.perf_counter()
    with pytest.raises(OSError, match=r"the Hub does not answer \(no answer\)"):
        Answerer("user/none", device="cpu")
    assert time.perf_counter() - start < 1.5
    assert len(asked) == 1
    Answerer(str(demo / "model"), device="cpu")
    assert len(asked) == 1, "a folder needs no Hub"
