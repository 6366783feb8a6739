"""The bundled model behind vLLM's HTTP server."""

import base64
import urllib.error
from concurrent.futures import ThreadPoolExecutor

import pytest

from holitom_hf import HoliTomConfig
from holitom_hf.bundled import BUNDLED_MODEL
from holitom_hf.bundled.questions import NUM_FRAMES
from holitom_hf.merging.budget import token_budget

from .serving import answer, chat, data_url, drawn_files, served, streamed, text_tokens


pytest.importorskip("vllm")
NUM_REQUESTS = 50
TOKENS_PER_FRAME = 49


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    limits = ["--limit-mm-per-prompt", '{"video": 2}', "--media-io-kwargs", '{"video": {"num_frames": 16}}']
    with served(BUNDLED_MODEL, tmp_path_factory.mktemp("server"), *limits) as address:
        yield address


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Of different videos: each file as a URL, and what is asked about it."""
    files = drawn_files(tmp_path_factory.mktemp("set"), NUM_REQUESTS)
    return [(data_url(file), text) for file, text in files]


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
    assert streamed(server, body) == whole
