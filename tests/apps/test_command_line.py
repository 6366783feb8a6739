"""The command line, as a user runs it."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from holitom_hf import HoliTomConfig, HoliTomLlavaOnevisionConfig
from holitom_hf.answering.answerer import Answerer
from holitom_hf.apps.command_line.app import app
from holitom_hf.apps.command_line.options import settings_of
from holitom_hf.bundled import BUNDLED_MODEL

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
    assert "32, in 3 segments" in result.stdout
    assert "(the newline after the video is one of them)" in result.stdout


def test_version_and_presets_are_told_without_torch():
    import holitom_hf

    assert run("--version").stdout == f"holitom-hf {holitom_hf.__version__}\n"
    for command in ("answer", "batch", "visualize", "demo", "serve", "convert", "flops", "bench", "scaling"):
        words = "".join(run(command, "--help").stdout.replace("│", "").split())
        for name in HoliTomConfig.presets():
            assert name in words, command
    assert "themodel's32" not in words
    code = (
        "import sys\nfrom holitom_hf.apps.command_line.app import app\n"
        "try:\n    app(sys.argv[1:])\nfinally:\n    print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    for arguments in (["--version"], ["answer", "--help"]):
        result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        assert result.stdout.rstrip().endswith("[]")


def test_the_package_says_that_it_is_typed():
    from importlib.resources import files

    assert files("holitom_hf").joinpath("py.typed").is_file()


def test_a_ratio_overlays_the_models_settings_and_a_preset_replaces_them(demo):
    own = HoliTomLlavaOnevisionConfig.from_pretrained(demo / "model").holitom_config
    assert own.inner_merge_layer != HoliTomConfig().inner_merge_layer
    both = settings_of("llava-onevision-7b-r10", 0.3)
    assert both == HoliTomConfig(retention_ratio=0.3, similarity_threshold=0.65)
    answerer = Answerer(str(demo / "model"), settings_of(None, 0.3), 0.3, device="cpu")
    assert answerer.config.holitom_config == replace(own, retention_ratio=0.3)
    answerer = Answerer(str(demo / "model"), {"similarity_threshold": 0.7}, device="cpu")
    assert answerer.config.holitom_config == replace(own, similarity_threshold=0.7)


def test_the_bundled_model_has_a_name_for_every_command(tmp_path):
    run("convert", "bundled", tmp_path / "whole")
    assert (tmp_path / "whole" / "model.safetensors").exists()
    result = run("convert", "bundled", tmp_path / "small", "--config-only")
    assert result.stderr == f"Its weights stay in {BUNDLED_MODEL}: only this machine can load it.\n"
    assert str(BUNDLED_MODEL) not in (tmp_path / "small" / "README.md").read_text()
    assert "8 frames" in run("flops", "--model", "bundled", "--frames", 8).stdout
    again = run("convert", tmp_path / "small", tmp_path / "smaller", "--config-only", "--retention-ratio", 0.2)
    assert "only this machine can load it" in again.stderr
    settings = json.loads((tmp_path / "smaller" / "config.json").read_text())["holitom_config"]
    assert (settings["retention_ratio"], settings["base_model_name_or_path"]) == (0.2, str(BUNDLED_MODEL))


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
        assert "but the decoder has 8 layers: choose 1 to 7 (layer 18 of 28 is 5 here), or None" in failure(
            "answer", clip, "?", "--model", model, "--preset", "llava-onevision-7b-r15"
        )
        assert "there is no device 'tpu9'" in failure("answer", clip, "?", "--model", model, "--device", "tpu9")
        assert "dtype must be" in failure("answer", clip, "?", "--model", model, "--dtype", "int4")

    def test_models(self, demo, tmp_path):
        missing = failure("answer", demo / "clip.mp4", "?", "--model", tmp_path / "none")
        assert f"there is no folder {tmp_path / 'none'} here" in missing
        (tmp_path / "text.txt").write_text("no model")
        told = failure("answer", demo / "clip.mp4", "?", "--model", tmp_path / "text.txt")
        assert "text.txt is a file: a model is a folder, or a repository on the Hub" in told
        (tmp_path / "bert").mkdir()
        (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
        for command in (("answer", demo / "clip.mp4", "?", "--model"), ("convert",)):
            arguments = [*command, tmp_path / "bert"] + ([tmp_path / "out"] if command == ("convert",) else [])
            told = failure(*arguments)
            assert "HoliTom needs a 'llava_onevision' checkpoint (LLaVA-OneVision)" in told
            assert "this one is 'bert'" in told
        assert not (tmp_path / "out").exists()

    def test_no_network(self, demo, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        message = failure("answer", demo / "clip.mp4", "?", "--model", "llava-hf/llava-onevision-qwen2-7b-ov-hf")
        assert "llava-hf/llava-onevision-qwen2-7b-ov-hf" in message

    def test_usage(self):
        assert run("answer", check=2).stderr
        assert run("no-such-command", check=2).stderr
        assert "answer" in run("--help").stdout


@pytest.mark.parametrize("command", ["answer", "batch", "visualize"])
def test_options_that_exclude_each_other_are_told_before_anything_is_loaded(command, tmp_path):
    (tmp_path / "in.jsonl").write_text(json.dumps({"id": "a", "video": "a.mp4", "question": "What?"}) + "\n")
    out = tmp_path / "out.jsonl"
    arguments = {
        "answer": ["a.mp4", "What?"],
        "batch": [tmp_path / "in.jsonl", out],
        "visualize": ["a.mp4", "-o", tmp_path / "a.png"],
    }[command]
    arguments = [command, *arguments, "--model", tmp_path / "none"]
    assert failure(*arguments, "--frames", 4, "--fps", 1) == (
        "error: --frames and --fps exclude each other: give one of them"
    )
    error = failure(*arguments, "--min-pixels", 9000, "--max-pixels", 100)
    assert error == "error: --min-pixels 9000 is more than --max-pixels 100"
    assert not out.exists()


def test_a_field_of_a_configuration_that_is_no_number_is_one_line(demo, tmp_path):
    values = json.loads((demo / "model" / "config.json").read_text())
    values["text_config"]["hidden_size"] = "big"
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert "hidden_size" in failure("answer", demo / "clip.mp4", "What?", "--model", tmp_path)
