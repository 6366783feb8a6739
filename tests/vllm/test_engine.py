"""The bundled model in vLLM's offline engine, against our transformers class."""

import pytest

from holitom_hf import HoliTomConfig
from holitom_hf.bundled import BUNDLED_MODEL
from holitom_hf.merging.budget import token_budget

from .questions import drawn_questions, prompt_of


vllm = pytest.importorskip("vllm")
TOKENS_PER_FRAME = 49
# Of 32-bit logits: two tokens closer than this may change places when sums are taken in another order.
CLOSE = 1e-3


@pytest.fixture(scope="module")
def engine():
    engine = vllm.LLM(
        model=str(BUNDLED_MODEL),
        dtype="float32",
        enforce_eager=True,
        max_model_len=4096,
        gpu_memory_utilization=0.1,
        limit_mm_per_prompt={"video": 3, "image": 2},
    )
    yield engine
    engine.llm_engine.engine_core.shutdown()


GREEDY = vllm.SamplingParams(temperature=0, max_tokens=8)


def request_of(frames, question, **mm_processor_kwargs):
    return {
        "prompt": prompt_of(question),
        "multi_modal_data": {"video": frames},
        "mm_processor_kwargs": mm_processor_kwargs,
    }


@pytest.mark.parametrize("ratio", [1.0, 0.15, 0.05])
def test_answers_are_those_of_our_transformers_class(engine, transformers_answers, ratio):
    expected = transformers_answers["llava_onevision"][str(ratio)]
    requests = [
        request_of(frames, question, retention_ratio=ratio) for frames, question, _ in drawn_questions(len(expected))
    ]
    found = engine.generate(requests, GREEDY)
    differing = []
    for number, (output, answer) in enumerate(zip(found, expected)):
        ids = list(output.outputs[0].token_ids)
        if ids != answer["ids"]:
            step = next(i for i, (a, b) in enumerate(zip(ids, answer["ids"])) if a != b)
            differing.append((number, step, answer["margins"][step], ids, answer["ids"]))
    print(f"ratio {ratio}: {len(differing)} of {len(expected)} differ", differing)
    assert all(margin < CLOSE for _, _, margin, _, _ in differing), differing


def test_each_request_has_the_rate_it_asks_for(engine):
    frames, question, _ = next(drawn_questions(1))
    ratios = [0.1, 0.15, 0.3, None, 1.0]
    requests = [request_of(frames, question, **({"retention_ratio": ratio} if ratio else {})) for ratio in ratios]
    found = [len(output.prompt_token_ids) for output in engine.generate(requests, GREEDY)]
    text = len(engine.get_tokenizer().encode(prompt_of(question))) - 1
    frames_and_tokens = (len(frames), TOKENS_PER_FRAME)
    settings = [HoliTomConfig(retention_ratio=ratio or 0.15, exact_budget=True) for ratio in ratios]
    assert found == [text + token_budget(each, *frames_and_tokens) + 1 for each in settings]
    again = [len(output.prompt_token_ids) for output in engine.generate(requests[::-1], GREEDY)]
    assert again == found[::-1]  # from caches that tell the rates apart


@pytest.mark.parametrize("ratio", [0, 1.5, "much"])
def test_a_rate_that_is_none_is_an_error_of_its_request(engine, ratio):
    frames, question, _ = next(drawn_questions(1))
    with pytest.raises((ValueError, TypeError), match="retention_ratio"):
        engine.generate([request_of(frames, question, retention_ratio=ratio)], GREEDY)
    assert engine.generate([request_of(frames, question)], GREEDY)[0].outputs[0].text


def answers(engine, requests):
    return [output.outputs[0].text for output in engine.generate(requests, GREEDY, use_tqdm=False)]


def test_requests_together_are_answered_as_alone(engine):
    requests = [request_of(frames, question) for frames, question, _ in drawn_questions(12)]
    engine.reset_mm_cache()
    engine.reset_prefix_cache()
    alone = [answers(engine, [request])[0] for request in requests]
    engine.reset_mm_cache()
    engine.reset_prefix_cache()
    assert answers(engine, requests) == alone
    assert answers(engine, requests) == alone  # from the caches


def test_several_videos_and_images_share_a_prompt(engine):
    (first, question, _), (second, _, _) = list(drawn_questions(8))[::7]
    image = first[0]
    both = {
        "prompt": prompt_of(question, num_videos=2).replace("<video>", "<image><video>", 1),
        "multi_modal_data": {"video": [first, second[:7]], "image": image},
    }
    (output,) = engine.generate([both], GREEDY)
    video = engine.get_tokenizer().convert_tokens_to_ids("<video>")
    expected = [
        token_budget(HoliTomConfig(exact_budget=True), frames, TOKENS_PER_FRAME) + 1 for frames in (len(first), 7)
    ]
    assert list(output.prompt_token_ids).count(video) == sum(expected)
    assert output.outputs[0].text
