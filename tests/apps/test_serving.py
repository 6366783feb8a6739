"""The OpenAI-compatible server, asked over loopback."""

import base64
import contextlib
import io
import json
import logging
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import uvicorn
from PIL import Image

from holitom_hf.answering.answerer import Answerer
from holitom_hf.bundled import BUNDLED_MODEL
from holitom_hf.bundled.questions import draw_set, uniform_times
from holitom_hf.video.encoding import write_video
from holitom_hf.video.sources import MediaSources

from ..video.test_strangers import gif_of, lists_of_files, mp4_that_claims


openai = pytest.importorskip("openai", reason="serving needs: pip install 'holitom-hf[serving]'")
pytest.importorskip("prometheus_client", reason="serving needs: pip install 'holitom-hf[serving]'")

from holitom_hf.apps.serving import preparing  # noqa: E402
from holitom_hf.apps.serving.limits import ServingLimits  # noqa: E402
from holitom_hf.apps.serving.server import build_app, run_server  # noqa: E402


QUESTION = "How many shapes are there?"
CHAT = "/v1/chat/completions"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def request(port: int, path: str, body=None, headers: dict | None = None, timeout: float = 120):
    """Status, text and headers of an answer; a body that is no bytes is sent as JSON."""
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
    asked = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", body, {"Content-Type": "application/json"} | (headers or {})
    )
    try:
        with urllib.request.urlopen(asked, timeout=timeout) as reply:
            return reply.status, reply.read().decode(), dict(reply.headers)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode(), dict(error.headers)


def chat(video: str | None, question: str = QUESTION, **options) -> dict:
    content = [{"type": "text", "text": question}]
    if video is not None:
        content.insert(0, {"type": "video_url", "video_url": {"url": video}})
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 8, "temperature": 0} | options


def data_url(content: bytes, kind: str = "video/mp4") -> str:
    return f"data:{kind};base64," + base64.b64encode(content).decode()


def refusal(status: int, text: str) -> str:
    """The message of a 4xx, as OpenAI's clients read it."""
    assert 400 <= status < 500, (status, text)
    return json.loads(text)["error"]["message"]


@pytest.fixture(scope="module")
def answerer():
    answerer = Answerer(str(BUNDLED_MODEL), device="cpu")
    answerer.load_model()
    return answerer


@pytest.fixture(scope="module")
def expected(answerer, demo):
    prepared = answerer.prepare(str(demo / "clip.mp4"), QUESTION)
    answerer.encode(prepared)
    return answerer.generate(prepared, max_new_tokens=8)


class Served:
    """A server in threads of this process."""

    def __init__(self, answerer, local_path=None, domains=(), limits=None, **options):
        limits = limits or ServingLimits()
        sources = MediaSources(local_path, domains, limits.max_media_bytes, limits.max_fetch_seconds)
        app = build_app(answerer, "bundled", limits=limits, sources=sources, **options)
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None))
        self.thread = threading.Thread(target=self.server.run)

    def __enter__(self) -> int:
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        return self.server.servers[0].sockets[0].getsockname()[1]

    def __exit__(self, *error) -> None:
        self.server.should_exit = True
        self.thread.join(60)


@pytest.fixture(scope="module")
def port(answerer, demo):
    with Served(answerer, demo) as port:
        yield port


def metrics(port: int) -> dict[str, float]:
    lines = request(port, "/metrics")[1].splitlines()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}


# ---- answers ----


@pytest.mark.parametrize("kind", ["path", "file", "data"])
def test_a_chat_with_a_video_has_the_compressed_models_answer(port, demo, expected, kind):
    path = demo / "clip.mp4"
    video = {"path": "clip.mp4", "file": path.as_uri(), "data": data_url(path.read_bytes())}[kind]
    status, text, _ = request(port, CHAT, chat(video, model="bundled"))
    reply = json.loads(text)
    assert status == 200
    assert reply["choices"][0]["message"]["content"].strip() == expected.text
    assert reply["usage"]["prompt_tokens"] == expected.prompt_length


