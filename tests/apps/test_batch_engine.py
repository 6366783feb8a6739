"""`holitom-hf batch --engine vllm` without vLLM: what is refused, and what the engine is handed."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.video_utils import VideoMetadata
from typer.testing import CliRunner

from holitom_hf.apps.batch.answering import DecodedInputs
from holitom_hf.apps.batch.engine import answer_all_in_engine
from holitom_hf.apps.batch.inputs import BatchInput
from holitom_hf.apps.command_line.app import app
from holitom_hf.bundled.questions import uniform_times
from holitom_hf.bundled.scenes import random_clip
from holitom_hf.bundled.tiny_model import tiny_processor
from holitom_hf.video.encoding import write_video
from holitom_hf.vllm.settings import EngineEndedError

from ..models.qwen import FAMILIES


SMALL_QWEN = str(Path(__file__).parents[2] / "examples" / "small_qwen3_vl")


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Clips of 1, 3 and 5 frames, and a broken file."""
    folder = tmp_path_factory.mktemp("videos")
    clip = random_clip(np.random.default_rng(0))
    for number in (1, 3, 5):
        write_video(folder / f"{number}.mp4", clip.render(uniform_times(number), 96))
    (folder / "broken.mp4").write_bytes(b"not a video")
    return folder


def failure(videos, *arguments) -> str:
    command = ["batch", str(videos), str(videos / "out.jsonl"), "--question", "What?", *arguments]
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, command)
    assert result.exit_code == 1, result.stdout + result.stderr
    [line] = result.stderr.strip().splitlines()
    assert not list(videos.glob("out.jsonl*"))
    return line.removeprefix("error: ")


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
# The positions that Qwen's tokens have are not those that these settings name, here and elsewhere.
@pytest.mark.parametrize("options", [[], ["--model", SMALL_QWEN, "--preset", "uncompressed"]])
def test_without_vllm_one_line_says_how_it_is_installed(videos, options):
    message = failure(videos, "--engine", "vllm", *options)
    assert message.startswith("vLLM is not installed here: in an environment that has it")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "sglang"], "--engine is transformers or vllm, not 'sglang'"),
        (["--engine-options", "{}"], "--engine-options are vLLM's"),
        (["--engine", "vllm", "--engine-options", "{"], "--engine-options: no JSON"),
        (["--engine", "vllm", "--engine-options", "[1]"], "--engine-options is a JSON object"),
        (["--engine", "vllm", "--device", "cpu"], "leave out --device cpu"),
        (["--engine", "vllm", "--preset", "llava-onevision-7b-r15"], "what these settings ask for: stage 3"),
        (["--engine", "vllm", "--preset", "farthest-points-r15"], "proportional attention"),
        (["--engine", "vllm", "--preset", "llava-video-7b-r15"], "newline_position='row' is LLaVA-Video's"),
        (["--engine", "vllm", "--model", SMALL_QWEN, "--preset", "qwen3-vl-8b-r15"], "ask for: stage 3"),
        (["--engine", "vllm", "--model", SMALL_QWEN, "--preset", "qwen3-vl-8b-r15-fast"], "LLaVA-OneVision alone"),
    ],
)
def test_what_the_engine_cant_do_is_refused(videos, arguments, message):
    assert message in failure(videos, *arguments)


class Engine:
    """Answers with the number of frames, and notes what it is handed."""

    def __init__(self, fails_on: str | None = None, error: type[Exception] = ValueError, processor=None):
        self.processor, self.fails_on, self.error, self.calls = processor or tiny_processor(), fails_on, error, []

    def answer(self, prompts, videos, max_new_tokens):
        self.calls.append((prompts, videos, max_new_tokens))
        if any(self.fails_on and self.fails_on in prompt for prompt in prompts):
            raise self.error("too long")
        return [SimpleNamespace(text=f" {len(video)}\n", num_video_tokens=10 + len(video)) for video in videos]


def asked(videos, *names):
    return [BatchInput(name, str(videos / f"{name}.mp4"), f"What of {name}?") for name in names]


