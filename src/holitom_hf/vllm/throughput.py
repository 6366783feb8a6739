"""
Requests a second and seconds to the first token of vLLM servers, plain and compressed, by concurrent requests.

    python -m holitom_hf.vllm.throughput OUT.json

All servers run throughout, and take turns: what drifts on the machine drifts for all. Every request has its own video.
"""

import argparse
import base64
import json
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from safetensors.torch import load_file, save_file

from ..bundled import BUNDLED_MODEL
from ..bundled.questions import write_set
from .weight_names import published_name


CONCURRENCY = (1, 2, 4, 8, 16, 32)
QWEN = "Qwen3VLForConditionalGeneration"


@dataclass
class Level:
    """What one server did at one number of concurrent requests, over all rounds."""

    arm: str
    concurrency: int
    requests_per_second: float
    first_token_seconds: float
    prompt_tokens: float


def published_copy(model: Path, folder: Path) -> Path:
    """A LLaVA-OneVision of ours with the names of weights, and the class, that vLLM's own model has."""
    shutil.copytree(model, folder)
    weights = load_file(model / "model.safetensors")
    names = {published_name(name): weight for name, weight in weights.items()}
    save_file(names, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["holitom_config"]
    config["architectures"] = ["LlavaOnevisionForConditionalGeneration"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def arms(model: Path, ratio: float, folder: Path) -> dict[str, list[str]]:
    """By name, what each server is told besides what all are; vLLM's own pruning where it has the model."""
    ours = ["--model", str(model), "--hf-overrides", json.dumps({"holitom_config": {"retention_ratio": ratio}})]
    if json.loads((model / "config.json").read_text())["model_type"] == "llava_onevision":
        return {"plain": ["--model", str(published_copy(model, folder / "plain"))], "ours": ours}
    plain = ["--model", str(model), "--hf-overrides", json.dumps({"architectures": [QWEN]})]
    return {"plain": plain, "evs": [*plain, "--video-pruning-rate", str(1 - ratio)], "ours": ours}


def start(options: list[str], log) -> tuple[subprocess.Popen, str]:
    """A server and its address, not yet up."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = f"--host 127.0.0.1 --port {port} --served-model-name model --dtype float32 --max-model-len 4096"
    common += " --gpu-memory-utilization 0.1 --enforce-eager --no-enable-prefix-caching --mm-processor-cache-gb 0"
    common += " --max-num-seqs 64 --disable-uvicorn-access-log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *common.split(), *options]
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT), f"http://127.0.0.1:{port}"


def wait_until_up(server: subprocess.Popen, address: str, log: Path) -> None:
    """Raises a `RuntimeError` with the end of its log if the server ends first."""
    while True:
        if server.poll() is not None:
            raise RuntimeError(f"a server ended: {log.read_text()[-3000:]}")
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5)
            return
        except OSError:
            time.sleep(1)


def ask(address: str, url: str, question: str, max_tokens: int) -> tuple[float, int]:
    """Seconds until something was answered, and the number of tokens in the prompt."""
    content = [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": question}]
    body = {
        "model": "model",
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(body).encode(), headers)
    begin, first, num_tokens = time.perf_counter(), None, 0
    with urllib.request.urlopen(request, timeout=600) as response:
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if first is None and event["choices"] and event["choices"][0]["delta"].get("content") is not None:
                # The first event of all says who speaks, before anything is computed.
                first = time.perf_counter() - begin if event["choices"][0]["delta"]["content"] else None
            num_tokens = (event.get("usage") or {}).get("prompt_tokens", num_tokens)
    return first if first is not None else time.perf_counter() - begin, num_tokens


def measure(address: str, requests: list[tuple[str, str]], concurrency: int, max_tokens: int) -> tuple[float, ...]:
    """Requests a second, median seconds to the first token, mean tokens of a prompt."""
    begin = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        answers = list(pool.map(lambda request: ask(address, *request, max_tokens), requests))
    seconds = time.perf_counter() - begin
    firsts, tokens = zip(*answers)
    return len(requests) / seconds, median(firsts), sum(tokens) / len(tokens)


def table(levels: list[Level]) -> str:
    """Of Markdown."""
    lines = ["| concurrent requests | server | tokens of a prompt | requests / s | s to the first token |"]
    lines.append("| ---: | --- | ---: | ---: | ---: |")
    for level in levels:
        lines.append(
            f"| {level.concurrency} | {level.arm} | {level.prompt_tokens:.0f} | {level.requests_per_second:.2f} | "
            f"{level.first_token_seconds:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Starts the servers, measures, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path, default=BUNDLED_MODEL, help="LLaVA-OneVision or Qwen3-VL of ours")
    parser.add_argument("--ratio", type=float, default=0.15)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=8)
    parser.add_argument("--num-frames", type=int, default=16)
    parser.add_argument("--concurrency", type=int, nargs="+", default=CONCURRENCY)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        media = ["--media-io-kwargs", json.dumps({"video": {"num_frames": args.num_frames}})]
        per_level = {concurrency: max(8, 2 * concurrency) for concurrency in args.concurrency}
        needed = args.rounds * sum(per_level.values()) + 1
        asked = {}
        for seed in range(20):
            if len(asked) < needed:
                for question in write_set(folder / "set", 2 * needed, seed=seed, side=112):
                    asked[question.video] = question.text
        videos = iter(asked.items())

        def requests(number: int) -> list[tuple[str, str]]:
            files = [next(videos) for _ in range(number)]
            encoded = [base64.b64encode((folder / "set" / file).read_bytes()).decode() for file, _ in files]
            return [(f"data:video/mp4;base64,{data}", text) for data, (_, text) in zip(encoded, files)]

        servers, addresses = [], {}
        try:
            for arm, options in arms(args.model, args.ratio, folder).items():
                log = folder / f"{arm}.log"
                server, addresses[arm] = start([*options, *media], log.open("w"))
                servers.append(server)
                wait_until_up(server, addresses[arm], log)
            warm_up = requests(1)
            for address in addresses.values():
                measure(address, warm_up, 1, args.max_tokens)
            found = {}
            for concurrency, number in per_level.items():
                for turn in range(args.rounds):
                    some = requests(number)
                    order = list(addresses) if turn % 2 == 0 else list(addresses)[::-1]
                    for arm in order:
                        result = measure(addresses[arm], some, concurrency, args.max_tokens)
                        found.setdefault((concurrency, arm), []).append(result)
        finally:
            for server in servers:
                server.terminate()
            for server in servers:
                server.wait(60)
    levels = [
        Level(arm, concurrency, *(median(values) for values in zip(*results)))
        for (concurrency, arm), results in sorted(found.items(), key=lambda item: item[0][0])
    ]
    settings = {key: str(value) for key, value in vars(args).items()}
    report = {"machine": platform.platform(), "settings": settings, "levels": [asdict(level) for level in levels]}
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    print(table(levels))


if __name__ == "__main__":
    main()