def test_openais_client_lists_the_model_asks_and_streams(port, expected):
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["bundled"]
    assert client.models.retrieve("bundled").id == "bundled"
    with pytest.raises(openai.NotFoundError, match="has the model 'bundled' and no other"):
        client.models.retrieve("another")
    asked = {"model": "bundled", "messages": chat("clip.mp4")["messages"], "max_tokens": 8, "temperature": 0}
    reply = client.chat.completions.create(**asked)
    assert reply.choices[0].message.content == expected.text
    pieces = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == expected.text
    with pytest.raises(openai.BadRequestError, match="is outside the folder that this server reads"):
        client.chat.completions.create(**asked | {"messages": chat("/etc/passwd")["messages"]})


def test_a_conversation_goes_on_and_a_text_alone_is_answered(port, answerer, demo):
    first, reply, second = QUESTION, "five", "Is there a red circle?"
    content = [{"type": "video_url", "video_url": {"url": "clip.mp4"}}, {"type": "text", "text": first}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": reply, "tool_calls": None, "refusal": None},
        {"role": "user", "content": second},
    ]
    status, text, _ = request(port, CHAT, chat(None, messages=messages))
    prompt = answerer.processor.apply_chat_template(
        [
            {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": first}]},
            {"role": "assistant", "content": [{"type": "text", "text": reply}]},
            {"role": "user", "content": [{"type": "text", "text": second}]},
        ],
        add_generation_prompt=True,
    )
    inputs = answerer.processor(text=prompt, videos=str(demo / "clip.mp4"), return_tensors="pt")
    output = answerer.model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert status == 200
    assert json.loads(text)["choices"][0]["message"]["content"] == answerer.processor.decode(
        output, skip_special_tokens=True
    )
    assert request(port, CHAT, chat(None))[0] == 200


def test_a_number_of_frames_and_stop_words_are_taken_from_the_request(port, expected):
    status, text, _ = request(port, CHAT, chat("clip.mp4", chat_template_kwargs={"num_frames": 4}))
    usage = json.loads(text)["usage"]
    assert status == 200
    tokens_per_frame = (expected.visual_tokens_before - 1) // expected.num_frames
    assert expected.prompt_length - usage["prompt_tokens"] == (expected.num_frames - 4) * tokens_per_frame
    status, text, _ = request(port, CHAT, chat("clip.mp4", stop=[expected.text[:1]], seed=3, top_p=0.5))
    assert status == 200
    assert json.loads(text)["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF"])
