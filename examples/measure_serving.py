"""
Requests that a server answers in a second: twenty drawn clips with a question each, one by one and all at once.

    python examples/measure_serving.py [ROUNDS]

It starts `holitom-hf serve` with the small model that comes with the package, whose answers are a word or two: what
is measured is what the server does around the model.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from holitom_hf.bundled.questions import draw_set, uniform_times
from holitom_hf.video.encoding import write_video


NUM_REQUESTS, NUM_FRAMES, SIDE = 20, 32, 224


def main(num_rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        requests = [chat(*pair) for pair in write_clips(Path(folder))]
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        command = ["-m", "holitom_hf", "serve", "--port", str(port), "--allowed-local-media-path", folder]
        server = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for(url, server)
            measure(url, requests, num_rounds)
        finally:
            server.terminate()
            server.wait()


def write_clips(folder: Path) -> list[tuple[str, str]]:
    """Names of clips that are drawn into a folder, and a question about each."""
    asked = []
    for number, (clip, questions) in zip(range(NUM_REQUESTS), draw_set(10 * NUM_REQUESTS, "test", seed=7)):
        write_video(folder / f"{number}.mp4", clip.render(uniform_times(NUM_FRAMES), SIDE), fps=8)
        asked.append((f"{number}.mp4", questions[number % len(questions)].text))
    return asked


def chat(video: str, question: str) -> bytes:
    content = [{"type": "video_url", "video_url": {"url": video}}, {"type": "text", "text": question}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 8, "temperature": 0}
    return json.dumps(body).encode()


def ask(url: str, body: bytes) -> tuple[str, float]:
    """The answer, and the seconds it took."""
    start = time.perf_counter()
    request = urllib.request.Request(f"{url}/v1/chat/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as reply:
        return json.load(reply)["choices"][0]["message"]["content"], time.perf_counter() - start


def wait_for(url: str, server: subprocess.Popen) -> None:
    while server.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    sys.exit("the server did not start: pip install 'holitom-hf[serving]'")


def measure(url: str, requests: list[bytes], num_rounds: int) -> None:
    expected = [answer for answer, _ in (ask(url, body) for body in requests)]  # warms up, too
    for name, num_clients in (("one by one", 1), (f"{NUM_REQUESTS} at once", NUM_REQUESTS)):
        rates, waits = [], []
        for _ in range(num_rounds):
            start = time.perf_counter()
            with ThreadPoolExecutor(num_clients) as clients:
                replies = list(clients.map(lambda body: ask(url, body), requests))
            rates.append(len(requests) / (time.perf_counter() - start))
            waits += [seconds for _, seconds in replies]
            if [answer for answer, _ in replies] != expected:
                sys.exit("the answers differ")
        print(
            f"{name}: {statistics.median(rates):.1f} requests/s ({min(rates):.1f} to {max(rates):.1f}), half of them "
            f"within {statistics.median(waits):.2f} s, the slowest {max(waits):.2f} s"
        )
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.2f} at the end")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
