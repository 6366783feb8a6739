"""A small Qwen2.5-VL in vLLM: its answers, what its encoder hands on and where tokens stand, against our class."""

from functools import partial
from types import SimpleNamespace

import pytest

from .qwen2_5_vl import RATIOS, Request, drawn_requests, mixed_requests


vllm = pytest.importorskip("vllm")
MAX_TOKENS = 8


@pytest.fixture(scope="module")
def checkpoint(transformers_qwen2_5_vl):
    return str(transformers_qwen2_5_vl)


@pytest.fixture(scope="module")
def engine(checkpoint):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # a function is sent to the process with the model
        engine = vllm.LLM(
            model=checkpoint,
            dtype="float32",
            enforce_eager=True,
            max_model_len=4096,
            gpu_memory_utilization=0.1,
            mm_processor_cache_gb=0,  # so that pixels are there to look at
            max_logprobs=-1,
            # Fewer than a video has, so that prompts come in chunks, several of them in a step.
            max_num_batched_tokens=64,
            max_num_seqs=16,
        )
        yield engine
        engine.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module")
def requests(transformers_answers):
    mixed = mixed_requests()
    return drawn_requests(len(transformers_answers["qwen2_5_vl"]["answers"]["1.0"]) - len(mixed)) + mixed


def asked(request: Request, ratio: float) -> dict:
    """As vLLM takes it."""
    shown = {"video": [(frames, metadata) for (frames, _), metadata in zip(request.videos, request.metadata)]}
    if request.images:
        shown["image"] = request.images
    return {
        "prompt": request.prompt,
        "multi_modal_data": shown,
        "mm_processor_kwargs": {"retention_ratio": ratio},
    }


def encode(model, inputs, ratio, **changes):
    """What the model returns for one video, with settings laid over its own."""
    import torch

    own, model.settings = model.settings, model.settings.overlaid(changes)
    inputs = {name: values[None] if name != "pixel_values_videos" else values for name, values in inputs.items()}
    ratios = torch.tensor([ratio], dtype=torch.float64)
    with torch.inference_mode():
        (embeddings,) = model.embed_multimodal(**inputs | {"retention_ratio": ratios})
    model.settings = own
    return embeddings


@pytest.mark.parametrize("ratio", RATIOS)
def test_the_encoder_returns_the_tokens_and_places_of_our_transformers_class(
    engine, transformers_answers, requests, ratio
):
    import torch

    from holitom_hf.vllm.kept_positions import NUM_CHANNELS, from_channels

    answers = transformers_answers["qwen2_5_vl"]
    wide = len(requests) - len(mixed_requests())
    for index, expected in zip((0, wide), answers["encoder"][str(ratio)]):
        (rendered,) = engine.llm_engine.renderer.render_cmpl([asked(requests[index], ratio)])
        inputs = {name: field.data for name, field in rendered["mm_kwargs"]["video"][0].items()}
        (found,) = engine.apply_model(partial(encode, inputs=inputs, ratio=ratio))
        tokens = torch.tensor(expected)
        torch.testing.assert_close(found[:, :-NUM_CHANNELS].cpu(), tokens, atol=2e-4, rtol=2e-4)
        # The prompt's text, and the three positions that the video begins at.
        positions = torch.tensor(answers["answers"][str(ratio)][index]["positions"])
        begin = rendered["mm_placeholders"]["video"][0].offset
        offsets = positions[:, begin : begin + len(tokens)] - begin
        assert torch.equal(from_channels(found[:, -NUM_CHANNELS:]).cpu().T, offsets)


def test_a_request_has_its_rate_where_the_server_compresses_nothing(engine, requests):
    import torch

    (rendered,) = engine.llm_engine.renderer.render_cmpl([asked(requests[0], 0.25)])
    inputs = {name: field.data for name, field in rendered["mm_kwargs"]["video"][0].items()}
    encodings = (partial(encode, inputs=inputs, ratio=0.25, retention_ratio=of_server) for of_server in (0.25, 1.0))
    first, second = (engine.apply_model(encoding)[0] for encoding in encodings)
    assert torch.equal(first, second)


def watch(model):
    """Keeps where tokens stand in the decoder's first layer."""
    model.seen = []
    layer = model.language_model.model.layers[0]
    model.watching = layer.register_forward_pre_hook(
        lambda module, args, kwargs: model.seen.append((kwargs.get("positions", *args[:1])).clone()), with_kwargs=True
    )


def seen_positions(model):
    """(3, N) positions since [`watch`], and none from now on."""
    import torch

    model.watching.remove()
    return torch.cat(model.seen, dim=1).tolist()