def answered(engine, inputs, **options):
    records = []
    options = {"batch_size": 8, "num_workers": 0, "max_new_tokens": 3} | options
    answer_all_in_engine(engine, inputs, list(range(len(inputs))), records.extend, **options)
    return {record["id"]: record for record in records}


def test_the_engine_gets_frames_that_become_the_same_pixels(videos):
    engine, inputs = Engine(), asked(videos, "3", "broken", "5")
    records = answered(engine, inputs)
    [(prompts, frames, max_new_tokens)] = engine.calls
    assert max_new_tokens == 3
    decoded = DecodedInputs(inputs, [0, 1, 2], engine.processor, torch.float32)
    for number, prompt, video in zip((0, 2), prompts, frames):
        assert video.dtype == np.uint8
        features = engine.processor(text=prompt, videos=[video], return_tensors="pt")
        assert torch.equal(features["pixel_values_videos"], decoded[number].features["pixel_values_videos"])
        assert torch.equal(features["input_ids"], decoded[number].features["input_ids"])
        placeholders = int((features["input_ids"] == engine.processor.video_token_id).sum())
        record = records[inputs[number].id]
        assert record.pop("seconds").keys() == {"decode", "answer"}
        assert record == {
            "id": inputs[number].id,
            "question": inputs[number].question,
            "video": inputs[number].video,
            "answer": str(len(video)),
            "num_frames": len(video),
            "tokens_before": placeholders,
            "tokens_after": 10 + len(video),
            "tokens_after_stage_3": 10 + len(video),
        }
    assert records["broken"] == decoded[1].asked | {"error": decoded[1].error}


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_an_engine_that_tells_times_gets_metadata_and_frames_that_become_the_same_patches(videos, family):
    engine, inputs = Engine(processor=FAMILIES[family].make_processor()), asked(videos, "3", "5")
    limits = {"fps": 8, "max_pixels": 5 * 32 * 48}
    records = answered(engine, inputs, limits=limits)
    [(prompts, found, _)] = engine.calls
    decoded = DecodedInputs(inputs, [0, 1], engine.processor, torch.float32, limits=limits)
    for number, (prompt, (frames, metadata)) in enumerate(zip(prompts, found)):
        assert frames.dtype == np.uint8
        expected = decoded[number].features
        features = engine.processor(
            text=prompt,
            videos=[frames],
            video_metadata=[VideoMetadata(**metadata)],
            do_resize=False,
            do_sample_frames=False,
            return_tensors="pt",
        )
        assert all(torch.equal(features[name], expected[name]) for name in expected if name != "second_per_grid_ts")
        assert features.get("second_per_grid_ts") == expected.get("second_per_grid_ts")
        record = records[inputs[number].id]
        assert record["num_frames"] == len(frames) == 2 * expected["video_grid_thw"][0, 0]
        assert record["tokens_before"] == (expected["input_ids"] == engine.processor.video_token_id).sum()


def test_a_number_of_frames_and_a_size_of_batches_are_kept(videos):
    engine = Engine()
    records = answered(engine, asked(videos, "5", "3", "1"), batch_size=2, num_frames=2)
    assert [len(prompts) for prompts, _, _ in engine.calls] == [2]
    assert [records[name].get("num_frames") for name in ("5", "3", "1")] == [2, 2, None]
    assert "fewer than the 2 asked for" in records["1"]["error"]


def test_a_prompt_that_the_engine_refuses_is_an_error_of_its_own(videos):
    records = answered(Engine(fails_on="of 3?"), asked(videos, "1", "3", "5"))
    assert {name: record.get("error") for name, record in records.items()} == {"1": None, "3": "too long", "5": None}


def test_an_engine_that_ended_ends_the_run_and_leaves_the_records(videos):
    records = []
    with pytest.raises(EngineEndedError):
        answer_all_in_engine(
            Engine("of 3?", EngineEndedError), asked(videos, "1", "3", "5"), [0, 1, 2], records.extend, 1, 0
        )
    assert [record["id"] for record in records] == ["1"]
