"""Every door of the command line with every backbone: from a file to the answer that the model's own call gives."""

import json
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from holitom_hf.answering.answerer import Answerer
from holitom_hf.answering.prompts import frames_of
from holitom_hf.apps.command_line.app import app
from holitom_hf.bundled.questions import read_set
from holitom_hf.evaluation.methods import method_runs

from ..models import llava_video
from ..models.qwen import CHECKPOINTS as QWEN_CHECKPOINTS
from ..videos import write_video
from .test_serving import CHAT, Served, chat, data_url, request


CHECKPOINTS = QWEN_CHECKPOINTS | {
    "llava_video": llava_video.save,
    "llava_video, told of times": partial(llava_video.save, is_told=True),
}
QUESTIONS = ["What?", "And what happens in this one here?"]


@pytest.fixture(scope="module", params=CHECKPOINTS)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    CHECKPOINTS[request.param](folder)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return [write_video(folder / f"{number}.mp4", number, size=(96, 64)) for number in (100, 31)]


@pytest.fixture(scope="module")
def answerer(folder):
    answerer = Answerer(str(folder), device="cpu")
    answerer.load_model()
    return answerer


@pytest.fixture(scope="module")
def expected(answerer, clips) -> list[tuple[str, int, int]]:
    """Texts, frames and video tokens from the processor and `generate`, called as a user would."""
    found = []
    for clip, question in zip(clips, QUESTIONS):
        content = [{"type": "video"}, {"type": "text", "text": question}]
        text = answerer.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = answerer.processor(text=text, videos=str(clip), num_frames=6, return_tensors="pt")
        tokens = answerer.model.generate(**inputs, do_sample=False, max_new_tokens=5)
        new = tokens[0, inputs["input_ids"].shape[1] :]
        answer = answerer.processor.decode(new, skip_special_tokens=True).strip()
        if "video_grid_thw" in inputs:
            frames, height, width = inputs["video_grid_thw"][0].tolist()
            found.append((answer, 2 * frames, frames * height * width // 4))
        else:
            frames = len(inputs["pixel_values_videos"][0])
            found.append((answer, frames, frames * 3 * 4))
    return found


def run(*arguments):
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.stdout + result.stderr
    return result


def is_llava_video(folder) -> bool:
    return json.loads((folder / "config.json").read_text())["model_type"] == "llava_video"


def test_answer(folder, clips, expected):
    options = ["--model", folder, "--frames", 6, "--max-new-tokens", 5]
    answer = json.loads(run("answer", clips[0], QUESTIONS[0], *options, "--json").stdout)
    assert (answer["text"], answer["num_frames"], answer["visual_tokens_before"]) == expected[0]
    assert answer["visual_tokens_inner"] < answer["visual_tokens_outer"] < answer["visual_tokens_before"]
    summary = run("answer", clips[0], QUESTIONS[0], *options).stdout
    assert ("(newlines after rows are among them)" in summary) == is_llava_video(folder)
    assert "newline" not in summary or is_llava_video(folder)
    assert f"{answer['visual_tokens_before']} -> {answer['visual_tokens_outer']} before the decoder" in summary


def test_answer_about_frames_at_a_rate(folder, clips, answerer):
    options = ["--model", folder, "--fps", 2, "--max-new-tokens", 2, "--json"]
    answer = json.loads(run("answer", clips[0], QUESTIONS[0], *options).stdout)
    inputs = answerer.processor.video_processor(str(clips[0]), fps=2, return_tensors="pt")
    assert answer["num_frames"] == frames_of(inputs, answerer.processor)[0] > 4


def test_answer_about_smaller_frames_at_a_rate(folder, clips, answerer):
    if is_llava_video(folder):
        arguments = ["answer", clips[0], QUESTIONS[0], "--model", folder, "--max-pixels", 2048]
        result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == 1
        assert "frames of LLaVA-Video have one size: leave out min_pixels and max_pixels" in result.output
        return
    options = ["--model", folder, "--fps", 1, "--max-pixels", 2048, "--max-new-tokens", 2, "--json"]
    answer = json.loads(run("answer", clips[0], QUESTIONS[0], *options).stdout)
    inputs = answerer.processor.video_processor(str(clips[0]), fps=1, max_pixels=2048, return_tensors="pt")
    frames, height, width = inputs["video_grid_thw"][0].tolist()
    assert answer["num_frames"] == 2 * frames
    assert answer["visual_tokens_before"] == frames * height * width // 4
    assert height * width * 16 <= 2048


def test_batch_and_pictures_take_smaller_frames_at_a_rate_as_answer_does(folder, clips, answerer, tmp_path):
    if is_llava_video(folder):
        pytest.skip("its frames have one size")
    options = ["--model", folder, "--fps", 1, "--max-pixels", 2048]
    frames, height, width = answerer.processor.video_processor(
        str(clips[0]), fps=1, max_pixels=2048, return_tensors="pt"
    )["video_grid_thw"][0].tolist()
    (tmp_path / "in.jsonl").write_text(json.dumps({"id": "a", "video": str(clips[0]), "question": "What?"}) + "\n")
    batch = [tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--max-new-tokens", 2, "--workers", 0]
    run("batch", *batch, *options)
    [record] = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert (record["num_frames"], record["tokens_before"]) == (2 * frames, frames * height * width // 4)
    told = run("visualize", clips[0], "-o", tmp_path / "a.html", *options).stdout
    assert f"{frames * height * width // 4} tokens of " in told


def test_a_frame_that_is_repeated_is_told(folder, clips):
    options = ["--model", folder, "--max-new-tokens", 2]
    odd = run("answer", clips[0], QUESTIONS[0], *options, "--frames", 5).stdout
    takes_pairs = not is_llava_video(folder)
    assert ("6 (the last of 5 repeated: this model takes frames in pairs)" in odd) == takes_pairs
    assert "repeated" not in run("answer", clips[0], QUESTIONS[0], *options, "--frames", 6).stdout


def test_a_prompt_that_does_not_fit_is_told_before_anything_is_computed(answerer, clips, monkeypatch):
    prepared = answerer.prepare(str(clips[0]), QUESTIONS[0], num_frames=6)
    ids = prepared.features["input_ids"]
    first = int((ids[0] == answerer.config.video_token_id).nonzero()[0])
    prepared.features["input_ids"] = torch.cat([ids[:, :first], ids[:, first + 1 :]], dim=1)
    model = answerer.model.model
    tower = model.vision_tower if hasattr(model, "vision_tower") else model.visual
    monkeypatch.setattr(type(tower), "forward", None)
    with pytest.raises(ValueError, match="placeholders"):
        answerer.encode(prepared)


def test_batch(folder, clips, expected, tmp_path):
    lines = [
        {"id": str(row), "video": str(clip), "question": question}
        for row, (clip, question) in enumerate(zip(clips, QUESTIONS))
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--model", folder, "--frames", 6, "--max-new-tokens", 5, "--batch-size", 2, "--workers", 0]
    run("batch", tmp_path / "in.jsonl", tmp_path / "out.jsonl", *options)
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(r["answer"], r["num_frames"], r["tokens_before"]) for r in records] == expected
    assert all(record["tokens_after_stage_3"] < record["tokens_before"] for record in records)


def test_the_server(answerer, clips, expected):
    with Served(answerer, clips[0].parent, num_frames=6) as port:
        for clip, question, (text, _, _) in zip(clips, QUESTIONS, expected):
            status, reply, _ = request(port, CHAT, chat(data_url(clip.read_bytes()), question, max_tokens=5))
            assert status == 200, reply
            assert json.loads(reply)["choices"][0]["message"]["content"].strip() == text
        both = chat(data_url(clips[0].read_bytes()), QUESTIONS[0], max_tokens=5)
        both["messages"][0]["content"] += chat(data_url(clips[1].read_bytes()), "Which?")["messages"][0]["content"]
        status, reply, _ = request(port, CHAT, both)
        assert status == 200, reply


@contextmanager
def counted_experts(model):
    """torch's counter knows neither fused attention on CPUs nor products of grouped matrices."""
    implementation = model.config._experts_implementation
    model.set_experts_implementation("eager")
    with sdpa_kernel(SDPBackend.MATH):
        yield
    model.set_experts_implementation(implementation)


@torch.inference_mode()
def test_evaluate(folder, answerer, tmp_path):
    """Answers are those of one question at a time, operations what torch counts from pixels to the first token."""
    options = ["--num-questions", 6, "--methods", "holitom", "farthest", "--retention-ratios", 0.3]
    run("evaluate", "--model", folder, *options, "--dtype", "float32", "--batch-size", 6, "--out", tmp_path)
    _, *lines = map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())
    questions = {question.id: question for question in read_set(tmp_path / "test-0-6")}
    runs = {run.name: run for run in method_runs(answerer.config.holitom_config, ["holitom", "farthest"], [0.3])}
    assert len(lines) == len(questions) * len(runs)
    for line in lines:
        question, settings = questions[line["id"]], runs[line["run"]].settings
        prepared = answerer.prepare(str(tmp_path / "test-0-6" / question.video), question.text)
        with counted_experts(answerer.model), FlopCounterMode(display=False) as counter:
            answerer.model(**prepared.features, holitom_config=settings, logits_to_keep=1)
        assert line["operations"] == counter.get_total_flops()
        answerer.encode(prepared)
        answer = answerer.generate(prepared, max_new_tokens=8, settings=settings)
        assert line["answer"] == answer.text
        assert line["tokens_outer"] == answer.visual_tokens_outer
    counted = [line for line in lines if line["flops_counted"] is not None]
    without_tower = {line["operations"] - line["flops_counted"] for line in counted if line["run"] != "holitom@0.3"}
    assert len(without_tower) == 1
    assert len({line["answer"] for line in lines}) > 3
    table = (tmp_path / "table.md").read_text()
    assert "| HoliTom" in table
    assert "No verdicts: questions about" in table
    assert "Claims" not in table


@torch.inference_mode()
def test_settings_of_one_answer(answerer, clips):
    prepared = answerer.prepare(str(clips[0]), QUESTIONS[0], num_frames=6)
    answerer.encode(prepared)
    plain = answerer.generate(prepared, 3, settings={"outer_method": "none", "inner_method": "none"})
    assert plain.visual_tokens_inner == plain.visual_tokens_before
    assert answerer.generate(prepared, 3).visual_tokens_outer < plain.visual_tokens_before