def test_a_picture_is_answered_as_the_model_answers_it(port, answerer, format):
    picture = Image.linear_gradient("L").convert("RGB").resize((300, 200))
    content = io.BytesIO()
    picture.save(content, format)
    part = {"type": "image_url", "image_url": {"url": data_url(content.getvalue(), f"image/{format.lower()}")}}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": QUESTION}]}]
    status, text, _ = request(port, CHAT, chat(None, messages=messages))
    prompt = answerer.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}],
        add_generation_prompt=True,
    )
    inputs = answerer.processor(text=prompt, images=Image.open(content).convert("RGB"), return_tensors="pt")
    output = answerer.model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert status == 200
    assert json.loads(text)["choices"][0]["message"]["content"] == answerer.processor.decode(
        output, skip_special_tokens=True
    )


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Twenty clips with a question about each."""
    folder = tmp_path_factory.mktemp("clips")
    asked = []
    for number, (clip, questions) in zip(range(20), draw_set(200, "test", seed=7)):
        write_video(folder / f"{number}.mp4", clip.render(uniform_times(24 + number), 112), fps=8)
        asked.append((f"{number}.mp4", questions[number % len(questions)].text))
    return folder, asked


def test_twenty_requests_at_once_get_the_answers_that_they_get_alone(answerer, clips):
    folder, asked = clips
    alone = []
    for video, question in asked:
        prepared = answerer.prepare(str(folder / video), question)
        answerer.encode(prepared)
        answer = answerer.generate(prepared, max_new_tokens=8)
        alone.append((answer.text, answer.prompt_length))
    assert len({length for _, length in alone}) > 5
    assert len({text for text, _ in alone}) > 3
    with Served(answerer, folder) as port, ThreadPoolExecutor(20) as clients:
        replies = list(clients.map(lambda pair: request(port, CHAT, chat(*pair)), asked))
        counted = metrics(port)
    assert [status for status, *_ in replies] == [200] * 20
    bodies = [json.loads(text) for _, text, _ in replies]
    together = [(body["choices"][0]["message"]["content"], body["usage"]["prompt_tokens"]) for body in bodies]
    assert together == alone
    assert counted['holitom_tokens_total{of="prompt"}'] == sum(length for _, length in alone)


# ---- what clients must not do ----


def malformed(content: bytes) -> dict[str, tuple[object, str]]:
    """Bodies that are no request, and a word of the message."""
    text, video = {"type": "text", "text": "hi"}, {"type": "video_url", "video_url": {"url": data_url(content)}}

    def of(*parts):
        return {"messages": [{"role": "user", "content": list(parts)}]}

    def url(address):
        return of({"type": "video_url", "video_url": {"url": address}}, text)

    good = of(text)
    return {
        "empty": (b"", "no JSON"),
        "not json": (b"{", "no JSON"),
        "not utf-8": (b'{"messages": "\xff"}', "no JSON"),
        "deep": (b"[" * 100_000, "no JSON"),
        "huge number": (b'{"messages": ' + b"9" * 5000 + b"}", "no JSON"),
        "a list": ([], "dictionary"),
        "a text": ("hi", "dictionary"),
        "null": (b"null", "dictionary"),
        "no messages": ({}, "messages"),
        "messages null": ({"messages": None}, "messages"),
        "messages empty": ({"messages": []}, "messages"),
        "messages a text": ({"messages": "hi"}, "messages"),
        "many messages": ({"messages": [{"role": "user", "content": "a"}] * 1000}, "messages"),
        "message a number": ({"messages": [1]}, "messages.0"),
        "no role": ({"messages": [{"content": "hi"}]}, "role"),
        "role a list": ({"messages": [{"role": ["user"], "content": "hi"}]}, "role"),
        "role of our own": ({"messages": [{"role": "user|>", "content": "hi"}]}, "role"),
        "no content": ({"messages": [{"role": "user"}]}, "content"),
        "content a number": ({"messages": [{"role": "user", "content": 1}]}, "content"),
        "part a text": (of("hi"), "content"),
        "part without type": (of({"text": "hi"}), "type"),
        "part of a strange type": (of({"type": "input_audio", "input_audio": {}}), "input_audio"),
        "part without text": (of({"type": "text"}), "text"),
        "text null": (of({"type": "text", "text": None}), "text"),
        "half a surrogate": (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "half a surrogate"),
        "video url a text": (of({"type": "video_url", "video_url": "x"}), "video_url"),
        "video url without url": (of({"type": "video_url", "video_url": {}}), "url"),
        "video url null": (url(None), "url"),
        "video url empty": (url(""), "url"),
        "data url broken": (url("data:video/mp4;base64,???"), "base64"),
        "data url not base64": (url("data:video/mp4,x"), "data URL"),
        "data url empty": (url("data:video/mp4;base64,"), "empty"),
        "no video": (url(data_url(b"no video")), "can't be read as a video"),
        "half a video": (url(data_url(content[: len(content) // 2])), "cut off"),
        "a list of files": (url(data_url(lists_of_files(Path("/"))["m3u8"])), "can't be read as a video"),
        "a socket": (url(data_url(lists_of_files(Path("/"))["sdp"])), "can't be read as a video"),
        "many samples": (url(data_url(mp4_that_claims(70_000_000))), "samples"),
        "many pixels": (url(data_url(gif_of(8192, 8192))), "pixels"),
        "a codec that is not known": (url(data_url(mp4_that_claims(10).replace(b"mp4v", b"xyzw"))), "codec"),
        "picture that is none": (of({"type": "image_url", "image_url": {"url": data_url(b"x")}}), "picture"),
        "picture of many pixels": (
            of({"type": "image_url", "image_url": {"url": data_url(gif_of(60000, 60000))}}),
            "pixels",
        ),
        "five videos": (of(*[video] * 5), "4 are allowed"),
        "placeholder in the text": (of({"type": "text", "text": "<video>"}), "<video>"),
        "picture in the text": (of({"type": "text", "text": "a <image> b"}), "<image>"),
        "long text": (of({"type": "text", "text": "a " * 300_000}), "too long"),
        "many tokens": (of({"type": "text", "text": "a " * 100_000}), "tokens"),
        "another model": (good | {"model": "another"}, "'bundled'"),
        "model a list": (good | {"model": ["bundled"]}, "model"),
        "unknown field": (good | {"best_of": 2}, "best_of"),
        "many unknown fields": ({f"field {number}": 1 for number in range(10**5)}, "field 0"),
        "a long field": (good | {"f" * 10**6: 1}, "fff"),
        "half a surrogate as a field": (b'{"\\ud800": 1}', "ud800"),
        "half a surrogate as an address": (
            b'{"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "\\ud800"}}]}]}',
            "content.0.video_url.url: ",
        ),
        "many biases": (good | {"logit_bias": {f"a{number}": 1 for number in range(10**5)}}, "logit_bias"),
        "many settings": (good | {"chat_template_kwargs": {f"a{number}": 1 for number in range(10**5)}}, "field 'a0'"),
        "many stops of no kind": (good | {"stop": [1] * 10**5}, "stop"),
        "many parts of no kind": (of(*[1] * 10**5), "content"),
        "two answers": (good | {"n": 2}, "n: "),
        "max tokens a text": (good | {"max_tokens": "many"}, "max_tokens"),
        "max tokens negative": (good | {"max_tokens": -1}, "max_tokens"),
        "max tokens large": (good | {"max_tokens": 10**9}, "2048 are allowed"),
        "completion tokens large": (good | {"max_completion_tokens": 10**9}, "2048 are allowed"),
        "temperature a text": (good | {"temperature": "hot"}, "temperature"),
        "temperature not a number": (
            b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}',
            "temper",
        ),
        "temperature negative": (good | {"temperature": -1}, "temperature"),
        "top_p 0": (good | {"top_p": 0}, "top_p"),
        "seed negative": (good | {"seed": -1}, "seed"),
        "seed large": (good | {"seed": 2**80}, "seed"),
        "penalty": (good | {"frequency_penalty": -1}, "frequency_penalty"),
        "stop empty": (good | {"stop": ""}, "stop"),
        "stop long": (good | {"stop": "a" * 1000}, "stop"),
        "stop many": (good | {"stop": ["a"] * 9}, "stop"),
        "bias no token": (good | {"logit_bias": {"a": 1}}, "logit_bias"),
        "bias of a token that is not there": (good | {"logit_bias": {"99999999": 1}}, "logit_bias"),
        "bias large": (good | {"logit_bias": {"1": 1e9}}, "logit_bias"),
        "stream a list": (good | {"stream": []}, "stream"),
        "own template": (good | {"chat_template": "{{ 1 }}"}, "chat_template"),
        "template in settings": (
            good | {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
            "chat_template",
        ),
        "template settings": (good | {"chat_template_kwargs": {"load_audio_from_video": True}}, "load_audio"),
        "frames": (good | {"chat_template_kwargs": {"num_frames": 10**9}}, "num_frames"),
        "frames negative": (good | {"chat_template_kwargs": {"num_frames": -1}}, "num_frames"),
        "more frames than there are": (
            of(video, text) | {"chat_template_kwargs": {"num_frames": 100}},
            "fewer than the 100",
        ),
        "own generation": (good | {"generation_config": '{"max_length": 1000000}'}, "generation_config"),
        "tools": (good | {"tools": [{"type": "function"}]}, "tools"),
        "tool calls": ({"messages": [{"role": "assistant", "content": "a", "tool_calls": [{}]}]}, "tool_calls"),
    }


def test_every_malformed_request_gets_a_reason_and_nothing_else(port, demo, expected, caplog):
    bodies = malformed((demo / "clip.mp4").read_bytes())
    assert len(bodies) > 40
    told = {}
    for name, (body, _) in bodies.items():
        for stream in (False, True):
            if stream and not isinstance(body, dict):
                continue
            asked = body | {"stream": True} if stream and "stream" not in body else body
            told[name, stream] = request(port, CHAT, asked)
    wrong = {}
    for (name, stream), (status, text, _) in told.items():
        message = json.loads(text).get("error", {}).get("message", "") if text.startswith("{") else text
        is_private = re.search(r"Traceback|\.py|site-packages|/tmp|/work|/home|\n", text)
        if not 400 <= status < 500 or bodies[name][1] not in message or is_private or len(text) > 700:
            wrong[name, stream] = status, text[:700]
    assert wrong == {}
    assert "Traceback" not in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    status, text, _ = request(port, CHAT, chat("clip.mp4"))
    assert json.loads(text)["choices"][0]["message"]["content"] == expected.text


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_no_other_endpoint_is_there(port, method):
    paths = [
        "/",
        "/docs",
        "/openapi.json",
        "/load_model",
        "/reset",
        "/v1/completions",
        "/v1/responses",
        "/v1/systemone",
    ]
    for path in [*paths, "/v1/audio/transcriptions", "/v1/files", CHAT]:
        asked = urllib.request.Request(f"http://127.0.0.1:{port}{path}", method=method)
        with pytest.raises(urllib.error.HTTPError) as raised:
            urllib.request.urlopen(asked, timeout=30)
        with raised.value as error:
            assert error.code in (404, 405)
            assert json.loads(error.read())["error"]["type"] == "invalid_request_error"


class _Counting(BaseHTTPRequestHandler):
    """Anything but a video, after a while."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.asked.append(self.path)
        time.sleep(self.server.delay)
        with contextlib.suppress(OSError):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"a secret of the inner net")


