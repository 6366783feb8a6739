"""Sharing over a Hub on the loopback interface, with the real client."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from holitom_hf import HoliTomConfig
from holitom_hf.answering.answerer import Answerer
from holitom_hf.apps.demo import write_clip
from holitom_hf.bundled.tiny_model import tiny_processor

from ..hub import TOKEN, LoopbackHub


PUSH_AND_LOAD = """
import json, sys
import torch
from huggingface_hub import HfApi
from holitom_hf import HoliTomConfig, HoliTomLlavaOnevisionForConditionalGeneration, HoliTomProcessor

folder, token = sys.argv[1:]
HoliTomConfig(retention_ratio=0.2).push_to_hub("user/settings", token=token)
model = HoliTomLlavaOnevisionForConditionalGeneration.from_pretrained(folder)
model.push_to_hub("user/whole", token=token)
HoliTomProcessor.from_pretrained(folder).push_to_hub("user/whole", token=token)
wrapped = HoliTomLlavaOnevisionForConditionalGeneration.from_pretrained("user/whole", holitom_config={
    "retention_ratio": 0.3, "inner_merge_layer": 2})
wrapped.push_to_hub("user/small", config_only=True, token=token)
HfApi(token=token).create_branch("user/small", branch="other")
wrapped.config.holitom_config.retention_ratio = 0.5
wrapped.push_to_hub("user/small", config_only=True, token=token, revision="other")
wrapped.push_to_hub("user/secret", config_only=True, token=token, private=True)
ratio = lambda *args, **kwargs: HoliTomLlavaOnevisionForConditionalGeneration.from_pretrained(
    *args, **kwargs).config.holitom_config.retention_ratio
print("REPORT" + json.dumps({
    "settings": HoliTomConfig.from_pretrained("user/settings").to_dict(),
    "ratios": [ratio("user/small"), ratio("user/small", revision="other"), ratio("user/secret", token=token)],
}))
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
FAIL = """
import json, sys
from holitom_hf import HoliTomConfig, HoliTomLlavaOnevisionForConditionalGeneration

model = HoliTomLlavaOnevisionForConditionalGeneration.from_pretrained(sys.argv[1])
report = []
for code in sys.argv[2:]:
    try:
        eval(code)
        report.append(["nothing", ""])
    except Exception as error:
        report.append([type(error).__name__, " ".join(str(error).split())])
print("REPORT" + json.dumps(report))
"""


