"""The OpenAI-compatible server, asked over loopback."""

import base64
import json
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from holitom_hf.answering.answerer import Answerer
from holitom_hf.bundled import BUNDLED_MODEL


pytest.importorskip("transformers.cli.serving.systemone", reason="this transformers has another server")
pytest.importorskip("openai", reason="serving needs: pip install 'holitom-hf[serving]'")

QUESTION = "How many shapes are there?"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(command: list[str], port: int):
    """The process, once it answers."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while True:
        assert process.poll() is None, process.stdout.read()
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).read()
            return process
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.2)


@pytest.fixture(scope="module")
def server():
    port = free_port()
    process = start([sys.executable, "-m", "holitom_hf", "serve", "--port", str(port), "--device", "cpu"], port)
    yield port
    process.terminate()
    process.communicate()


def ask(port: int, video: str | None, question: str = QUESTION, model: str = "bundled", **options):
    content = [{"type": "text", "text": question}]
    if video is not None:
        content.insert(0, {"type": "video_url", "video_url": {"url": video}})
    body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 8, "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(body | options).encode(),
        {"Content-Type": "application/json"},
    )
    return urllib.request.urlopen(request, timeout=120).read().decode()


@pytest.fixture(scope="module")
def expected(demo):
    answerer = Answerer(str(BUNDLED_MODEL), device="cpu")
    answerer.load_model()
    prepared = answerer.prepare(str(demo / "clip.mp4"), QUESTION)
    answerer.encode(prepared)
    return answerer.generate(prepared, max_new_tokens=8)


@pytest.mark.parametrize("kind", ["path", "data"])
def test_a_chat_with_a_video_has_the_compressed_models_answer(server, demo, expected, kind):
    video = str(demo / "clip.mp4")
    if kind == "data":
        video = "data:video/mp4;base64," + base64.b64encode(Path(video).read_bytes()).decode()
    reply = json.loads(ask(server, video))
    assert reply["choices"][0]["message"]["content"].strip() == expected.text
    assert reply["usage"]["prompt_tokens"] == expected.prompt_length


def test_an_answer_comes_as_a_stream(server, demo, expected):
    lines = ask(server, str(demo / "clip.mp4"), stream=True).splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    text = "".join(event["choices"][0]["delta"].get("content") or "" for event in events if event["choices"])
    assert text.strip() == expected.text


def test_it_lives_on_after_bad_requests(server, tmp_path, expected, demo):
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    bad, good = str(tmp_path / "bad.mp4"), str(demo / "clip.mp4")
    for video, model, status in ((bad, "bundled", 500), (good, "another", 400)):
        with pytest.raises(urllib.error.HTTPError) as raised:
            ask(server, video, model=model)
        assert raised.value.code == status
    assert json.loads(ask(server, str(demo / "clip.mp4")))["choices"][0]["message"]["content"] == expected.text


def test_upstreams_command_still_does_not_know_our_class(demo, tmp_path):
    """If this fails, `transformers serve` can serve our checkpoints: then `holitom_hf.apps.serving` is not needed."""
    folder = tmp_path / "model"
    convert = [sys.executable, "-m", "holitom_hf", "convert", str(BUNDLED_MODEL), str(folder)]
    subprocess.run(convert, check=True, capture_output=True)
    port = free_port()
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--trust-remote-code"]
    process = start([*command, "--device", "cpu", "--port", str(port)], port)
    try:
        with pytest.raises(urllib.error.HTTPError):
            ask(port, str(demo / "clip.mp4"), model=str(folder))
    finally:
        process.terminate()
        log, _ = process.communicate()
    assert re.search("Unknown modality for: HoliTomLlavaOnevisionForConditionalGeneration", log)
