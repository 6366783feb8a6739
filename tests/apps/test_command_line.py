"""The command line, as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from holitom_hf.apps.command_line.app import app

from ..videos import write_audio


def run(*arguments, check: int = 0):
    """In this process, for speed; `test_the_installed_command` runs the real one."""
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == check, result.stdout + result.stderr
    return result


def failure(*arguments) -> str:
    result = run(*arguments, check=1)
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def test_the_installed_command(demo, tmp_path):
    command = [str(Path(sys.executable).parent / "holitom-hf"), "answer"]
    options = ["--model", str(demo / "model"), "--max-new-tokens", "3"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    good = subprocess.run(
        [*command, str(demo / "clip.mp4"), "What?", *options],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    assert good.stderr == ""
    assert "visual tokens" in good.stdout
    bad = subprocess.run(
        [*command, str(tmp_path / "no.mp4"), "What?", *options],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert (bad.returncode, bad.stdout) == (1, "")
    assert bad.stderr == f"error: there is no video file {str(tmp_path / 'no.mp4')!r}\n"


def test_answer_streams_text_and_ends_with_a_summary(demo):
    result = run("answer", demo / "clip.mp4", "What?", "--model", demo / "model", "--max-new-tokens", 5)
    assert result.stderr == ""
    for line in ("frames", "visual tokens", "prefill FLOPs", "seconds"):
        assert line in result.stdout
    assert "1569 -> " in result.stdout
    assert "32, in 2 segments" in result.stdout


def test_json_is_one_object_with_every_figure(demo):
    options = ["--model", demo / "model", "--max-new-tokens", 5, "--json", "--frames", 10, "--retention-ratio", 0.3]
    report = json.loads(run("answer", demo / "clip.mp4", "What?", *options).stdout)
    before, outer, inner = (report[f"visual_tokens_{name}"] for name in ("before", "outer", "inner"))
    assert before == 10 * 49 + 1
    assert outer - 1 <= 0.3 * 490 + 10 + 3
    assert inner == round(outer * 0.5)
    assert report["num_frames"] == 10
    assert report["num_answer_tokens"] <= 5
    assert set(report["seconds"]) == {"decode", "encode", "first_token", "generate"}
    # The paper's formula once more, over 5 layers with all and 3 with half of the visual tokens.
    num_text = report["prompt_length"] - before

    def cost(n):
        return 4 * n * 128**2 + 2 * n * n * 128 + 2 * n * 128 * 384

    expected = (5 * cost(num_text + outer) + 3 * cost(num_text + inner)) / (8 * cost(num_text + before))
    assert report["flops_share"] == pytest.approx(expected)


def test_convert_writes_checkpoints_that_answer_alike(demo, tmp_path):
    run("convert", demo / "model", tmp_path / "whole", "--retention-ratio", 0.2)
    result = run("convert", demo / "model", tmp_path / "small", "--config-only", "--retention-ratio", 0.2)
    assert "Wrote" in result.stdout
    assert (tmp_path / "whole" / "model.safetensors").exists()
    assert not list((tmp_path / "small").glob("*.safetensors"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small", "whole"]
    reports = [
        json.loads(
            run(
                "answer", demo / "clip.mp4", "What?", "--model", tmp_path / name, "--max-new-tokens", 4, "--json"
            ).stdout
        )
        for name in ("whole", "small")
    ]
    assert reports[0]["text"] == reports[1]["text"]
    assert reports[0]["visual_tokens_outer"] == reports[1]["visual_tokens_outer"]
    assert "exists and is not an empty folder" in failure("convert", demo / "model", tmp_path / "whole")


class TestBadInput:
    def test_files(self, demo, tmp_path):
        (tmp_path / "empty.mp4").touch()
        (tmp_path / "text.mp4").write_text("no video" * 99)
        data = (demo / "clip.mp4").read_bytes()
        (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
        write_audio(tmp_path / "sound.mp4")
        for name, message in {
            "missing.mp4": "there is no video file",
            "empty.mp4": "is empty (0 bytes)",
            "text.mp4": "can't be read as a video",
            "cut.mp4": "cut off or damaged",
            "sound.mp4": "has no video stream, only audio",
        }.items():
            assert message in failure("answer", tmp_path / name, "What?", "--model", demo / "model")

    def test_options(self, demo):
        clip, model = demo / "clip.mp4", demo / "model"
        assert "fewer than the 65 asked for" in failure("answer", clip, "?", "--model", model, "--frames", 65)
        assert "retention_ratio must be a number" in failure(
            "answer", clip, "?", "--model", model, "--retention-ratio", 1.5
        )
        assert "no HoliTom preset or file 'r15'" in failure("answer", clip, "?", "--model", model, "--preset", "r15")
        assert "inner_merge_layer is 18, but the decoder has 8 layers" in failure(
            "answer", clip, "?", "--model", model, "--preset", "llava-onevision-7b-r15"
        )
        assert "there is no device 'tpu9'" in failure("answer", clip, "?", "--model", model, "--device", "tpu9")
        assert "dtype must be" in failure("answer", clip, "?", "--model", model, "--dtype", "int4")

    def test_models(self, demo, tmp_path):
        missing = failure("answer", demo / "clip.mp4", "?", "--model", tmp_path / "none")
        assert f"the model {str(tmp_path / 'none')!r} can't be loaded" in missing
        (tmp_path / "bert").mkdir()
        (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
        for command in (("answer", demo / "clip.mp4", "?", "--model"), ("convert",)):
            arguments = [*command, tmp_path / "bert"] + ([tmp_path / "out"] if command == ("convert",) else [])
            assert "HoliTom needs a 'llava_onevision' checkpoint (LLaVA-OneVision); this one is 'bert'" in failure(
                *arguments
            )
        assert not (tmp_path / "out").exists()

    def test_no_network(self, demo, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        message = failure("answer", demo / "clip.mp4", "?", "--model", "llava-hf/llava-onevision-qwen2-7b-ov-hf")
        assert "llava-hf/llava-onevision-qwen2-7b-ov-hf" in message

    def test_usage(self):
        assert run("answer", check=2).stderr
        assert run("no-such-command", check=2).stderr
        assert "answer" in run("--help").stdout
