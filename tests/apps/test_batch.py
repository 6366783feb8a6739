"""`holitom-hf batch`: many videos, errors among them, several processes, kills at any moment."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from holitom_hf.answering.answerer import Answerer
from holitom_hf.apps.batch.answering import DecodedInputs, answer_or_tell, batches_by_length
from holitom_hf.apps.batch.inputs import BatchInput, read_inputs
from holitom_hf.apps.batch.records import BatchRecords
from holitom_hf.apps.command_line.app import app
from holitom_hf.bundled.questions import uniform_times
from holitom_hf.bundled.scenes import random_clip
from holitom_hf.bundled.tiny_model import tiny_model, tiny_processor
from holitom_hf.video.encoding import write_video


NUM_VIDEOS = 10


def run(*arguments, check: int = 0):
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["batch", *map(str, arguments), "--device", "cpu"])
    assert result.exit_code == check, result.stdout + result.stderr
    return result


def failure(*arguments) -> str:
    [line] = run(*arguments, check=1).stderr.strip().splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batch") / "model"
    processor = tiny_processor()
    processor.save_pretrained(folder)
    tiny_model(processor.tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A folder of clips of 1 to 20 frames, a broken one among them."""
    import numpy as np

    folder = tmp_path_factory.mktemp("videos")
    (folder / "more").mkdir()
    random_numbers = np.random.default_rng(0)
    for number in range(NUM_VIDEOS):
        clip = random_clip(random_numbers)
        name = folder / ("more" if number % 2 else "") / f"{number}.mp4"
        write_video(name, clip.render(uniform_times(1 + 2 * number), 112))
    (folder / "broken.mp4").write_bytes(b"not a video")
    (folder / "notes.txt").write_text("not read")
    return folder


class TestInputs:
    def test_a_folder(self, videos):
        inputs = read_inputs(str(videos), "What?")
        assert len(inputs) == NUM_VIDEOS + 1
        assert [item.id for item in inputs] == sorted(item.id for item in inputs)
        assert inputs[-1] == BatchInput("more/9.mp4", str(videos / "more" / "9.mp4"), "What?")

    def test_lines_of_json_with_paths_beside_the_file(self, videos):
        path = videos / "inputs.jsonl"
        path.write_text(
            '{"id": 7, "video": "0.mp4", "question": "Which?"}\n\n{"id": "x", "video": "http://a/b.mp4"}\n'
        )
        first, second = read_inputs(str(path), "What?")
        path.unlink()
        assert first == BatchInput("7", str(videos / "0.mp4"), "Which?")
        assert second == BatchInput("x", "http://a/b.mp4", "What?")

    @pytest.mark.parametrize("kind", ["path", "bytes", "video"])
    def test_a_dataset_reads_a_video_when_it_is_its_turn(self, videos, tmp_path, kind):
        datasets = pytest.importorskip("datasets")
        path = str(videos / "2.mp4")
        video = Path(path).read_bytes() if kind == "bytes" else path
        rows = datasets.Dataset.from_dict({"id": [1, 2], "video": [video, video], "question": ["Who?", "What?"]})
        if kind == "video":
            rows = rows.cast_column("video", datasets.Video(decode=False))
        rows.save_to_disk(str(tmp_path / "rows"))
        inputs = read_inputs(str(tmp_path / "rows"))
        assert inputs.ids == ["1", "2"]
        if kind == "video":  # save_to_disk may take the file's bytes along
            assert inputs[1].video in (path, Path(path).read_bytes())
        else:
            assert inputs[1] == BatchInput("2", video, "What?")
        rows.remove_columns("question").save_to_disk(str(tmp_path / "unasked"))
        asked = [read_inputs(str(tmp_path / name), "Why?")[0].question for name in ("rows", "unasked")]
        assert asked == ["Who?", "Why?"]
        decoded = DecodedInputs(inputs, [0], tiny_processor(), torch.float32)[0]
        assert decoded.error is None
        assert decoded.features["pixel_values_videos"].shape[1] == 5

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('{"id": "a", "video": "b.mp4"}\n', "line 1: question missing"),
            ('{"id": "a", "video": "b", "question": "c"}\n{"id"', "line 2: no JSON"),
            ("[1]\n", "line 1: expected an object"),
            ('{"id": "a", "video": "b", "question": "c"}\n' * 2, "has 1 ids more than once, 'a' among them"),
            ("\n", "holds nothing to answer"),
        ],
    )
    def test_what_is_wrong_with_a_file_is_said_with_its_line(self, tmp_path, text, message):
        (tmp_path / "inputs.jsonl").write_text(text)
        assert message in failure(tmp_path / "inputs.jsonl", tmp_path / "out.jsonl")
        assert not (tmp_path / "out.jsonl.parts").exists()

    def test_nothing_to_read(self, tmp_path, videos):
        assert "there is no folder and no file" in failure(tmp_path / "no.jsonl", tmp_path / "out.jsonl")
        assert "holds no video file" in failure(tmp_path, tmp_path / "out.jsonl", "--question", "What?")
        assert "pass --question" in failure(videos, tmp_path / "out.jsonl")

    def test_a_dataset_that_is_not_there(self, tmp_path, monkeypatch):
        datasets = pytest.importorskip("datasets")

        def unreachable(*args, **kwargs):
            raise ConnectionError("Couldn't reach 'user/rows' on the Hub")

        monkeypatch.setattr(datasets, "load_dataset", unreachable)
        error = failure("user/rows", tmp_path / "out.jsonl")
        assert error.startswith(
            "there is no folder and no file 'user/rows', and no dataset of this name can be read: "
        )

    def test_a_dataset_without_a_column(self, tmp_path):
        datasets = pytest.importorskip("datasets")
        datasets.Dataset.from_dict({"id": ["a"], "clip": ["b"]}).save_to_disk(str(tmp_path / "rows"))
        assert "no column 'video', only id, clip" in failure(tmp_path / "rows", tmp_path / "out.jsonl")


