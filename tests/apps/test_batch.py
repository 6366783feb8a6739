"""`holitom-hf batch`: many videos, errors among them, several processes, kills at any moment."""

import gc
import json
import os
import random
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from holitom_hf.answering.answerer import Answerer
from holitom_hf.apps.batch.answering import DecodedInputs, answer_or_tell, batches_by_length, decode_ahead
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
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


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
        (tmp_path / "one.mp4").write_bytes(b"\xa9")
        assert "is one video: pass a folder of videos" in failure(tmp_path / "one.mp4", tmp_path / "out.jsonl")
        (tmp_path / "one.jsonl").write_bytes(b"\xa9")
        assert "is no JSONL file" in failure(tmp_path / "one.jsonl", tmp_path / "out.jsonl")

    def test_a_dataset_that_is_not_there(self, tmp_path, monkeypatch):
        datasets = pytest.importorskip("datasets")

        def unreachable(*args, **kwargs):
            raise ConnectionError("Couldn't reach 'user/rows' on the Hub")

        monkeypatch.setattr(datasets, "load_dataset", unreachable)
        monkeypatch.setattr("holitom_hf.checkpoints.hub.get_hf_file_metadata", unreachable)
        error = failure("user/rows", tmp_path / "out.jsonl")
        assert "no file 'user/rows' here, and the Hub does not answer (Couldn't reach" in error
        monkeypatch.setattr("holitom_hf.checkpoints.hub.get_hf_file_metadata", lambda *args, **kwargs: None)
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
        assert record["question"] == "What?"
        assert record["video"] == str(videos / record["id"])
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


class Fails:
    """A processor that ends as its question says."""

    def __init__(self, processor):
        self.processor = processor

    def apply_chat_template(self, messages, **kwargs):
        self.question = messages[0]["content"][1]["text"]
        return self.processor.apply_chat_template(messages, **kwargs)

    def __call__(self, **kwargs):
        if self.question == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        errors = {"memory": MemoryError(), "codec": AttributeError("no codec"), "depth": RecursionError("too deep")}
        if self.question in errors:
            raise errors[self.question]
        return self.processor(**kwargs)


def test_any_error_is_the_record_of_its_input_alone(videos):
    path = str(videos / "0.mp4")
    inputs = [BatchInput(question, path, question) for question in ("memory", "What?", "codec", "depth")]
    inputs += [BatchInput("none", None, "What?"), BatchInput("nul", "a\0b", "What?")]
    decoded = DecodedInputs(inputs, list(range(6)), Fails(tiny_processor()), torch.float32)
    found = {item.id: item for item in (decoded[number] for number in range(6))}
    assert found["memory"].error == "MemoryError"
    assert found["codec"].error == "AttributeError: no codec"
    assert found["depth"].error == "RecursionError: too deep"
    assert found["What?"].error is None
    assert found["none"].error
    assert found["nul"].error
    assert found["codec"].asked == {"id": "codec", "question": "codec", "video": path}


def test_a_row_that_cant_be_read_is_an_error_of_its_own():
    class Rows(list):
        def __getitem__(self, number):
            if number == 1:
                raise OSError("the shard is damaged")
            return super().__getitem__(number)

    rows = Rows([BatchInput("a", "a.mp4", "What?"), BatchInput("b", "b.mp4", "What?")])
    item = DecodedInputs(rows, [1], tiny_processor(), torch.float32)[0]
    assert item.asked | {"error": item.error} == {
        "id": "b",
        "question": None,
        "video": None,
        "error": "the shard is damaged",
    }


def test_a_model_that_fails_in_any_way_on_one_input_answers_the_others(model_folder, videos, monkeypatch):
    answerer = Answerer(str(model_folder), device="cpu")
    answerer.load_model()
    decoded = DecodedInputs(read_inputs(str(videos), "What?"), [0, 1, 2], answerer.processor, torch.float32)
    batch = [decoded[number] for number in range(3)]
    generate, bad = answerer.model.generate, batch[1].features["pixel_values_videos"].shape[1]

    def short_of_memory(pixel_values_videos, **kwargs):
        if any(len(video) == bad for video in pixel_values_videos):
            raise MemoryError
        return generate(pixel_values_videos=pixel_values_videos, **kwargs)

    monkeypatch.setattr(answerer.model, "generate", short_of_memory)
    records = {record["id"]: record for record in answer_or_tell(answerer, batch, 2)}
    assert records[batch[1].id] == batch[1].asked | {"error": "MemoryError"}
    assert all("answer" in records[item.id] for item in (batch[0], batch[2]))