@pytest.fixture
def checkpoint(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    tiny_processor(side=32, patch=4, num_frames=32).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def hub():
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture
def run(hub, tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}

    def run(code, *arguments, **more):
        command = [sys.executable, "-c", code, *map(str, arguments)]
        result = subprocess.run(
            command, capture_output=True, text=True, env=environment | more, check=False, cwd=tmp_path
        )
        assert result.returncode == 0, result.stderr[-3000:]
        return json.loads(result.stdout.split("REPORT")[1]) if "REPORT" in result.stdout else result.stdout

    return run


def test_settings_models_and_config_only_checkpoints_go_through_the_hub(demo, hub, run, tmp_path):
    answerer = Answerer(str(demo / "model"), {"retention_ratio": 0.3, "inner_merge_layer": 2}, device="cpu")
    answerer.load_model()
    question = answerer.prepare(str(demo / "clip.mp4"), "What?", num_frames=5)
    torch.save(dict(question.features), tmp_path / "inputs.pt")
    report = run(PUSH_AND_LOAD, demo / "model", TOKEN)
    assert report == {"settings": HoliTomConfig(retention_ratio=0.2).to_dict(), "ratios": [0.3, 0.5, 0.5]}
    settings, whole, small = (hub.repositories[f"user/{name}"].files for name in ("settings", "whole", "small"))
    assert json.loads(settings["holitom_config.json"])["retention_ratio"] == 0.2
    assert {"model.safetensors", "config.json", "modeling_holitom.py", "README.md", "tokenizer.json"} <= set(whole)
    assert any(request.startswith("PUT /lfs/") for request in hub.requests)
    assert not any(name.endswith(".safetensors") for name in small)
    assert sum(map(len, small.values())) < 220_000
    assert hub.repositories["user/secret"].is_private

    # The model card says what it is, and its snippet runs.
    for name, licence, base in (("whole", "license: other", None), ("small", "license: apache-2.0", "user/whole")):
        card = hub.repositories[f"user/{name}"].files["README.md"].decode()
        front = card.split("---")[1].splitlines()
        assert {"library_name: transformers", "pipeline_tag: video-text-to-text", licence, "- holitom"} <= set(front)
        assert ("base_model: user/whole" in front) == (base is not None)
        # 49 tokens a frame, of which the share R stays, and half of these from the layer of stage 3 on.
        outer = {"whole": 235, "small": 470}[name]
        assert f"| `retention_ratio` | `{outer / 1568:.2g}` |" in card
        assert f"| 32 | 1568 | {outer} | {round(outer / 2)} |" in card
        assert "@inproceedings{shao2025holitom" in card
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert 'name = "user/small"' in snippet
    write_clip(tmp_path / "video.mp4")
    run(snippet.replace("max_new_tokens=128", "max_new_tokens=2"))

    # Without holitom-hf; whatever code the base repository carries is never run.
    marker = tmp_path / "ran"
    whole["modeling_holitom.py"] = f"open({str(marker)!r}, 'w').close()".encode()
    expected = answerer.model.generate(**question.features, max_new_tokens=5, do_sample=False)[0, -5:].tolist()
    wanted = ["HoliTomLlavaOnevisionForConditionalGeneration", "HoliTomProcessor", expected]
    assert run(LOAD, tmp_path) == wanted
    assert not marker.exists()

    # From the cache alone.
    number = len(hub.requests)
    assert run(LOAD, tmp_path, HF_HUB_OFFLINE="1") == wanted
    assert len(hub.requests) == number


def test_a_failed_push_says_what_happened_and_leaves_nothing_half_done(checkpoint, hub, run):
    push = "model.push_to_hub({!r}, token={!r}, config_only={})"
    good = push.format("user/model", TOKEN, False)
    report = run(
        FAIL,
        checkpoint,
        good,
        push.format("user/model", "hf_bad", False),
        push.format("other/model", TOKEN, False),
        "HoliTomConfig().push_to_hub('other/settings', token='hf_bad')",
    )
    assert report[0] == ["nothing", ""]
    assert report[1][0] == "OSError"
    assert report[1][1].startswith("no file of 'user/model' was changed on the Hub: ")
    assert "401" in report[1][1]
    assert "403" in report[2][1]
    assert "401" in report[3][1]
    assert list(hub.repositories) == ["user/model"]
    before = hub.repositories["user/model"].files
    assert "model.safetensors" in before

    change = "setattr(model.config.holitom_config, 'retention_ratio', 0.77)"
    hub.broken = ["/api/models/user/model/commit/"]
    _, (kind, message) = run(FAIL, checkpoint, change, good)
    assert kind == "OSError"
    assert message.startswith("no file of 'user/model' was changed on the Hub: ")
    assert hub.repositories["user/model"].files is before
    hub.broken = []
    assert run(FAIL, checkpoint, change, good)[1] == ["nothing", ""]
    assert b"0.77" in hub.repositories["user/model"].files["config.json"]


def test_what_cant_be_loaded_is_named(checkpoint, hub, run):
    load = "HoliTomLlavaOnevisionForConditionalGeneration.from_pretrained({!r}{})"
    push = f"model.push_to_hub('user/model', token={TOKEN!r})"
    small = f"model.push_to_hub('user/small', token={TOKEN!r}, config_only=True)"
    base = "setattr(model.config.holitom_config, 'base_model_name_or_path', 'user/model')"
    assert all(kind == "nothing" for kind, _ in run(FAIL, checkpoint, push, base, small))
    hub.repositories["user/model"].is_gated = True
    report = run(
        FAIL,
        checkpoint,
        load.format("user/none", ""),
        load.format("user/model", ", revision='v9', token='hf_good'"),
        load.format("user/small", ""),
        "HoliTomConfig.from_pretrained('user/none')",
        load.format("user/small", f", token={TOKEN!r}"),
    )
    assert all(kind == "OSError" for kind, _ in report[:4]), report
    assert "user/none" in report[0][1]
    assert "v9" in report[1][1]
    assert "user/small holds no weights; they come from its base model 'user/model'" in report[2][1]
    assert "gated" in report[2][1]
    assert report[4] == ["nothing", ""]
    hub.broken = ["/"]
    [(kind, message)] = run(FAIL, checkpoint, load.format("user/other", ""))
    assert kind == "OSError"
    assert "user/other" in message
