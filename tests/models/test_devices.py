"""Where weights lie and in which precision: offloaded, quantized, spread over processes."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import BitsAndBytesConfig, QuantoConfig

from holitom_hf.merging.vision_methods import VISION_METHODS


@pytest.fixture(scope="module")
def checkpoint(subject, tmp_path_factory):
    folder = tmp_path_factory.mktemp("devices")
    subject.model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def inputs(subject):
    return subject.inputs([subject.prompt(3, 5, 6)], [subject.video(5, seed=1)])


@pytest.fixture(scope="module")
def expected(subject, inputs):
    return subject.model.generate(**inputs, max_new_tokens=5, do_sample=False)


def test_device_map_auto(subject, checkpoint, inputs, expected):
    loaded = type(subject.model).from_pretrained(checkpoint, device_map="auto")
    assert torch.equal(loaded.generate(**inputs, max_new_tokens=5, do_sample=False), expected)


@pytest.mark.parametrize("on_disk", [("tower", "layers.1", "layers.2", "lm_head"), ("embed_tokens", "layers.3")])
@torch.inference_mode()
def test_layers_on_different_places_with_offloading(subject, checkpoint, inputs, expected, tmp_path, on_disk):
    """Weights on the disk are fetched by accelerate's hooks, also where HoliTom calls a layer's projections itself."""
    model, on_disk = subject.model, tuple(name.replace("tower", subject.tower) for name in on_disk)
    names = [f"model.{subject.tower}", *subject.parts, "lm_head"]
    names += [f"model.language_model.{part}" for part in ("embed_tokens", "norm", "rotary_emb")]
    names += [f"model.language_model.layers.{layer}" for layer in range(5)]
    device_map = {name: "disk" if name.endswith(on_disk) else "cpu" for name in names}
    loaded = type(model).from_pretrained(checkpoint, device_map=device_map, offload_folder=tmp_path)
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    assert any(weight.is_meta for weight in loaded.parameters())
    assert torch.equal(loaded.generate(**inputs, max_new_tokens=5, do_sample=False), expected)
    if not subject.name.startswith("llava"):  # towers of other backbones leave nothing out
        return
    pixels = subject.video(1, seed=1).expand(1, 5, -1, -1, -1)
    for method in VISION_METHODS:
        settings = {"vision_method": method, "vision_reuse_layer": 1, "vision_reuse_threshold": 0.5}
        settings["vision_merge_thresholds"] = [-1.0]
        found, whole = (one.get_video_features(pixels, holitom_config=settings) for one in (loaded, model))
        assert not whole.computed_patches[0].all()
        torch.testing.assert_close(found.pooler_output, whole.pooler_output)


@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16, torch.float16])
def test_dtypes(subject, checkpoint, inputs, dtype):
    loaded = type(subject.model).from_pretrained(checkpoint, dtype=dtype)
    assert loaded.dtype == (torch.float32 if dtype == "auto" else dtype)
    pixels = inputs["pixel_values_videos"].to(loaded.dtype)
    with torch.no_grad():
        ours, exact = loaded(**inputs | {"pixel_values_videos": pixels}).logits, subject.model(**inputs).logits
    assert torch.nn.functional.cosine_similarity(ours.float(), exact, dim=-1).mean() > 0.95


INT8 = {
    "quanto": (QuantoConfig(weights="int8"), "QLinear"),
    "bitsandbytes": (BitsAndBytesConfig(load_in_8bit=True), "Linear8bitLt"),
}


@pytest.mark.parametrize("library", INT8)
def test_int8_weights(subject, checkpoint, inputs, library):
    config, linear = INT8[library]
    loaded = type(subject.model).from_pretrained(checkpoint, quantization_config=config)
    assert type(loaded.model.language_model.layers[1].self_attn.q_proj).__name__ == linear
    with torch.no_grad():
        ours, exact = loaded(**inputs).logits, subject.model(**inputs).logits
    assert torch.nn.functional.cosine_similarity(ours.float(), exact, dim=-1).mean() > 0.95
    assert loaded.generate(**inputs, max_new_tokens=5).shape[1] == inputs["input_ids"].shape[1] + 5


TENSOR_PARALLEL = """
import json, sys
import torch, torch.distributed as dist
from holitom_hf import HoliTomLlavaOnevisionForConditionalGeneration

folder, out = sys.argv[1:]
model = HoliTomLlavaOnevisionForConditionalGeneration.from_pretrained(folder, tp_plan="auto").eval()
inputs = torch.load(out + "/inputs.pt")
with torch.no_grad():
    outputs = model(**inputs)
tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)
rank = dist.get_rank()
torch.save({"logits": outputs.logits, "kept": outputs.inner_keep[0], "tokens": tokens}, f"{out}/rank{rank}.pt")
weight = model.model.language_model.layers[0].self_attn.q_proj.weight
json.dump(list(weight.to_local().shape), open(f"{out}/rank{rank}.json", "w"))
dist.destroy_process_group()
"""


@pytest.mark.parametrize("subject", ["llava_onevision"], indirect=True)
def test_tensor_parallel_over_two_processes(model, checkpoint, inputs, expected, tmp_path):
    """Each process holds half of the heads; all must keep the same tokens, by the mean over all heads."""
    torch.save(inputs, tmp_path / "inputs.pt")
    (tmp_path / "run.py").write_text(TENSOR_PARALLEL)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [*command, str(tmp_path / "run.py"), str(checkpoint), str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    with torch.no_grad():
        single = model(**inputs)
    for rank in range(2):
        assert json.loads((tmp_path / f"rank{rank}.json").read_text()) == [16, 32]
        report = torch.load(tmp_path / f"rank{rank}.pt")
        assert torch.equal(report["kept"], single.inner_keep[0])
        torch.testing.assert_close(report["logits"], single.logits, atol=1e-4, rtol=1e-4)
        assert torch.equal(report["tokens"], expected)
