"""The lmms-eval plugin, run by lmms-eval itself on a task of a few questions."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from holitom_hf.answering.answerer import Answerer
from holitom_hf.bundled.questions import read_set, write_set
from holitom_hf.bundled.tiny_model import tiny_model, tiny_processor

from ..models import llava_video
from ..videos import write_video


pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: pip install 'holitom-hf[lmms-eval]'")

EXAMPLES = Path(__file__).parents[2] / "examples"
TASK = """
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/questions.jsonl
task: drawn
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: question
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 4
  do_sample: false
  temperature: 0
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  - version: 0.0
"""
UTILS = """
from pathlib import Path

def doc_to_visual(doc):
    return [str(Path(__file__).parent / doc["video"])]
"""
NUM_QUESTIONS = 6


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lmms") / "drawn"
    write_set(folder, NUM_QUESTIONS, side=112, num_frames=16)
    (folder / "utils.py").write_text(UTILS)
    processor = tiny_processor()
    processor.save_pretrained(folder / "model")
    tiny_model(processor.tokenizer).save_pretrained(folder / "model")
    return folder


def lmms_eval(task, out, yaml: str, *options: str) -> dict:
    """Runs the command; returns every sample it logged."""
    (task / "drawn.yaml").write_text(yaml)
    command = [
        sys.executable,
        "-m",
        "lmms_eval",
        "--model",
        "holitom",
        "--tasks",
        "drawn",
        "--include_path",
        str(task),
    ]
    command += ["--batch_size", "2", "--device", "cpu", "--log_samples", "--output_path", str(out), *options]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=out)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    [samples] = out.rglob("*samples_drawn.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    return {line["doc_id"]: line for line in lines}


def test_answers_are_those_of_the_model_alone(task, tmp_path):
    yaml = TASK.format(folder=task)
    arguments = f"pretrained={task / 'model'},retention_ratio=0.2,num_frames=16,prompt=chat_template"
    samples = lmms_eval(task, tmp_path, yaml, "--model_args", arguments)
    assert len(samples) == NUM_QUESTIONS
    answerer = Answerer(str(task / "model"), retention_ratio=0.2, device="cpu")
    answerer.load_model()
    for number, question in enumerate(read_set(task)):
        prepared = answerer.prepare(str(task / question.video), question.text)
        answerer.encode(prepared)
        alone = answerer.generate(prepared, max_new_tokens=4)
        answer = samples[number]["filtered_resps"]
        assert answer == alone.text


def test_methods_are_ranked_and_nothing_runs_twice(task, tmp_path):
    (task / "drawn.yaml").write_text(TASK.format(folder=task))
    command = [sys.executable, str(EXAMPLES / "rank_methods.py"), str(task / "model"), "--tasks", "drawn"]
    command += ["--methods", "frames", "vidcom2", "--retention-ratios", "0.2", "--out", str(tmp_path)]
    command += ["--", "--include_path", str(task), "--device", "cpu"]
    for _ in range(2):
        result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert len(list(tmp_path.rglob("*samples_drawn.jsonl"))) == 3
    lines = (tmp_path / "ranking.md").read_text().splitlines()[2:]
    assert {line.split(" | ")[0].strip("| ") for line in lines} == {"full", "frames@0.2", "vidcom2@0.2"}
    settings = json.loads((tmp_path / "vidcom2@0.2" / "holitom_config.json").read_text())
    assert (settings["outer_method"], settings["retention_ratio"]) == ("vidcom2", 0.2)
    [samples] = (tmp_path / "frames@0.2").rglob("*samples_drawn.jsonl")
    right = [json.loads(line)["exact_match"] for line in samples.read_text().splitlines()]
    [line] = [line for line in lines if "frames@0.2" in line]
    assert float(line.split(" | ")[1].rstrip("%")) == pytest.approx(100 * sum(right) / len(right), abs=0.051)


def test_choices_are_weighed_in_the_authors_conversation(task):
    """Without the command: lmms-eval 0.7.3 makes strings of the pairs of every model before it compares them."""
    from lmms_eval.api.instance import Instance

    from holitom_hf.apps.lmms_eval import HoliTomLmms

    asked, choices = read_set(task), ("no", "yes", "red")
    options = {"batch_size": 1, "device": "cpu"}
    model = HoliTomLmms.create_from_arg_string(f"pretrained={task / 'model'},num_frames=8", options)
    model.task_dict = {"drawn": {"test": [{"video": str(task / question.video)} for question in asked]}}
    requests = [
        Instance(
            request_type="loglikelihood",
            arguments=(question.text, " " + choice, lambda doc: [doc["video"]], number, "drawn", "test"),
            idx=0,
            metadata={"task": "drawn", "doc_id": number, "repeats": 1},
        )
        for number, question in enumerate(asked)
        for choice in choices
    ]
    results = iter(model.loglikelihood(requests))
    answerer = Answerer(str(task / "model"), device="cpu")
    answerer.load_model()
    for question in asked:
        text = (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<video>\n"
            f"{question.text}<|im_end|>\n<|im_start|>assistant\n"
        )
        inputs = answerer.processor(text=text, videos=str(task / question.video), num_frames=8, return_tensors="pt")
        for choice in choices:
            ids = answerer.processor.tokenizer(" " + choice, return_tensors="pt")["input_ids"]
            whole = dict(inputs) | {"input_ids": torch.cat([inputs["input_ids"], ids], 1)}
            whole["attention_mask"] = torch.ones_like(whole["input_ids"])
            length = inputs["input_ids"].shape[1]
            with torch.inference_mode():
                logits = answerer.model(**whole, prompt_length=length).logits[0, length - 1 : -1]
            logs = logits.float().log_softmax(-1)
            expected = -sum(logs[place, token] for place, token in enumerate(ids[0])) / ids.shape[1]
            loss, is_greedy = next(results)
            assert loss == pytest.approx(expected.item(), abs=1e-4)
            assert is_greedy == (logits.argmax(-1) == ids[0]).all().item()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("pretrained=bundled,typo=1", "unknown model_args: typo"),
        ("pretrained=bundled,prompt=none", "prompt must be authors or chat_template"),
        ("pretrained=bundled,preset=no-such", "no-such"),
    ],
)
def test_a_wrong_argument_is_named(arguments, message):
    from holitom_hf.apps.lmms_eval import HoliTomLmms

    with pytest.raises((ValueError, OSError), match=message):
        HoliTomLmms.create_from_arg_string(arguments, {"batch_size": 1, "device": "cpu"})


@pytest.mark.parametrize("is_told", [False, True])
def test_llava_video_is_asked_as_its_authors_do(task, tmp_path, is_told):
    """64 frames, one a second, the authors' conversation, and not told of times unless that is asked for."""
    from lmms_eval.api.instance import Instance

    from holitom_hf.apps.lmms_eval import HoliTomLmms

    llava_video.save(tmp_path / "model", is_told=True)
    clips = [write_video(tmp_path / f"{seconds}.mp4", num_frames=25 * seconds) for seconds in (3, 66)]
    arguments = f"pretrained={tmp_path / 'model'}" + ",add_time_instruction=True" * is_told
    model = HoliTomLmms.create_from_arg_string(arguments, {"batch_size": 2, "device": "cpu"})
    model.task_dict = {"drawn": {"test": [{"video": str(clip)} for clip in clips]}}
    options = {"max_new_tokens": 4, "do_sample": False}
    requests = [
        Instance(
            request_type="generate_until",
            arguments=("What?", options, lambda doc: [doc["video"]], number, "drawn", "test"),
            idx=0,
            metadata={"task": "drawn", "doc_id": number, "repeats": 1},
        )
        for number in range(2)
    ]
    found = model.generate_until(requests)
    answerer = Answerer(str(tmp_path / "model"), device="cpu")
    answerer.load_model()
    for clip, num_frames, answer in zip(clips, (3, 64), found):
        text = (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<video>\nWhat?<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        inputs = answerer.processor(text=text, videos=str(clip), add_time_instruction=is_told, return_tensors="pt")
        assert len(inputs["pixel_values_videos"][0]) == num_frames
        sequences = answerer.model.generate(**inputs, **options)
        alone = answerer.processor.decode(sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer == alone.strip()


def test_others_are_not_told_of_times(task):
    from holitom_hf.apps.lmms_eval import HoliTomLmms

    arguments = f"pretrained={task / 'model'},add_time_instruction=True"
    with pytest.raises(ValueError, match="add_time_instruction is LLaVA-Video's, not LLaVA-OneVision's"):
        HoliTomLmms.create_from_arg_string(arguments, {"batch_size": 1, "device": "cpu"})
