"""The small Qwen3-VL in vLLM: its answers, and what its encoder hands on, against our transformers class."""

from functools import partial

import pytest

from holitom_hf.merging.budget import token_budget

from .questions import QWEN_PROMPT, QWEN_RATIOS, RATIOS, SMALL_QWEN, drawn_questions, metadata_of


vllm = pytest.importorskip("vllm")
TOKENS_PER_FRAME = 49
NUM_FRAMES = 8  # temporal patches


@pytest.fixture(scope="module")
def engine():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # a function is sent to the process with the model
        engine = vllm.LLM(
            model=str(SMALL_QWEN),
            dtype="float32",
            enforce_eager=True,
            max_model_len=4096,
            gpu_memory_utilization=0.1,
            mm_processor_cache_gb=0,  # so that pixels are there to look at
        )
        yield engine
        engine.llm_engine.engine_core.shutdown()


def request_of(frames, question, ratio):
    return {
        "prompt": QWEN_PROMPT.format(question=question),
        "multi_modal_data": {"video": [(frames, metadata_of(frames) | {"do_sample_frames": False})]},
        "mm_processor_kwargs": {"retention_ratio": ratio},
    }


def encode(model, pixels, ratio):
    """What the model returns for one video of flat patches."""
    import torch

    with torch.inference_mode():
        (embeddings,) = model.embed_multimodal(
            pixel_values_videos=pixels,
            video_grid_thw=torch.tensor([[8, 14, 14]]),
            timestamps=[[i + 0.25 for i in range(8)]],
            retention_ratio=torch.tensor([ratio], dtype=torch.float64),
        )
    return embeddings


@pytest.mark.parametrize("ratio", QWEN_RATIOS)
def test_the_encoder_returns_the_tokens_and_places_of_our_transformers_class(engine, transformers_answers, ratio):
    import torch

    from holitom_hf.vllm.kept_positions import NUM_CHANNELS, from_channels

    expected_videos = transformers_answers["qwen3_vl_encoder"][str(ratio)]
    for expected, (frames, question, _) in zip(expected_videos, drawn_questions(len(expected_videos))):
        (rendered,) = engine.llm_engine.renderer.render_cmpl([request_of(frames, question, ratio)])
        pixels = rendered["mm_kwargs"]["video"][0]["pixel_values_videos"].data
        (found,) = engine.apply_model(partial(encode, pixels=pixels, ratio=ratio))
        # DeepStack adds nothing to text between frames.
        positions, is_video = from_channels(found[:, -NUM_CHANNELS:]), found[:, 128:256].any(1)
        assert is_video.sum() == len(expected["places"])
        # A frame's tokens have one time; rows and columns are counted from it.
        rows, columns = (positions[is_video, axis] - positions[is_video, 0] for axis in (1, 2))
        places = torch.tensor(expected["places"]) % TOKENS_PER_FRAME
        assert torch.equal(rows, places // 7)
        assert torch.equal(columns, places % 7)
        tokens = torch.tensor(expected["tokens"])
        torch.testing.assert_close(found[is_video, : tokens.shape[1]].cpu(), tokens, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("ratio", QWEN_RATIOS)
def test_a_prompt_has_as_many_placeholders_as_the_budget_says(engine, ratio):
    from holitom_hf import HoliTomConfig

    frames, question, _ = next(drawn_questions(1))
    prompt = engine.llm_engine.renderer.render_cmpl([request_of(frames, question, ratio)])[0]["prompt_token_ids"]
    video = engine.get_tokenizer().convert_tokens_to_ids("<|video_pad|>")
    settings = HoliTomConfig(retention_ratio=ratio, exact_budget=True)
    assert list(prompt).count(video) == token_budget(settings, NUM_FRAMES, TOKENS_PER_FRAME)


@pytest.mark.parametrize("ratio", RATIOS)
def test_answers_are_those_of_our_transformers_class(engine, transformers_answers, ratio):
    expected = transformers_answers["qwen3_vl"][str(ratio)]
    requests = [request_of(frames, question, ratio) for frames, question, _ in drawn_questions(len(expected))]
    found = engine.generate(requests, vllm.SamplingParams(temperature=0, max_tokens=8))
    assert [list(output.outputs[0].token_ids) for output in found] == [answer["ids"] for answer in expected]
