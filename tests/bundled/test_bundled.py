"""The model that comes with the package, and the demo that shows it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaOnevisionForConditionalGeneration
from typer.testing import CliRunner

from holitom_hf.answering.answerer import Answerer
from holitom_hf.apps.command_line.app import app
from holitom_hf.bundled import BUNDLED_MODEL
from holitom_hf.bundled.questions import (
    NUMBERS,
    QUESTION_TYPES,
    draw_set,
    is_countable,
    read_set,
    uniform_times,
    write_set,
)
from holitom_hf.bundled.scenes import Clip
from holitom_hf.bundled.tiny_model import tiny_model, tiny_processor
from holitom_hf.bundled.training.bundle import bundle
from holitom_hf.evaluation.methods import full_run, method_runs
from holitom_hf.evaluation.report import summarize
from holitom_hf.evaluation.running import evaluate
from holitom_hf.video.decoding import read_video


def test_it_is_small_and_carries_no_second_copy_of_the_code():
    files = [file for file in BUNDLED_MODEL.iterdir() if file.is_file()]
    assert (BUNDLED_MODEL / "model.safetensors").stat().st_size <= 12 * 2**20
    assert not [file for file in files if file.suffix == ".py"]
    config = json.loads((BUNDLED_MODEL / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "auto_map" not in config


def test_it_loads_as_upstreams_model_without_remote_code():
    model, loading = AutoModelForImageTextToText.from_pretrained(BUNDLED_MODEL, output_loading_info=True)
    assert type(model) is LlavaOnevisionForConditionalGeneration
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(AutoProcessor.from_pretrained(BUNDLED_MODEL)).__name__ == "LlavaOnevisionProcessor"


def test_it_has_the_architecture_that_is_trained():
    trained, processor = Answerer(str(BUNDLED_MODEL), device="cpu"), tiny_processor()
    made = tiny_model(processor.tokenizer).config
    for name in ("vision_config", "text_config"):
        saved, expected = (getattr(config, name).to_dict() for config in (trained.config, made))
        assert {k: v for k, v in saved.items() if k != "dtype"} == {k: v for k, v in expected.items() if k != "dtype"}
    assert trained.processor.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert trained.processor.video_processor.num_frames == 16


def test_it_answers_clips_it_never_saw_plain_and_compressed(tmp_path):
    write_set(tmp_path, 180, seed=11, side=112, num_frames=16)
    answerer = Answerer(str(BUNDLED_MODEL), device="cpu", dtype="float32")
    answerer.load_model()
    runs = method_runs(answerer.config.holitom_config, ["holitom"], [0.15])
    results = evaluate(answerer, tmp_path, read_set(tmp_path), runs, tmp_path / "out", num_counted=1)
    full, short = summarize(results, runs)
    assert full.accuracy >= 0.9  # guessing reaches a third
    assert min(accuracy for accuracy, *_ in full.by_type.values()) >= 0.7
    assert short.accuracy > 0.85 * full.accuracy
    assert short.flops_share < 0.1


def test_answer_takes_it_by_default_and_says_what_it_can_do(demo):
    result = CliRunner().invoke(app, ["answer", str(demo / "clip.mp4"), "How many shapes are there?"])
    assert result.exit_code == 0, result.stderr
    assert result.stdout.split()[0] in ("one", "two", "three", "four", "five", "six")
    assert "knows drawn clips of coloured shapes" in " ".join(result.stderr.split())


def test_the_demo_shows_five_questions_with_truth_and_savings_and_ends_with_a_right_answer(tmp_path):
    command = [sys.executable, "-m", "holitom_hf.apps.demo", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stderr == ""
    marks = [line for line in result.stdout.splitlines() if line.count("✓") + line.count("✗") == 2]
    assert len(marks) == 5
    assert "785 visual tokens" in result.stdout
    question, truth, plain, short = re.split(r"\s{2,}", marks[0].strip())
    assert (plain, short) == (f"✓ {truth}", f"✓ {truth}")

    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    [asked] = re.findall(r"^\t\$\(BIN\)/holitom-hf (answer .*)$", makefile, re.MULTILINE)
    asked = asked.replace("$(DEMO)", str(tmp_path)).replace("$$", "$")
    shell = subprocess.run(["bash", "-c", f'printf "%s\\n" {asked}'], capture_output=True, text=True, check=True)
    arguments = shell.stdout.splitlines()
    assert arguments == ["answer", str(tmp_path / "clip.mp4"), question]
    assert CliRunner().invoke(app, arguments).stdout.splitlines()[0] == truth


def drawn_as(path, seed):
    """The clip, and all questions about it, that a file was written from, found by its pixels."""
    frames, _ = read_video(path, lambda metadata: np.arange(metadata.total_num_frames))
    some = frames[:: len(frames) // 8].permute(0, 2, 3, 1).numpy()[:8].astype(int)
    times = uniform_times(len(frames))[:: len(frames) // 8][:8]

    def distance(drawn):
        return np.abs(drawn[0].render(times, some.shape[1]) - some).mean()

    found = min(draw_set(60, seed=seed), key=distance)
    assert distance(found) < 5
    return found


def test_clips_that_people_see_hold_no_more_shapes_than_there_are_words_for(demo):
    clip, questions = drawn_as(demo / "clip.mp4", 2026)
    assert len(clip.shapes) <= len(NUMBERS) - 1
    assert {question.type for question in questions} <= set(QUESTION_TYPES)
    assert not is_countable(Clip(clip.scenes, [clip.shapes[0]] * len(NUMBERS)))
    assert is_countable(Clip(clip.scenes, [clip.shapes[0]] * (len(NUMBERS) - 1)))


def test_the_web_pages_examples_are_answered_right_plain_and_compressed(tmp_path):
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'holitom-hf[demo]'")
    from holitom_hf.apps.web_page import EXAMPLE_SEED, draw_examples

    answerer = Answerer(str(BUNDLED_MODEL), device="cpu")
    answerer.load_model()
    own = answerer.config.holitom_config
    examples = draw_examples(tmp_path)
    assert len(examples) == 3
    for path, question in examples:
        clip, questions = drawn_as(path, EXAMPLE_SEED)
        assert question in questions
        assert len(clip.shapes) <= len(NUMBERS) - 1
        for settings in (full_run(own).settings, own):
            prepared = answerer.prepare(path, question.text)
            answerer.encode(prepared)
            assert answerer.generate(prepared, 8, settings=settings).text == question.answer


def test_weights_that_are_too_large_are_not_bundled(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(bytes(13 * 2**20))
    with pytest.raises(ValueError, match=r"take 13.0 MiB; at most 12 may be bundled"):
        bundle(tmp_path / "model", tmp_path / "bundled")
    assert not (tmp_path / "bundled").exists()