@pytest.fixture
def inner():
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Counting)
    server.asked, server.delay = [], 0.0
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_addresses_of_the_inner_net_and_files_outside_are_not_read(port, inner):
    number = inner.server_address[1]
    hosts = ["127.0.0.1", "localhost", "[::1]", "0", "2130706433"]
    urls = [f"http://{host}:{number}/x" for host in hosts]
    urls += ["/etc/passwd", "file:///etc/passwd", "../../etc/passwd", "ftp://127.0.0.1/x", "http://169.254.169.254/"]
    for url in urls:
        for part in ("video_url", "image_url"):
            body = chat(None, messages=[{"role": "user", "content": [{"type": part, part: {"url": url}}]}])
            status, text, _ = request(port, CHAT, body)
            assert re.search("not a public host|no host|outside the folder|pass an http", refusal(status, text)), text
    assert inner.asked == []


def test_what_an_allowed_host_sends_is_not_told_on(answerer, inner):
    with Served(answerer, domains=["127.0.0.1"]) as port:
        status, text, _ = request(port, CHAT, chat(f"http://127.0.0.1:{inner.server_address[1]}/x"))
    assert "can't be read as a video" in refusal(status, text)
    assert "secret" not in text
    assert inner.asked == ["/x"]


@pytest.mark.parametrize(
    ("limits", "status", "message"),
    [
        ({"max_body_bytes": 1000}, 413, "more than 1000 bytes"),
        ({"max_media_bytes": 1000}, 400, "1000 are allowed"),
        ({"max_pixels": 224 * 224 - 1}, 400, "has 50176 pixels in a frame, more than the 50175"),
        ({"max_video_frames": 63}, 400, "has 64 (samples|frames) by its header, more than the 63"),
        ({"max_memory": 16 * 224 * 224 * 3 - 1}, 400, "bytes in the frames asked for"),
        ({"max_decode_seconds": 0}, 400, "takes more than 0 s to decode"),
        ({"max_videos": 0}, 400, "has 1 videos and pictures, 0 are allowed"),
        ({"max_prompt_tokens": 800}, 400, "the prompt has 802 tokens, 800 are allowed"),
        ({"max_new_tokens": 7}, 400, "max_tokens is 8, 7 are allowed"),
        ({"max_frames": 3}, 400, "num_frames is 4, 3 are allowed"),
        ({"max_seconds": 0.001}, 408, "the request took more than 0 s"),
    ],
)
def test_each_limit_is_a_clear_4xx(answerer, demo, limits, status, message):
    options = {"chat_template_kwargs": {"num_frames": 4}} if "max_frames" in limits else {}
    with Served(answerer, demo, limits=ServingLimits(**limits)) as port:
        body = chat(data_url((demo / "clip.mp4").read_bytes()), **options)
        got, text, _ = request(port, CHAT, body)
        assert re.search(message, refusal(got, text))
        assert got == status
        # The server goes on. (Where a request has a millisecond, this one may need more, too.)
        assert any(request(port, "/health")[0] == 200 for _ in range(100))