@pytest.mark.parametrize("ratio", [1.0, 0.25])
@pytest.mark.parametrize("number", range(4))
def test_tokens_stand_where_they_stood_uncompressed(engine, transformers_answers, requests, number, ratio):
    index = len(requests) - len(mixed_requests()) + number
    expected = transformers_answers["qwen2_5_vl"]["answers"][str(ratio)][index]
    engine.reset_prefix_cache()
    engine.apply_model(watch)
    (output,) = engine.generate([asked(requests[index], ratio)], vllm.SamplingParams(temperature=0, max_tokens=3))
    (found,) = engine.apply_model(seen_positions)
    num_tokens, last = len(output.prompt_token_ids), expected["positions"][0][-1]
    assert [axis[:num_tokens] for axis in found] == expected["positions"]
    # Then an answer's tokens.
    assert [axis[num_tokens : num_tokens + 2] for axis in found] == [[last + 1, last + 2]] * 3


def test_answers_are_those_of_our_transformers_class_whatever_shares_a_step(engine, transformers_answers, requests):
    import torch

    answers = transformers_answers["qwen2_5_vl"]["answers"]
    pairs = [(index, ratio) for index in range(len(requests)) for ratio in RATIOS]
    engine.reset_prefix_cache()
    outputs = engine.generate(
        [asked(requests[index], ratio) for index, ratio in pairs],
        vllm.SamplingParams(temperature=0, max_tokens=MAX_TOKENS, logprobs=-1),
    )
    for (index, ratio), output in zip(pairs, outputs):
        expected = answers[str(ratio)][index]
        (found,) = output.outputs
        assert len(output.prompt_token_ids) == len(expected["positions"][0])
        logprobs = [found.logprobs[0][token].logprob for token in range(len(expected["logprobs"]))]
        torch.testing.assert_close(torch.tensor(logprobs), torch.tensor(expected["logprobs"]), atol=5e-4, rtol=0)
        assert list(found.token_ids) == expected["ids"]


@pytest.mark.parametrize("sampling", [{}, {"do_sample_frames": True, "fps": 1.0}])
def test_times_are_not_rounded_to_the_dtype_of_the_model(checkpoint, sampling):
    import torch
    from transformers import Qwen2_5_VLProcessor
    from vllm.multimodal import MULTIMODAL_REGISTRY

    vllm.plugins.load_general_plugins()
    model_config = vllm.EngineArgs(model=checkpoint, dtype="bfloat16").create_model_config()
    processor = MULTIMODAL_REGISTRY.create_processor(model_config)
    request = mixed_requests()[1]
    items = processor.info.parse_mm_data(asked(request, 0.25)["multi_modal_data"])
    videos = processor(request.prompt, items, hf_processor_mm_kwargs=sampling)["mm_kwargs"]["video"]
    metadata = [
        {name: value for name, value in video.items() if name != "do_sample_frames"} for video in request.metadata
    ]
    expected = Qwen2_5_VLProcessor.from_pretrained(checkpoint)(
        text=request.prompt,
        videos=[frames for frames, _ in request.videos],
        video_metadata=metadata,
        return_tensors="pt",
        **sampling,
    )["second_per_grid_ts"]
    assert not torch.equal(expected, expected.bfloat16().float())
    assert torch.equal(torch.stack([video["second_per_grid_ts"].data for video in videos]), expected)


class Upstream:
    """As much of vLLM's model as [`HoliTomQwenVLMixin`] asks when it starts."""

    use_data_parallel = False
    last_whole_block = 1

    def __init__(self, vllm_config, prefix):
        self.visual = SimpleNamespace(blocks=[None] * 2, fullatt_block_indexes=[self.last_whole_block])


@pytest.mark.parametrize(
    ("fields", "stages", "settings", "error"),
    [
        ({}, 1, {}, None),
        ({"last_whole_block": 0}, 1, {}, "attends within windows"),
        ({"last_whole_block": 0}, 1, {"retention_ratio": 1.0}, "attends within windows"),
        ({"last_whole_block": 0}, 1, {"outer_method": "farthest_points"}, None),
        ({"use_data_parallel": True}, 1, {}, "divided by frames"),
        ({}, 2, {}, "first stage of a pipeline"),
    ],
)
def test_a_model_starts_only_where_it_can_do_what_it_is_asked(fields, stages, settings, error):
    from holitom_hf import HoliTomConfig
    from holitom_hf.vllm.qwen_vl import HoliTomQwenVLMixin

    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_batched_tokens=8),
        parallel_config=SimpleNamespace(pipeline_parallel_size=stages),
        model_config=SimpleNamespace(
            hf_config=SimpleNamespace(holitom_config=HoliTomConfig(**settings).to_dict()),
        ),
    )
    model_class = type("Model", (HoliTomQwenVLMixin, type("Changed", (Upstream,), fields)), {})
    if error is None:
        assert model_class(vllm_config=config).settings.exact_budget
        return
    with pytest.raises(ValueError, match=error):
        model_class(vllm_config=config)