class Collects(DecodedInputs):
    """Collects garbage in the process that decodes."""

    def __getitem__(self, index):
        gc.collect()
        return super().__getitem__(index)


def test_decoders_left_behind_in_this_process_do_not_stop_those_that_decode(videos):
    """They have threads here and none there, for which freeing them would wait forever."""
    path = str(videos / "0.mp4")
    gc.disable()
    try:
        container = av.open(path)
        container.streams.video[0].thread_type = "FRAME"
        next(container.decode(video=0))
        left_behind = [container]
        left_behind.append(left_behind)
        del container, left_behind
        inputs = [BatchInput(str(number), path, "What?") for number in range(3)]
        decoded = Collects(inputs, [0, 1, 2], tiny_processor(), torch.float32)
        assert [item.error for item in decode_ahead(decoded, num_workers=1, num_ahead=2)] == [None] * 3
    finally:
        gc.enable()


def test_a_process_that_dies_interrupts_no_answer(videos):
    """torch's handler of SIGCHLD would raise in whatever is done with the inputs before."""
    path = str(videos / "0.mp4")
    questions = ["a", "b", "c", "d", "die", "e"]
    inputs = [BatchInput(str(number), path, question) for number, question in enumerate(questions)]
    decoded = DecodedInputs(inputs, list(range(6)), Fails(tiny_processor()), torch.float32)
    found = []
    for item in decode_ahead(decoded, num_workers=1, num_ahead=2):
        deadline = time.monotonic() + 1.5
        while time.monotonic() < deadline:  # the process is ahead, and dies here
            time.sleep(0.01)
        found.append(item)
    assert [item.id for item in found if item.error] == ["4"]
    assert len(found) == 6


def test_a_process_that_dies_takes_only_its_input_along(videos):
    path = str(videos / "0.mp4")
    questions = ["a", "b", "die", "c", "die", "d", "e", "f", "g"]
    inputs = [BatchInput(str(number), path, question) for number, question in enumerate(questions)]
    decoded = DecodedInputs(inputs, list(range(9)), Fails(tiny_processor()), torch.float32)
    found = list(decode_ahead(decoded, num_workers=2, num_ahead=2))
    assert [item.id for item in found] == [str(number) for number in range(9)]
    assert [item.id for item in found if item.error] == ["2", "4"]
    assert "was killed" in found[2].error
    assert found[4].asked == {"id": "4", "question": "die", "video": path}


def test_a_file_without_a_decoder_and_a_name_that_is_no_text_do_not_end_a_run(model_folder, videos, tmp_path):
    folder = os.fsencode(tmp_path / "in")
    os.mkdir(folder)
    shutil.copy(os.fsencode(videos / "2.mp4"), folder + b"/caf\xe9 100%.mp4")
    shutil.copy(videos / "2.mp4", tmp_path / "in" / "plain.mp4")
    write_video(tmp_path / "in" / "a.mkv", np.zeros((3, 112, 112, 3), np.uint8))
    content = (tmp_path / "in" / "a.mkv").read_bytes()
    assert content.count(b"V_MPEG4/ISO/AVC") == 1
    (tmp_path / "in" / "a.mkv").write_bytes(content.replace(b"V_MPEG4/ISO/AVC", b"V_MPEG4/ISO/XYZ"))
    out = tmp_path / "out.jsonl"
    options = [tmp_path / "in", out, "--question", "What?", "--model", model_folder, "--max-new-tokens", 2]
    assert "3 records, 1 of them errors; 3 new" in run(*options, "--workers", 1).stdout
    unknown, named, plain = read_lines(out)
    assert (unknown["id"], named["id"], plain["id"]) == ("a.mkv", "not-utf-8://caf%E9%20100%25.mp4", "plain.mp4")
    assert unknown["error"]
    assert named["answer"] == plain["answer"]
    assert "3 records, 1 of them errors; 0 new" in run(*options, "--workers", 0).stdout


def test_a_line_is_what_ends_with_a_line_feed(model_folder, videos, tmp_path):
    """Not what str.splitlines calls one: U+2028, U+0085 and others stand in names and questions."""
    name, question = "a\u2028b\x85c\x1d", "What\u2029 is\x85 this?"
    item = {"id": name, "video": str(videos / "2.mp4"), "question": question}
    for ascii_only in (True, False):
        path = tmp_path / f"in-{ascii_only}.jsonl"
        path.write_text(
            json.dumps(item, ensure_ascii=ascii_only) + "\r\n" + '{"id": "b", "video": "", "question": "Q"}\n', "utf-8"
        )
        assert read_inputs(str(path), "Q")[0] == BatchInput(name, item["video"], question)
        options = [path, tmp_path / f"out-{ascii_only}.jsonl", "--model", model_folder, "--max-new-tokens", 2]
        assert "2 records, 1 of them errors; 2 new" in run(*options, "--workers", 0).stdout
        assert "2 records, 1 of them errors; 0 new" in run(*options, "--workers", 0).stdout
        assert read_lines(options[1])[0]["question"] == question


