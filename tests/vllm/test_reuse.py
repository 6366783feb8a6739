"""Patches that repeat are computed once in vLLM's tower, too: its tokens against our transformers class."""

from functools import partial

import pytest

from holitom_hf.bundled import BUNDLED_MODEL

from .questions import REUSE, drawn_pixels


vllm = pytest.importorskip("vllm")


@pytest.fixture(scope="module")
def engine():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # a function is sent to the process with the model
        engine = vllm.LLM(
            model=str(BUNDLED_MODEL),
            dtype="float32",
            enforce_eager=True,
            max_model_len=2048,
            gpu_memory_utilization=0.1,
            hf_overrides={"holitom_config": REUSE},
        )
        yield engine
        engine.llm_engine.engine_core.shutdown()


def encode(model, videos, frames_at_once):
    """What the model returns for videos of pixels, and how many rows its last layer had."""
    import torch

    rows = []
    mlp = model.vision_tower.vision_model.encoder.layers[-1].mlp
    hook = mlp.register_forward_hook(lambda module, args, output: rows.append(output.shape[:-1].numel()))
    whole, model.frames_at_once = model.frames_at_once, frames_at_once or model.frames_at_once
    try:
        with torch.inference_mode():
            ratios = torch.full((len(videos),), model.settings.retention_ratio, dtype=torch.float64)
            embeddings = model.embed_multimodal(pixel_values_videos=videos, retention_ratio=ratios)
        return [tokens.tolist() for tokens in embeddings], sum(rows)
    finally:
        model.frames_at_once = whole
        hook.remove()


@pytest.mark.parametrize("frames_at_once", [None, 5])
def test_tokens_are_those_of_our_transformers_class(engine, transformers_answers, frames_at_once):
    import torch

    expected = transformers_answers["reuse"]
    videos = [torch.from_numpy(pixels) for pixels in drawn_pixels()]
    (found, num_rows), *_ = engine.apply_model(partial(encode, videos=videos, frames_at_once=frames_at_once))
    assert len(found) == len(expected) == 2
    for tokens, video in zip(found, expected):
        torch.testing.assert_close(torch.tensor(tokens), torch.tensor(video["tokens"]), rtol=1e-4, atol=1e-4)
    num_computed = sum(video["num_computed"] for video in expected)
    num_patches = sum(len(video) for video in videos) * 196
    assert num_computed < num_patches / 2
    assert num_computed <= num_rows < num_patches  # in pieces, a segment's first frame is computed once more
    assert frames_at_once or num_rows == num_computed
