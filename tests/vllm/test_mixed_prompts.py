"""Several videos, and images beside them, in prompts of the small Qwen3-VL, against our transformers class."""

import pytest

from .questions import RATIOS, SMALL_QWEN, metadata_of, mixed_prompts


vllm = pytest.importorskip("vllm")
# Of log-probabilities in float32, which other kernels sum in another order.
CLOSE = {"atol": 1e-4, "rtol": 0}


def watch(model):
    """From now on, notes what positions the decoder's first layer gets."""
    model.seen = []
    layer = model.language_model.model.layers[0]
    layer.register_forward_pre_hook(lambda layer, args: model.seen.append(args[0].clone()))


def seen(model):
    """(3, N) of all steps since this was asked last."""
    import torch

    positions = torch.cat([torch.zeros(3, 0, dtype=torch.long), *model.seen], 1)
    model.seen.clear()
    return positions


@pytest.fixture(scope="module")
def engine():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # functions are sent to the process with the model
        engine = vllm.LLM(
            model=str(SMALL_QWEN),
            dtype="float32",
            enforce_eager=True,
            max_model_len=4096,
            max_num_batched_tokens=256,  # so that prompts come in chunks, which end inside of videos
            max_logprobs=-1,
            gpu_memory_utilization=0.1,
            limit_mm_per_prompt={"video": 2, "image": 2},
        )
        engine.apply_model(watch)
        yield engine
        engine.llm_engine.engine_core.shutdown()


GREEDY = vllm.SamplingParams(temperature=0, max_tokens=8, logprobs=-1)


def requests(ratio):
    for prompt in mixed_prompts():
        videos = [(frames, metadata_of(frames) | {"do_sample_frames": False}) for frames in prompt.videos]
        yield {
            "prompt": prompt.text,
            "multi_modal_data": {"video": videos} | ({"image": prompt.images} if prompt.images else {}),
            "mm_processor_kwargs": {"retention_ratio": ratio},
        }


def test_answers_of_mixed_rates_and_the_first_log_probabilities_are_those_of_our_transformers_class(
    engine, transformers_answers
):
    import torch

    expected = [answer for ratio in RATIOS for answer in transformers_answers["qwen3_vl_mixed"][str(ratio)]]
    found = engine.generate([request for ratio in RATIOS for request in requests(ratio)], GREEDY, use_tqdm=False)
    assert [list(output.outputs[0].token_ids) for output in found] == [answer["ids"] for answer in expected]
    for output, answer in zip(found, expected):
        first = output.outputs[0].logprobs[0]
        logprobs = torch.tensor([first[token].logprob for token in range(len(answer["logprobs"]))])
        torch.testing.assert_close(logprobs, torch.tensor(answer["logprobs"]), **CLOSE)


@pytest.mark.parametrize("ratio", RATIOS)
def test_the_decoder_gets_the_positions_of_our_transformers_class(engine, transformers_answers, ratio):
    engine.apply_model(seen)
    for request, expected in zip(requests(ratio), transformers_answers["qwen3_vl_mixed"][str(ratio)]):
        engine.reset_prefix_cache()
        engine.generate(request, GREEDY, use_tqdm=False)
        (found,) = engine.apply_model(seen)
        assert found.tolist() == expected["positions"]
