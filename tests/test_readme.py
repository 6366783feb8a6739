"""Every snippet of the README runs, over a small local model in place of the one on the Hub."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from holitom_hf import HoliTomConfig
from holitom_hf.apps.command_line.app import app


README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module", autouse=True)
def preset(demo):
    # A checkpoint on the Hub is upstream's: whole, and without settings.
    (demo / "preset.json").write_text(
        str(HoliTomConfig(retention_ratio=0.1, inner_merge_layer=4).to_dict())
        .replace("'", '"')
        .replace("None", "null")
    )


def local(text: str, demo: Path) -> str:
    """The small model and the clip in place of the downloads, and settings for its 8 layers."""
    return (
        text.replace("llava-hf/llava-onevision-qwen2-7b-ov-hf", str(demo / "model"))
        .replace("video.mp4", str(demo / "clip.mp4"))
        .replace("llava-onevision-7b-r10", str(demo / "preset.json"))
        .replace("llava-onevision-7b-r15", str(demo / "preset.json"))
    )


def test_the_python_snippets_run_one_after_another(demo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    snippets = blocks("python")
    assert len(snippets) >= 6
    for snippet in snippets:
        exec(compile(local(snippet, demo), "README.md", "exec"), names)
    assert (tmp_path / "my-holitom-model" / "model.safetensors").exists()
    assert not list((tmp_path / "my-settings").glob("*.safetensors"))
    assert type(names["model"]).__name__ == "HoliTomLlavaOnevisionForConditionalGeneration"
    assert names["video"].num_tokens < 0.25 * names["video"].num_input_tokens


def test_the_commands_run(demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("holitom-hf ")]
    assert len(commands) >= 3
    for command in commands:
        arguments = shlex.split(local(command, demo))[1:]
        if arguments[0] == "answer":
            arguments += ["--max-new-tokens", "3"]
        if arguments[0] in ("questions", "evaluate"):
            arguments += ["--num-questions", "3"]
        if arguments[0] == "bench":
            arguments += ["--frames", "2", "--rounds", "1", "--new-tokens", "2"]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.stderr


def test_the_settings_table_lists_every_field_with_its_default():
    for name, default in HoliTomConfig().to_dict().items():
        shown = f'"{default}"' if isinstance(default, str) else str(default)
        row = next(line for line in README.splitlines() if line.startswith("|") and f"`{name}`" in line)
        assert (
            float(row.split("|")[2]) == default if isinstance(default, float) else row.split("|")[2].strip() == shown
        )


def test_the_make_targets_it_names_exist():
    makefile = (Path(__file__).parents[1] / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make ([a-z-]+)`", README):
        assert f"\n{target}:" in makefile