def test_every_input_has_the_record_it_would_have_alone(model_folder, videos, tmp_path):
    out = tmp_path / "out.jsonl"
    options = ["--question", "What?", "--model", model_folder, "--max-new-tokens", 4, "--batch-size", 3]
    result = run(videos, out, *options, "--workers", 1)
    assert "11 records, 1 of them errors; 11 new" in result.stdout
    records = read_lines(out)
    assert [record["id"] for record in records] == [item.id for item in read_inputs(str(videos), "What?")]
    assert not list(tmp_path.glob("out.jsonl.*"))
    answerer = Answerer(str(model_folder), device="cpu")
    answerer.load_model()
    for record in records:
        if record["id"] == "broken.mp4":
            assert "can't be read as a video" in record["error"]
            continue
        question = answerer.prepare(str(videos / record["id"]), "What?")
        answerer.encode(question)
        alone = answerer.generate(question, max_new_tokens=4)
        assert record["answer"] == alone.text
        assert record["num_frames"] == alone.num_frames
        assert record["tokens_before"] == alone.visual_tokens_before
        assert record["tokens_after"] == alone.visual_tokens_outer
        assert record["tokens_after_stage_3"] == alone.visual_tokens_inner


def test_inputs_of_like_length_go_together():
    class Item:
        def __init__(self, length, error=None):
            self.length, self.error = length, error

    lengths = [5, 1, 4, 1, 3, 9, 2, 6, 8, 7]
    items = [Item(length) for length in lengths] + [Item(0, "broken")]
    batches = [[item.length for item in batch] for batch in batches_by_length(iter(items), 2)]
    assert batches[:4] == [[1, 1], [2, 3], [4, 5], [6, 9]]  # the first eight, sorted
    assert sorted(map(tuple, batches[4:])) == [(0,), (7, 8)]


def test_one_that_fails_in_a_batch_does_not_take_the_others_with_it(model_folder, videos, monkeypatch):
    answerer = Answerer(str(model_folder), device="cpu")
    answerer.load_model()
    inputs = read_inputs(str(videos), "What?")
    decoded = DecodedInputs(inputs, [0, 1, 2, 6], answerer.processor, torch.float32)
    batch = [decoded[number] for number in range(4)]
    batch[2].features["pixel_values_videos"][:] = float("nan")
    records = {record["id"]: record for record in answer_or_tell(answerer, batch, 2)}
    assert len(records) == 4
    assert "finite" in records[batch[2].id]["error"]
    assert sum("answer" in record for record in records.values()) == 3

    generate, sizes = answerer.model.generate, []

    def out_of_memory(input_ids, **kwargs):
        sizes.append(len(input_ids))
        if len(input_ids) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(answerer.model, "generate", out_of_memory)
    records = answer_or_tell(answerer, [batch[0], batch[1], batch[3]], 2)
    assert sorted(sizes) == [1, 1, 1, 2, 3]
    assert all("answer" in record for record in records)


