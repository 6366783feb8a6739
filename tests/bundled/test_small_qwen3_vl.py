"""The small Qwen3-VL that stands beside the package: it loads everywhere, and it answers."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen3VLForConditionalGeneration

from holitom_hf.answering.answerer import Answerer
from holitom_hf.bundled.questions import read_set, write_set
from holitom_hf.bundled.tiny_qwen3_vl import tiny_qwen3_vl, tiny_qwen3_vl_processor
from holitom_hf.evaluation.methods import method_runs
from holitom_hf.evaluation.running import evaluate


SMALL = Path(__file__).parents[2] / "examples" / "small_qwen3_vl"


@pytest.fixture(scope="module")
def answerer():
    answerer = Answerer(str(SMALL), device="cpu", dtype="float32")
    answerer.load_model()
    return answerer


def test_it_is_small_and_carries_no_code():
    assert sum(file.stat().st_size for file in SMALL.glob("*.safetensors")) <= 6e6
    assert not list(SMALL.glob("*.py"))
    config = json.loads((SMALL / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "auto_map" not in config


def test_it_has_the_architecture_that_is_trained(answerer):
    processor = tiny_qwen3_vl_processor()
    made = tiny_qwen3_vl(processor.tokenizer).config
    for name in ("vision_config", "text_config"):
        saved, expected = (getattr(config, name).to_dict() for config in (answerer.config, made))
        assert {k: v for k, v in saved.items() if k != "dtype"} == {k: v for k, v in expected.items() if k != "dtype"}
    assert answerer.processor.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert answerer.processor.video_processor.num_frames == 16


@torch.inference_mode()
def test_it_is_upstreams_model_without_remote_code(answerer, tmp_path):
    model, loading = AutoModelForImageTextToText.from_pretrained(SMALL, output_loading_info=True, dtype="float32")
    assert type(model) is Qwen3VLForConditionalGeneration
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(AutoProcessor.from_pretrained(SMALL)).__name__ == "Qwen3VLProcessor"
    question = write_set(tmp_path, 1, "validation", side=112)[0]
    inputs = answerer.prepare(str(tmp_path / question.video), question.text).features
    theirs = model.eval().generate(**inputs, max_new_tokens=8, do_sample=False)
    ours = answerer.model.generate(
        **inputs, max_new_tokens=8, do_sample=False, holitom_config={"outer_method": "none", "inner_method": "none"}
    )
    assert torch.equal(ours, theirs)


def test_it_answers(answerer, tmp_path):
    """Plain as it is said to, and compressed far better than without the video."""
    write_set(tmp_path, 90, "validation", seed=3, side=112)
    runs = method_runs(answerer.config.holitom_config, ["holitom"], [0.25])
    results = evaluate(answerer, tmp_path, read_set(tmp_path), runs, tmp_path / "out", num_counted=0)
    right = {run.name: [r.is_right for r in results if r.run == run.name] for run in runs}
    assert sum(right["full"]) >= 0.85 * 90
    assert sum(right["holitom@0.25"]) >= 0.7 * 90