def test_a_body_that_never_ends_is_given_up(answerer):
    with Served(answerer, limits=ServingLimits(max_seconds=1)) as port, socket.socket() as client:
        client.connect(("127.0.0.1", port))
        client.sendall(
            f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            "Content-Length: 1000\r\n\r\n{".encode()
        )
        client.settimeout(20)
        assert client.recv(100).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize(("method", "status"), [("GET", 200), ("PUT", 405)])
def test_what_other_methods_send_is_not_kept(answerer, method, status):
    with Served(answerer, limits=ServingLimits(max_body_bytes=1000)) as port, socket.socket() as client:
        client.connect(("127.0.0.1", port))
        # It is answered though the body never comes.
        client.sendall(
            f"{method} /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100000000\r\n\r\n{{".encode()
        )
        client.settimeout(20)
        assert client.recv(100).startswith(f"HTTP/1.1 {status}".encode())


def without_end(answerer, num_tokens: int) -> dict:
    """A request whose answer is as long as it may be."""
    ends = answerer.model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return chat("clip.mp4", max_tokens=num_tokens, logit_bias={str(token): -100 for token in ends})


@contextlib.contextmanager
def counted_steps(answerer):
    steps = []
    hook = answerer.model.model.language_model.register_forward_pre_hook(lambda *_: steps.append(time.monotonic()))
    yield steps
    hook.remove()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_the_model(port, answerer, expected, stream):
    body = json.dumps(without_end(answerer, 2000) | {"stream": stream}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    with counted_steps(answerer) as steps:
        with socket.socket() as client:
            client.connect(("127.0.0.1", port))
            client.sendall(head.encode() + body)
            deadline = time.monotonic() + 60
            while len(steps) < 5:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        status, text, _ = request(port, CHAT, chat("clip.mp4"))
        assert status == 200
        assert json.loads(text)["choices"][0]["message"]["content"] == expected.text
        assert len(steps) < 1000
    # Only the request that asks is left.
    assert metrics(port)["holitom_requests_in_progress"] == 1


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long_ends_with_a_word(answerer, demo, stream):
    with Served(answerer, demo, limits=ServingLimits(max_seconds=3)) as port:
        with counted_steps(answerer) as steps:
            status, text, _ = request(port, CHAT, without_end(answerer, 2000) | {"stream": stream})
        assert len(steps) < 2000
        assert "took more than 3 s" in text
        assert status == (200 if stream else 408)


def test_a_full_queue_says_so(answerer, demo):
    with Served(answerer, demo, limits=ServingLimits(max_queue=2)) as port, ThreadPoolExecutor(2) as clients:
        with counted_steps(answerer) as steps:
            long = [clients.submit(request, port, CHAT, without_end(answerer, 200)) for _ in range(2)]
            deadline = time.monotonic() + 60
            while metrics(port)["holitom_requests_in_progress"] < 3 or len(steps) < 1:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            status, text, headers = request(port, CHAT, chat("clip.mp4"))
        assert "2 requests are being served" in refusal(status, text)
        assert status == 429
        assert headers["retry-after"] == "5"
        assert [future.result()[0] for future in long] == [200, 200]
        assert request(port, CHAT, chat("clip.mp4"))[0] == 200


def test_a_slow_download_or_preparation_holds_nobody_up(answerer, demo, inner, monkeypatch):
    inner.delay = 3.0
    started, threads = threading.Event(), []
    plain = preparing.read_video

    def slow(*args):
        threads.append(threading.current_thread().name)
        started.set()
        time.sleep(3)
        return plain(*args)

    monkeypatch.setattr(preparing, "read_video", slow)
    limits = ServingLimits()
    with (
        Served(answerer, demo, domains=["127.0.0.1"], limits=limits) as port,
        ThreadPoolExecutor(2) as clients,
    ):
        slow_ones = [
            clients.submit(request, port, CHAT, chat(f"http://127.0.0.1:{inner.server_address[1]}/x")),
            clients.submit(request, port, CHAT, chat("clip.mp4")),
        ]
        assert started.wait(60)
        start = time.monotonic()
        assert request(port, "/health")[0] == 200
        assert request(port, "/v1/models")[0] == 200
        assert time.monotonic() - start < 2
        assert not any(future.done() for future in slow_ones)
        assert sorted(future.result()[0] for future in slow_ones) == [200, 400]
    assert all(name.startswith("prepare") for name in threads)


def test_slow_downloads_do_not_keep_the_model_from_others(answerer, demo, expected, inner):
    inner.delay = 8.0
    url = f"http://127.0.0.1:{inner.server_address[1]}/x"
    video = data_url((demo / "clip.mp4").read_bytes())
    with Served(answerer, domains=["127.0.0.1"]) as port, ThreadPoolExecutor(20) as clients:
        slow_ones = [clients.submit(request, port, CHAT, chat(url)) for _ in range(20)]
        deadline = time.monotonic() + 30
        while len(inner.asked) < 20:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        status, text, _ = request(port, CHAT, chat(video))
        assert status == 200
        assert json.loads(text)["choices"][0]["message"]["content"] == expected.text
        assert not any(future.done() for future in slow_ones)
        assert {future.result()[0] for future in slow_ones} == {400}


# ---- who may ask ----


def test_a_key_is_asked_for_where_one_is_set(answerer, demo):
    with Served(answerer, demo, api_key="a long key") as port:
        for headers in ({}, {"Authorization": "Bearer a long ke"}, {"Authorization": "Basic a long key"}):
            for path, body in (("/v1/models", None), ("/metrics", None), (CHAT, chat("clip.mp4"))):
                status, text, replied = request(port, path, body, headers)
                assert status == 401
                assert refusal(status, text) == "pass the server's API key"
                assert replied["www-authenticate"] == "Bearer"
        assert request(port, "/health")[0] == 200
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="a long key", max_retries=0)
        assert [model.id for model in client.models.list()] == ["bundled"]