class TestRecords:
    def test_a_line_that_was_cut_off_is_taken_off(self, tmp_path):
        records = BatchRecords(tmp_path / "out.jsonl", "run")
        records.prepare()
        records.add([{"id": "a"}, {"id": "b"}], process=0)
        with open(records.parts / "00001.jsonl", "w") as file:
            file.write('{"id": "c", "run": "run"}\n{"id": "d", "ru')
        records.lock.close()  # as when its process ends
        again = BatchRecords(tmp_path / "out.jsonl", "run")
        again.prepare()
        assert set(again.read()) == {"a", "b", "c"}
        assert again.count() == 3
        again.add([{"id": "d"}], process=1)
        assert again.count() == 4
        assert list(again.finish(["d", "c", "b", "a"])) is not None
        assert [record["id"] for record in read_lines(tmp_path / "out.jsonl")] == ["d", "c", "b", "a"]

    def test_two_runs_do_not_write_at_once(self, tmp_path):
        first, second = BatchRecords(tmp_path / "out.jsonl", "run"), BatchRecords(tmp_path / "out.jsonl", "run")
        first.prepare()
        first.add([{"id": "a"}], process=0)
        with pytest.raises(ValueError, match="another run is writing"):
            second.prepare()
        first.finish(["a"])
        second.prepare()
        assert set(second.read()) == {"a"}

    def test_records_of_another_run_are_not_mixed_in(self, tmp_path, model_folder, videos):
        out = tmp_path / "out.jsonl"
        out.write_text('{"id": "a", "run": "another"}\n')
        error = failure(videos, out, "--question", "What?", "--model", model_folder)
        assert "answers of another model or other settings" in error
        out.write_text("something else\n")
        assert "no output of this command" in failure(videos, out, "--question", "What?", "--model", model_folder)
        assert out.read_text() == "something else\n"

    def test_new_inputs_are_added_and_errors_tried_again_when_asked(self, tmp_path, model_folder, videos):
        shutil.copy(videos / "0.mp4", tmp_path / "a.mp4")
        (tmp_path / "b.mp4").write_bytes(b"")
        out = tmp_path / "answers" / "out.jsonl"
        options = [tmp_path, out, "--question", "What?", "--model", model_folder, "--max-new-tokens", 2]
        assert "2 records, 1 of them errors; 2 new" in run(*options, "--workers", 0).stdout
        first = read_lines(out)[0]
        shutil.copy(videos / "2.mp4", tmp_path / "b.mp4")
        assert "2 records, 1 of them errors; 0 new" in run(*options, "--workers", 0).stdout
        assert "2 records, 0 of them errors; 1 new" in run(*options, "--workers", 0, "--retry-errors").stdout
        assert read_lines(out)[0] == first


@pytest.mark.parametrize("num_processes", [1, 2])
def test_killed_at_random_moments_it_neither_loses_nor_repeats(tmp_path, model_folder, videos, num_processes):
    out = tmp_path / "out.jsonl"
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command = [sys.executable, "-m", *(launch if num_processes > 1 else []), "holitom_hf", "batch", str(videos)]
    options = ["--question", "What?", "--model", str(model_folder), "--max-new-tokens", "2", "--batch-size", "1"]
    command += [str(out), *options, "--workers", "1", "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    numbers = random.Random(num_processes)

    def lines() -> int:
        return sum(part.read_bytes().count(b"\n") for part in tmp_path.glob("out.jsonl.parts/*.jsonl"))

    kills, shares = 0, set()
    for wanted in (1, 4):
        process = subprocess.Popen(
            command, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        deadline = time.monotonic() + 120
        while process.poll() is None and lines() < wanted and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(numbers.random() * 0.1)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.communicate(timeout=60)
        shares |= {part.name for part in tmp_path.glob("out.jsonl.parts/*.jsonl")}
    assert kills >= 1
    assert not out.exists()
    answered = {record["id"]: record for part in tmp_path.glob("out.jsonl.parts/*.jsonl") for record in _whole(part)}
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=120)
    records = read_lines(out)
    assert [record["id"] for record in records] == [item.id for item in read_inputs(str(videos), "What?")]
    assert all(record == answered.get(record["id"], record) for record in records)  # kept, not made again
    assert not list(tmp_path.glob("out.jsonl.*"))
    assert len(shares) == num_processes


def _whole(part: Path) -> list[dict]:
    return [json.loads(line) for line in part.read_text().splitlines(keepends=True) if line.endswith("\n")]
