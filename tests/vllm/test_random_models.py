"""Qwen families without a trained model here: small ones with random weights, against our transformers classes."""

from functools import partial
from statistics import mean
from types import SimpleNamespace

import pytest

from holitom_hf.merging.budget import token_budget

from .questions import (
    QWEN_PROMPT,
    RANDOM_MODELS,
    RANDOM_RATIOS,
    drawn_questions,
    metadata_of,
    questions_about_clips,
)


vllm = pytest.importorskip("vllm")
TOKENS_PER_FRAME = 49
NUM_FRAMES = 8  # temporal patches
# Of logarithms of probabilities, mean difference of vLLM from float32; and how many of 60 answers may be others. In
# bfloat16 rounding decides between close tokens, and experts. With positions that are wrong, or another rate, 0.18 or
# more and 24 or more were seen.
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.1}
MOST_OTHERS = {"float32": 0, "bfloat16": 10}


@pytest.fixture(scope="module", params=RANDOM_MODELS)
def served(request, transformers_models, transformers_answers):
    """A model in vLLM, what it computes in, and what transformers had of it."""
    from vllm.distributed import cleanup_dist_env_and_memory

    name = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # in one process engines start sooner
        engine = vllm.LLM(
            model=str(transformers_models / name),
            dtype=RANDOM_MODELS[name],
            enforce_eager=True,
            max_model_len=2048,
            max_num_batched_tokens=512,
            gpu_memory_utilization=0.1,
            mm_processor_cache_gb=0,  # so that pixels are there to look at
            # vLLM looks for states in hybrid models, of which those without linear attention have none.
            enable_prefix_caching=not name.endswith("_attention"),
        )
        yield SimpleNamespace(engine=engine, dtype=RANDOM_MODELS[name], **transformers_answers["random_models"][name])
        engine.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


def request_of(frames, question, ratio):
    return {
        "prompt": QWEN_PROMPT.format(question=question),
        "multi_modal_data": {"video": [(frames, metadata_of(frames) | {"do_sample_frames": False})]},
        "mm_processor_kwargs": {"retention_ratio": ratio},
    }


def test_answers_of_mixed_rates_are_those_of_our_transformers_class(served):
    number = len(served.answers["1.0"])
    asked = [
        (index, ratio, request_of(frames, question, ratio))
        for index, (frames, question, _) in enumerate(questions_about_clips(number))
        for ratio in RANDOM_RATIOS
    ]
    outputs = served.engine.generate(
        [request for _, _, request in asked], vllm.SamplingParams(temperature=0, max_tokens=8, logprobs=20)
    )
    num_others, apart = 0, {ratio: [] for ratio in RANDOM_RATIOS}
    for (index, ratio, _), output in zip(asked, outputs):
        (answer,), expected = output.outputs, served.answers[str(ratio)][index]
        num_others += list(answer.token_ids) != expected["ids"]
        found = {str(token): logprob.logprob for token, logprob in answer.logprobs[0].items()}
        apart[ratio] += [abs(found[token] - value) for token, value in expected["first_logprobs"].items()]
    assert all(mean(values) < TOLERANCE[served.dtype] for values in apart.values())
    assert num_others <= MOST_OTHERS[served.dtype]
    # What is compared depends on the video and on the rate.
    assert len({tuple(answer["ids"]) for answers in served.answers.values() for answer in answers}) > number / 2


def encode(model, pixels, ratio):
    """What the model returns for one video of flat patches, and which of it is the video's."""
    import torch

    with torch.inference_mode():
        (embeddings,) = model.embed_multimodal(
            pixel_values_videos=pixels,
            video_grid_thw=torch.tensor([[NUM_FRAMES, 14, 14]]),
            timestamps=[[i + 0.25 for i in range(NUM_FRAMES)]],
            retention_ratio=torch.tensor([ratio], dtype=torch.float64),
        )
        words = model.get_language_model().embed_input_ids(torch.arange(model.config.text_config.vocab_size))
    is_text = (embeddings[:, None, : words.shape[1]] == words).all(-1).any(1)
    return embeddings, ~is_text


@pytest.mark.parametrize("ratio", RANDOM_RATIOS)
def test_the_encoder_returns_the_tokens_and_places_of_our_transformers_class(served, ratio):
    import torch

    from holitom_hf import HoliTomConfig
    from holitom_hf.vllm.kept_positions import NUM_CHANNELS, from_channels

    if served.dtype != "float32":
        pytest.skip("what is left of a video follows from comparisons that rounding decides")
    budget = token_budget(HoliTomConfig(retention_ratio=ratio, exact_budget=True), NUM_FRAMES, TOKENS_PER_FRAME)
    expected_videos = served.encoder[str(ratio)]
    for expected, (frames, question, _) in zip(expected_videos, drawn_questions(len(expected_videos))):
        (rendered,) = served.engine.llm_engine.renderer.render_cmpl([request_of(frames, question, ratio)])
        pixels = rendered["mm_kwargs"]["video"][0]["pixel_values_videos"].data
        ((found, is_video),) = served.engine.apply_model(partial(encode, pixels=pixels, ratio=ratio))
        positions = from_channels(found[:, -NUM_CHANNELS:])
        assert is_video.sum() == len(expected["places"]) == budget
        # A frame's tokens have one time; rows and columns are counted from it.
        rows, columns = (positions[is_video, axis] - positions[is_video, 0] for axis in (1, 2))
        places = torch.tensor(expected["places"]) % TOKENS_PER_FRAME
        assert torch.equal(rows, places // 7)
        assert torch.equal(columns, places % 7)
        tokens = torch.tensor(expected["tokens"])
        torch.testing.assert_close(found[is_video, : tokens.shape[1]], tokens, atol=1e-4, rtol=1e-4)