def test_another_sites_page_can_not_ask(answerer):
    with Served(answerer, hosts=["videos.example"]) as port:
        for host, status in (
            ("evil.example", 400),
            ("videos.example.evil", 400),
            ("", 400),
            ("localhost.evil:80", 400),
            ("127.0.0.1.evil", 400),
            ("videos.example", 200),
            ("Videos.Example:8000", 200),
            ("localhost", 200),
            (f"127.0.0.1:{port}", 200),
            ("[::1]:8000", 200),
        ):
            assert request(port, "/v1/models", headers={"Host": host})[0] == status, host
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
            status, text, _ = request(port, CHAT, chat(None), {"Content-Type": kind})
            assert status == 415
            assert "application/json" in refusal(status, text)


@pytest.mark.parametrize(
    ("host", "key", "is_warned"),
    [("127.0.0.1", None, False), ("::1", None, False), ("0.0.0.0", "key", False), ("0.0.0.0", None, True)],
)
def test_a_server_that_everyone_reaches_says_so(answerer, monkeypatch, caplog, host, key, is_warned):
    monkeypatch.setattr(uvicorn.Server, "run", lambda self: None)
    monkeypatch.setattr(uvicorn.Config, "configure_logging", lambda self: None)
    run_server(answerer, "bundled", host, 8000, api_key=key)
    assert ("Whoever reaches 0.0.0.0 port 8000 may use this server: pass --api-key" in caplog.text) == is_warned


