"""The small Qwen3-VL behind vLLM's HTTP server."""

import base64
import json
import urllib.error
from concurrent.futures import ThreadPoolExecutor

import pytest

from holitom_hf import HoliTomConfig, HoliTomQwen3VLProcessor
from holitom_hf.merging.budget import token_budget

from .questions import QWEN_PROMPT, SMALL_QWEN
from .serving import answer, chat, data_url, drawn_files, served, streamed, text_tokens


pytest.importorskip("vllm")
NUM_REQUESTS = 30
# Two frames a second of four seconds, which are 4 temporal patches.
NUM_FRAMES, TOKENS_PER_FRAME = 4, 49


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Of different videos the file, and what is asked about it."""
    return drawn_files(tmp_path_factory.mktemp("set"), NUM_REQUESTS)


@pytest.fixture(scope="module")
def server(tmp_path_factory, files):
    limits = ["--limit-mm-per-prompt", '{"video": 2, "image": 1}']
    limits += ["--allowed-local-media-path", str(files[0][0].parent)]
    with served(SMALL_QWEN, tmp_path_factory.mktemp("server"), *limits) as address:
        yield address


def budget(ratio: float) -> int:
    return token_budget(HoliTomConfig(retention_ratio=ratio, exact_budget=True), NUM_FRAMES, TOKENS_PER_FRAME)


def tokens_around(file, text: str) -> int:
    """Tokens of a prompt about a video that are not its own, times among them, as our processor makes it."""
    processor = HoliTomQwen3VLProcessor.from_pretrained(SMALL_QWEN)
    inputs = processor(text=QWEN_PROMPT.format(question=text), videos=str(file), fps=2)
    return sum(token != processor.video_token_id for token in inputs["input_ids"][0])


def test_videos_at_once_are_answered_as_alone(server, files):
    bodies = [chat(data_url(file), text=text) for file, text in files]
    with ThreadPoolExecutor(NUM_REQUESTS) as pool:
        together = list(pool.map(lambda body: answer(server, body), bodies))
    # Another identity, so that nothing of theirs is taken from a cache.
    alone = [answer(server, body | {"mm_processor_kwargs": {"retention_ratio": 0.15}}) for body in bodies]
    assert together == alone
    assert len({text for text, _ in together}) > 5
    assert together[0][1] == tokens_around(*files[0]) + budget(0.15)


def test_answers_are_those_of_our_transformers_class(server, transformers_batch):
    records = map(json.loads, (transformers_batch / "qwen3_vl.jsonl").read_text().splitlines())
    records = [record for record in records if "answer" in record]
    kwargs = {"max_pixels": 60000, "retention_ratio": 0.15}
    bodies = [
        chat(data_url(transformers_batch / record["video"]), text=record["question"], mm_processor_kwargs=kwargs)
        for record in records
    ]
    with ThreadPoolExecutor(len(bodies)) as pool:
        found = [text for text, _ in pool.map(lambda body: answer(server, body), bodies)]
    assert found == [record["answer"] for record in records]


def test_each_request_may_ask_for_a_rate_and_files_are_read(server, files):
    file, text = files[0]
    ratios = [0.05, 0.3, 1.0]
    urls = [data_url(file), file.as_uri(), data_url(file)]
    bodies = [chat(url, text=text, mm_processor_kwargs={"retention_ratio": ratio}) for url, ratio in zip(urls, ratios)]
    with ThreadPoolExecutor(3) as pool:
        found = [count for _, count in pool.map(lambda body: answer(server, body), bodies)]
    assert found == [tokens_around(file, text) + budget(ratio) for ratio in ratios]


@pytest.mark.parametrize(
    "fields",
    [
        {"url": "data:video/mp4;base64," + base64.b64encode(b"no video").decode()},
        {"mm_processor_kwargs": {"retention_ratio": 7}},
        {"mm_processor_kwargs": {"retention_ratio": "much"}},
    ],
)
def test_a_bad_request_is_a_400_for_it_alone(server, files, fields):
    file, text = files[1]
    fields = dict(fields)
    bad = chat(fields.pop("url", data_url(file)), text=text, **fields)
    with ThreadPoolExecutor(3) as pool:
        good = [pool.submit(answer, server, chat(data_url(file), text=text)) for _ in range(2)]
        with pytest.raises(urllib.error.HTTPError) as error:
            answer(server, bad)
        assert error.value.code == 400
        assert len({reply.result() for reply in good}) == 1


def test_streams_and_two_videos_in_a_prompt(server, files):
    (first, text), (second, _) = files[2:4]
    body = chat(data_url(first), data_url(second), text=text)
    whole, num_tokens = answer(server, body)
    around = [tokens_around(file, text) - text_tokens(server, text) for file in (first, second)]
    assert num_tokens == text_tokens(server, text) + sum(around) + 2 * budget(0.15)
    assert streamed(server, body) == whole
