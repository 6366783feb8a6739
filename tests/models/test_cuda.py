"""A GPU gives what the CPU gives. Left out where there is none."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen3VLForConditionalGeneration

from holitom_hf.benchmarking.measuring import count_waits
from holitom_hf.merging.outer import merge_videos
from holitom_hf.merging.video_tokens import VideoTokens
from holitom_hf.models.qwen2_5_vl.configuration import HoliTomQwen2_5_VLConfig
from holitom_hf.models.qwen2_5_vl.modeling import HoliTomQwen2_5_VLForConditionalGeneration
from holitom_hf.models.qwen3_vl.configuration import HoliTomQwen3VLConfig
from holitom_hf.models.qwen3_vl.modeling import HoliTomQwen3VLForConditionalGeneration

from ..conftest import make_prompt, make_video, pad_batch
from . import qwen


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CLOSE = {"atol": 2e-4, "rtol": 2e-4}
SETTINGS = {
    "published": {},
    "off": {"outer_method": "none", "inner_method": "none"},
    "kept and sized": {"position_ids": "kept", "proportional_attention": True},
    "farthest points": {"outer_method": "farthest_points", "position_ids": "kept", "proportional_attention": True},
    "visionzip": {"outer_method": "visionzip"},
    "reuse": {"vision_reuse_layer": 1, "vision_reuse_threshold": 0.8},
    "frames": {"vision_reuse_layer": 1, "vision_method": "frames", "vision_reuse_threshold": 0.6},
    "tome": {"vision_reuse_layer": 1, "vision_method": "tome"},
}
GENERATE = {"do_sample": False, "max_new_tokens": 6}


@pytest.fixture(autouse=True)
def _whole_float32(monkeypatch):
    """Convolutions of a GPU round to TensorFloat-32 unless told otherwise."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def to(device: str, inputs: dict) -> dict:
    return {name: value.to(device) for name, value in inputs.items()}


def check_alike(model, inputs: dict, generate: dict) -> None:
    """Logits of a pass and tokens of an answer of a model on both devices."""
    there = copy.deepcopy(model).to("cuda")
    with torch.inference_mode():
        here = model(**inputs).logits
        torch.testing.assert_close(there(**to("cuda", inputs)).logits.cpu(), here, **CLOSE)
        tokens = model.generate(**inputs, **generate)
        assert torch.equal(there.generate(**to("cuda", inputs), **generate).cpu(), tokens)
        static = there.generate(**to("cuda", inputs), **generate, cache_implementation="static", disable_compile=True)
        assert torch.equal(static.cpu(), tokens)


@pytest.mark.parametrize("name", SETTINGS)
def test_llava_onevision(model, settings, name):
    ids, mask = pad_batch([make_prompt(3, "video:6", 8, seed=21), make_prompt(2, "video:6", 3, seed=22)])
    videos = torch.stack([make_video(6, seed=23, num_scenes=1), make_video(6, seed=24, num_scenes=1)])
    changed = copy.deepcopy(model)
    changed.config.holitom_config = replace(settings, **SETTINGS[name])
    check_alike(changed, {"input_ids": ids, "attention_mask": mask, "pixel_values_videos": videos}, GENERATE)
    if changed.config.holitom_config.has_vision_stage:
        there = changed.to("cuda").get_video_features(videos.cuda())
        assert torch.cat(there.computed_patches).float().mean() < 1  # else the towers were not told apart


@pytest.mark.parametrize("name", ["published", "off", "kept and sized", "farthest points"])
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_qwen(settings, family, name):
    torch.manual_seed(0)
    used = replace(settings, **SETTINGS[name])
    if family == "qwen3_vl":
        model = HoliTomQwen3VLForConditionalGeneration(HoliTomQwen3VLConfig(**qwen.QWEN3_VL, holitom_config=used))
        upstream_class = Qwen3VLForConditionalGeneration
    else:
        config = HoliTomQwen2_5_VLConfig(**qwen.QWEN2_5_VL, holitom_config=used)
        model, upstream_class = HoliTomQwen2_5_VLForConditionalGeneration(config), Qwen2_5_VLForConditionalGeneration
    grids = [(4, 4, 8), (3, 8, 4)]
    prompts = [
        qwen.make_prompt(3 + row, grid, 8, seed=21 + row, is_timed=family == "qwen3_vl")
        for row, grid in enumerate(grids)
    ]
    inputs = qwen.inputs_of(prompts, [qwen.video(grid, 23 + row) for row, grid in enumerate(grids)])
    placeholders = [qwen.VISION_START, qwen.VISION_END, qwen.IMAGE, qwen.VIDEO]
    check_alike(model.eval(), inputs, GENERATE | {"suppress_tokens": placeholders})
    if name == "off":
        upstream = upstream_class._from_config(model.config).eval()
        upstream.load_state_dict(model.state_dict())
        with torch.inference_mode():
            theirs = upstream.to("cuda")(**to("cuda", inputs)).logits
            assert torch.equal(model.to("cuda")(**to("cuda", inputs)).logits, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(model, settings, dtype):
    inputs = {"input_ids": make_prompt(3, "video:6", 8)[None], "pixel_values_videos": make_video(6, seed=23)[None]}
    half = copy.deepcopy(model).to("cuda", dtype)
    with torch.inference_mode():
        # The same tokens go in, so that no choice of the merge hangs on rounding.
        features = half.get_video_features(inputs["pixel_values_videos"].to("cuda", dtype), return_dict=True)
        found = half(input_ids=inputs["input_ids"].cuda(), mm_encoder_outputs={"video": features}).logits.float().cpu()
        host = copy.deepcopy(half).cpu()
        features = host.get_video_features(inputs["pixel_values_videos"].to(dtype), return_dict=True)
        here = host(input_ids=inputs["input_ids"], mm_encoder_outputs={"video": features}).logits.float()
    assert found.isfinite().all()
    assert found.shape == here.shape


def test_merging_a_video_waits_once(settings):
    random = torch.Generator("cuda").manual_seed(0)
    tokens = torch.randn(32, 196, 64, generator=random, device="cuda")
    importance = torch.rand(32, 196, generator=random, device="cuda")
    videos = [VideoTokens(tokens, importance)]
    merge_videos(videos, settings)
    assert count_waits(lambda: merge_videos(videos, settings)) == 1