# ---- what is told ----


def test_metrics_count_requests_seconds_and_tokens(answerer, demo, expected):
    with Served(answerer, demo) as port:
        for stream in (False, True):
            assert request(port, CHAT, chat("clip.mp4", stream=stream))[0] == 200
        request(port, CHAT, chat("none.mp4"))
        request(port, "/nothing/here")
        counted = metrics(port)
        kind = request(port, "/metrics")[2]["content-type"]
    assert kind.startswith("text/plain; version=")
    assert counted[f'holitom_requests_total{{path="{CHAT}",status="200"}}'] == 2
    assert counted[f'holitom_requests_total{{path="{CHAT}",status="400"}}'] == 1
    assert counted['holitom_requests_total{path="other",status="404"}'] == 1
    for point in ("before", "outer", "inner"):
        tokens = getattr(expected, f"visual_tokens_{point}")
        assert counted[f'holitom_visual_tokens_total{{point="{point}"}}'] == 2 * tokens
    assert counted['holitom_tokens_total{of="prompt"}'] == 2 * expected.prompt_length
    assert counted['holitom_tokens_total{of="answer"}'] == 2 * expected.num_answer_tokens
    for stage in ("fetch", "decode", "prepare", "queue", "encode", "first_token", "answer"):
        assert counted[f'holitom_stage_seconds_count{{stage="{stage}"}}'] == 2
        assert 0 <= counted[f'holitom_stage_seconds_sum{{stage="{stage}"}}'] < 120