def test_a_line_too_deep_to_read_is_said_with_its_number(tmp_path):
    (tmp_path / "inputs.jsonl").write_text("\n" + "[" * 100_000)
    assert "line 2: no JSON" in failure(tmp_path / "inputs.jsonl", tmp_path / "out.jsonl")


def test_what_a_stranger_lists_reads_its_folder_and_no_private_host(model_folder, videos, tmp_path):
    host = socket.create_server(("127.0.0.1", 0))  # answers nobody; a connection would wait in its queue
    port = host.getsockname()[1]
    folder = tmp_path / "list"
    (folder / "more").mkdir(parents=True)
    shutil.copy(videos / "2.mp4", folder / "more" / "in.mp4")
    shutil.copy(videos / "2.mp4", tmp_path / "out.mp4")
    (folder / "link.mp4").symlink_to(tmp_path / "out.mp4")
    (folder / "up").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe.mp4")
    inside = {"more/in.mp4", str(folder / "more" / "in.mp4"), "more/../more/in.mp4"}
    outside = {str(tmp_path / "out.mp4"), "../out.mp4", "link.mp4", "up/out.mp4", "/dev/zero", "more/../../out.mp4"}
    odd = {"pipe.mp4", f"file://{tmp_path}/out.mp4", "rtsp://127.0.0.1:9/a", "more", f"http://127.0.0.1:{port}/a.mp4"}
    lines = [json.dumps({"id": video, "video": video, "question": "What?"}) for video in inside | outside | odd]
    (folder / "in.jsonl").write_text("\n".join(lines))
    out = tmp_path / "answers.jsonl"
    options = [folder / "in.jsonl", out, "--model", model_folder, "--max-new-tokens", 2, "--workers", 0]
    run(*options, "--untrusted")
    records = {record["id"]: record for record in read_lines(out)}
    assert {name for name, record in records.items() if "answer" in record} == inside
    assert all("is outside the folder" in records[name]["error"] for name in outside)
    assert "is no file" in records["pipe.mp4"]["error"]
    assert "127.0.0.1 is not a public host" in records[f"http://127.0.0.1:{port}/a.mp4"]["error"]
    host.settimeout(0)
    with host, pytest.raises(BlockingIOError):  # nobody knocked
        host.accept()
    trusted = [line for line in lines if json.loads(line)["id"] in (outside - {"/dev/zero"})]
    (folder / "in.jsonl").write_text("\n".join(trusted))
    run(folder / "in.jsonl", tmp_path / "trusted.jsonl", *options[2:])  # one's own list may name them all
    assert all("answer" in record for record in read_lines(tmp_path / "trusted.jsonl"))


def test_the_bar_ends_with_what_the_summary_says(model_folder, videos, tmp_path):
    options = ["--question", "What?", "--model", model_folder, "--max-new-tokens", 2, "--batch-size", 3]
    result = run(videos, tmp_path / "out.jsonl", *options, "--workers", 1)
    said = re.search(r"; (\d+) new in ([\d.]+) s \(([\d.]+) videos/s\)", result.stdout)
    shown = re.findall(r"(\d+)/(\d+)\s+([\d.]+) videos/s", result.stderr)[-1]
    assert shown == (said[1], said[1], said[3])
    assert int(said[1]) / float(said[2]) == pytest.approx(float(said[3]), rel=0.1)


PREPARE = """
import sys
from pathlib import Path
from holitom_hf.apps.batch.records import BatchRecords
records = BatchRecords(Path(sys.argv[1]), "run")
try:
    records.prepare()
except ValueError as error:
    sys.exit(str(error))
"""


