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
    expected = transformers_answers[str(ratio)]
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
