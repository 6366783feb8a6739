"""Two processes that divide the heads of layers among them, on the CPU: answers, and importance over all heads."""

import os
from functools import partial

import pytest

from holitom_hf.bundled import BUNDLED_MODEL

from .questions import QWEN_PROMPT, RATIOS, SMALL_QWEN, drawn_pixels, drawn_questions, metadata_of, prompt_of


vllm = pytest.importorskip("vllm")
CORES = sorted(os.sched_getaffinity(0))[:2]
pytestmark = pytest.mark.skipif(len(CORES) < 2, reason="each process is bound to a core of its own")
NUM_QUESTIONS = 20


@pytest.fixture(scope="module", params=["llava_onevision", "qwen3_vl"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def engine(family):
    with pytest.MonkeyPatch.context() as patch:
        # By itself vLLM gives each process a memory node of its own.
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "|".join(map(str, CORES)))
        patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # a function is sent to the processes with the model
        engine = vllm.LLM(
            model=str(BUNDLED_MODEL if family == "llava_onevision" else SMALL_QWEN),
            tensor_parallel_size=2,
            dtype="float32",
            enforce_eager=True,
            max_model_len=4096,
            gpu_memory_utilization=0.1,
            mm_processor_cache_gb=0,  # so that pixels are there to look at
        )
        yield engine
        engine.llm_engine.engine_core.shutdown()


def request_of(family, frames, question, ratio):
    is_qwen = family == "qwen3_vl"
    return {
        "prompt": QWEN_PROMPT.format(question=question) if is_qwen else prompt_of(question),
        "multi_modal_data": {
            "video": [(frames, metadata_of(frames) | {"do_sample_frames": False}) if is_qwen else frames]
        },
        "mm_processor_kwargs": {"retention_ratio": ratio},
    }


@pytest.mark.parametrize("ratio", RATIOS)
def test_answers_are_those_of_our_transformers_class(engine, family, transformers_answers, ratio):
    expected = transformers_answers[family][str(ratio)][:NUM_QUESTIONS]
    asked = drawn_questions(len(expected))
    requests = [request_of(family, frames, question, ratio) for frames, question, _ in asked]
    found = engine.generate(requests, vllm.SamplingParams(temperature=0, max_tokens=8))
    assert [list(output.outputs[0].token_ids) for output in found] == [answer["ids"] for answer in expected]


def received(model, video):
    """How many heads of the tower this process has, and what each token receives of the attention of all."""
    import torch

    with torch.inference_mode():
        inputs = model._parse_and_validate_video_input(**video, retention_ratio=torch.tensor([0.15]))
        if hasattr(model, "visual"):
            (encoded,) = model._process_video_input(inputs)
            num_heads = model.visual.blocks[-1].attn.num_attention_heads_per_partition
        else:
            (encoded,) = model.encode_videos(list(inputs["pixel_values_videos"]))
            num_heads = model.vision_tower.vision_model.encoder.layers[-1].self_attn.num_heads_per_partition
        return num_heads, encoded.importance.tolist()


def test_importance_is_that_of_all_heads_in_each_process(engine, family, transformers_answers):
    import torch

    frames, question, _ = next(drawn_questions(1))
    if family == "qwen3_vl":
        (rendered,) = engine.llm_engine.renderer.render_cmpl([request_of(family, frames, question, 0.15)])
        pixels = rendered["mm_kwargs"]["video"][0]["pixel_values_videos"].data
        video = {"video_grid_thw": torch.tensor([[8, 14, 14]]), "timestamps": [[i + 0.25 for i in range(8)]]}
    else:
        pixels, video = torch.from_numpy(drawn_pixels()[0])[None], {}
    found = engine.apply_model(partial(received, video=video | {"pixel_values_videos": pixels}))
    expected = torch.tensor(transformers_answers["importance"][family])
    assert [num_heads for num_heads, _ in found] == [2, 2]
    for _, importance in found:
        torch.testing.assert_close(torch.tensor(importance), expected, rtol=1e-3, atol=1e-6)