def prepare_elsewhere(out: Path) -> subprocess.CompletedProcess:
    """Takes an output for a run in another process, which ends at once."""
    return subprocess.run(
        [sys.executable, "-c", PREPARE, str(out)], capture_output=True, text=True, check=False, timeout=60
    )


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
        out, first = tmp_path / "out.jsonl", BatchRecords(tmp_path / "out.jsonl", "run")
        first.prepare()
        first.add([{"id": "a"}], process=0)
        assert f"another run is writing to {str(out)!r}" in prepare_elsewhere(out).stderr
        first.finish(["a"])
        assert prepare_elsewhere(out).stderr == ""
        second = BatchRecords(out, "run")
        second.prepare()
        assert set(second.read()) == {"a"}

    def test_a_killed_run_is_not_held_up_by_its_workers(self, tmp_path):
        out = tmp_path / "out.jsonl"
        program = (
            PREPARE
            + """
import os, time
worker = os.fork()
if worker == 0:
    time.sleep(30)  # as a worker, which looks every five seconds whether the run is still there
print(worker, flush=True)
time.sleep(30)
"""
        )
        run = subprocess.Popen([sys.executable, "-c", program, out], stdout=subprocess.PIPE, text=True)
        worker = int(run.stdout.readline())
        try:
            assert "another run is writing" in prepare_elsewhere(out).stderr
            run.kill()
            run.wait()
            os.kill(worker, 0)  # it is still there
            assert prepare_elsewhere(out).stderr == ""
        finally:
            os.kill(worker, signal.SIGKILL)
            run.stdout.close()

    @pytest.mark.parametrize("kind", ["pipe", "device"])
    def test_an_output_that_is_no_file_is_refused_and_left_alone(self, tmp_path, kind):
        out = tmp_path / "out.jsonl"
        if kind == "pipe":
            os.mkfifo(out)
        else:
            try:
                os.mknod(out, stat.S_IFCHR | 0o666, os.makedev(1, 3))
            except PermissionError:
                pytest.skip("only root may make a device")
        before = os.stat(out)
        with pytest.raises(ValueError, match="is a device or a pipe: name a file to write"):
            BatchRecords(out, "run").prepare()
        assert os.stat(out) == before
        assert list(tmp_path.iterdir()) == [out]

    def test_a_link_is_followed(self, tmp_path):
        (tmp_path / "disk").mkdir()
        (tmp_path / "out.jsonl").symlink_to(tmp_path / "disk" / "answers.jsonl")
        records = BatchRecords(tmp_path / "out.jsonl", "run")
        records.prepare()
        records.add([{"id": "a"}], process=0)
        records.finish(["a"])
        assert (tmp_path / "out.jsonl").is_symlink()
        assert read_lines(tmp_path / "disk" / "answers.jsonl") == [{"id": "a", "run": "run"}]

    @pytest.mark.parametrize("text", ["a\u2028b", "a\x85b\x0bc\x1cd", "a\nb\rc", "caf\udce9", "\ud83d"], ids=ascii)
    def test_whatever_a_text_holds_it_comes_back(self, tmp_path, text):
        for moment in ("added", "finished"):
            records = BatchRecords(tmp_path / "out.jsonl", "run")
            records.prepare()
            records.add([{"id": text + moment, "answer": text}, {"id": moment, "error": text}], process=0)
            assert records.read()[text + moment] == {"id": text + moment, "answer": text, "run": "run"}
            records.finish([text + "added", "added"])
        lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_bytes().split(b"\n")[:-1]]
        assert [line["id"] for line in lines] == [text + "added", "added", *sorted(["finished", text + "finished"])]

    def test_records_of_another_run_are_not_mixed_in(self, tmp_path, model_folder, videos):
        out = tmp_path / "out.jsonl"
        out.write_text('{"id": "a", "run": "another"}\n')
        error = failure(videos, out, "--question", "What?", "--model", model_folder)
        assert "answers of another model or other settings" in error
        out.write_text("something else\n")
        assert "no output of this command" in failure(videos, out, "--question", "What?", "--model", model_folder)
        assert out.read_text() == "something else\n"

    def test_it_fails_if_every_input_did_and_tells_the_first_reason(self, tmp_path, model_folder, videos):
        (tmp_path / "b.mp4").write_bytes(b"")
        out = tmp_path / "answers" / "out.jsonl"
        options = [tmp_path, out, "--question", "What?", "--model", model_folder, "--workers", 0]
        for new in (1, 0):
            result = run(*options, check=1)
            assert f"1 records, 1 of them errors; {new} new" in result.stdout
            [line] = result.stderr.strip().splitlines()[-1:]
            assert line.startswith("error: no input was answered; the first one: ")
        shutil.copy(videos / "0.mp4", tmp_path / "a.mp4")
        assert "2 records, 1 of them errors; 1 new" in run(*options, "--max-new-tokens", 256).stdout

    def test_limits_of_pixels_are_refused_before_anything_is_decoded(self, tmp_path, model_folder, videos):
        options = [videos, tmp_path / "out.jsonl", "--question", "What?", "--model", model_folder]
        assert failure(*options, "--max-pixels", 4096).startswith("frames of LLaVA-OneVision have one size")

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


@pytest.mark.parametrize("num_processes", [1, pytest.param(2, marks=pytest.mark.slow)])
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