def test_a_request_is_known_by_its_id_in_answer_and_log(port, caplog, expected):
    with caplog.at_level(logging.INFO, logger="holitom_hf.apps.serving"):
        status, text, headers = request(port, CHAT, chat("clip.mp4"), {"X-Request-Id": "mine-1.2"})
        forged = request(port, "/health", headers={"X-Request-Id": "a b\tforged"})[2]
    assert status == 200
    assert headers["x-request-id"] == json.loads(text)["id"] == "mine-1.2"
    assert re.fullmatch("[0-9a-f]{32}", forged["x-request-id"])
    [line] = [record.getMessage() for record in caplog.records if "mine-1.2" in record.getMessage()]
    assert re.match(rf"mine-1\.2 POST {CHAT} 200 \d+\.\d+ s; seconds: fetch .* decode .* answer ", line)
    assert f"before {expected.visual_tokens_before} outer {expected.visual_tokens_outer}" in line
    assert "forged" not in caplog.text


def test_what_fails_in_the_server_is_logged_and_not_told(answerer, demo, monkeypatch, caplog):
    def failing(**kwargs):
        raise RuntimeError("/a/path/of/the/server")

    with Served(answerer, demo) as port:
        monkeypatch.setattr(answerer.model, "generate", failing)
        status, text, headers = request(port, CHAT, chat("clip.mp4"))
        streamed = request(port, CHAT, chat("clip.mp4", stream=True))[1]
        monkeypatch.undo()
        assert status == 500
        assert headers["x-request-id"] in json.loads(text)["error"]["message"]
        assert "/a/path" not in text + streamed
        assert "the server failed on this request" in streamed
        assert "/a/path/of/the/server" in caplog.text
        assert request(port, CHAT, chat("clip.mp4"))[0] == 200


# ---- the command ----


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


def test_the_command_starts_it_with_its_limits_and_logs_each_request(demo, expected):
    port = free_port()
    command = [sys.executable, "-m", "holitom_hf", "serve", "--port", str(port), "--device", "cpu"]
    command += ["--allowed-local-media-path", str(demo), "--api-key", "key", "--max-videos", "1"]
    process = start(command, port)
    try:
        key = {"Authorization": "Bearer key"}
        status, text, headers = request(port, CHAT, chat("clip.mp4"), key)
        two = chat("clip.mp4")["messages"] * 2
        refused = request(port, CHAT, chat(None, messages=two), key)
    finally:
        process.terminate()
        log, _ = process.communicate()
    assert json.loads(text)["choices"][0]["message"]["content"] == expected.text
    assert "has 2 videos and pictures, 1 are allowed" in refusal(*refused[:2])
    assert f"{headers['x-request-id']} POST {CHAT} {status}" in log
    assert "Traceback" not in log


def test_a_folder_that_is_not_there_is_one_line(tmp_path):
    command = [sys.executable, "-m", "holitom_hf", "serve", "--allowed-local-media-path", str(tmp_path / "none")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert re.fullmatch(r"error: the path of allowed media '.*none' is no folder\n", result.stderr)


@pytest.mark.slow
def test_upstreams_command_still_does_not_know_our_class(demo, tmp_path):
    """If this fails, `transformers serve` can serve our checkpoints on its own."""
    folder = tmp_path / "model"
    convert = [sys.executable, "-m", "holitom_hf", "convert", str(BUNDLED_MODEL), str(folder)]
    subprocess.run(convert, check=True, capture_output=True)
    port = free_port()
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--trust-remote-code"]
    process = start([*command, "--device", "cpu", "--port", str(port)], port)
    try:
        status, _, _ = request(port, CHAT, chat(str(demo / "clip.mp4"), model=str(folder)))
        assert status == 500
    finally:
        process.terminate()
        log, _ = process.communicate()
    assert re.search("Unknown modality for: HoliTomLlavaOnevisionForConditionalGeneration", log)
