"""Sharing over a Hub on the loopback interface, with the real client."""

import json
import os
import subprocess
import sys

import torch

from holitom_hf import HoliTomConfig
from holitom_hf.tiny_model import tiny_processor

from .conftest import make_prompt, make_video
from .hub import LoopbackHub


PUSH_AND_LOAD = """
import json, sys
import torch
from holitom_hf import HoliTomConfig, HoliTomLlavaOnevisionForConditionalGeneration, HoliTomProcessor

folder, out = sys.argv[1:]
HoliTomConfig(retention_ratio=0.2).push_to_hub("user/settings", token="hf_x")
model = HoliTomLlavaOnevisionForConditionalGeneration.from_pretrained(folder)
model.push_to_hub("user/whole", token="hf_x")
HoliTomProcessor.from_pretrained(folder).push_to_hub("user/whole", token="hf_x")
wrapped = HoliTomLlavaOnevisionForConditionalGeneration.from_pretrained("user/whole", holitom_config={
    "retention_ratio": 0.3, "inner_merge_layer": 2})
wrapped.push_to_hub("user/small", config_only=True, token="hf_x")
print("REPORT" + json.dumps(HoliTomConfig.from_pretrained("user/settings").to_dict()))
"""
LOAD = """
import json, sys
sys.modules["holitom_hf"] = None
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

inputs = torch.load(sys.argv[1] + "/inputs.pt")
model = AutoModelForImageTextToText.from_pretrained("user/small", trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained("user/small", trust_remote_code=True)
tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)
print("REPORT" + json.dumps([type(model).__name__, type(processor).__name__, tokens[0, -5:].tolist()]))
"""


def test_settings_models_and_config_only_checkpoints_go_through_the_hub(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    tiny_processor(side=32, patch=4, num_frames=32).save_pretrained(tmp_path / "model")
    inputs = {"input_ids": make_prompt(3, "video:5", 6)[None], "pixel_values_videos": make_video(5, seed=1)[None]}
    torch.save(inputs, tmp_path / "inputs.pt")
    with LoopbackHub() as hub:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}

        def run(code, *arguments):
            command = [sys.executable, "-c", code, *map(str, arguments)]
            result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
            assert result.returncode == 0, result.stderr[-3000:]
            return json.loads(result.stdout.split("REPORT")[1])

        assert run(PUSH_AND_LOAD, tmp_path / "model", tmp_path) == HoliTomConfig(retention_ratio=0.2).to_dict()
        assert json.loads(hub.repositories["user/settings"]["holitom_config.json"])["retention_ratio"] == 0.2
        whole, small = hub.repositories["user/whole"], hub.repositories["user/small"]
        assert "model.safetensors" in whole
        assert "tokenizer.json" in whole
        assert not any(name.endswith(".safetensors") for name in small)
        assert sum(map(len, small.values())) < 200_000
        card = small["README.md"].decode()
        assert "base_model: user/whole\n" in card
        assert "pipeline_tag: video-text-to-text\n" in card
        names = run(LOAD, tmp_path)
    expected = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, -5:].tolist()
    assert names == ["HoliTomLlavaOnevisionForConditionalGeneration", "HoliTomProcessor", expected]
