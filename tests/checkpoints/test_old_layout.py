"""Checkpoints of 0.1, whose code lay in other files, load and answer as those of today."""

import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from holitom_hf import HoliTomLlavaOnevisionForConditionalGeneration, HoliTomProcessor
from holitom_hf.bundled import BUNDLED_MODEL
from holitom_hf.models.upstream import CACHE_NAME


# What 0.1 wrote for the bundled model: settings, code, and BASE where its weights come from.
WRITTEN_BY_0_1 = Path(__file__).parent / "data" / "layout_0_1.tar.gz"
ANSWER = """
import json, sys
sys.modules["holitom_hf"] = None  # as if it were not installed
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
inputs = torch.load(sys.argv[1])
answers = {}
for folder in sys.argv[2:]:
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with torch.no_grad():
        logits = model(**inputs, logits_to_keep=1).logits
    tokens = output[0, inputs["input_ids"].shape[1] :].tolist()
    answers[folder] = [tokens, logits.sum().item(), type(processor).__name__]
    model.save_pretrained(folder + "-again")
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def inputs(demo):
    processor = HoliTomProcessor.from_pretrained(BUNDLED_MODEL)
    content = [{"type": "video"}, {"type": "text", "text": "What happens?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return dict(processor(text=prompt, videos=str(demo / "clip.mp4"), return_tensors="pt"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A whole checkpoint and a config-only one of each layout."""
    folder = tmp_path_factory.mktemp("layouts")
    with tarfile.open(WRITTEN_BY_0_1) as archive:
        archive.extractall(folder, filter="data")
    old_small, old_whole = folder / "old-small", folder / "old-whole"
    (folder / "config_only").rename(old_small)
    config = json.loads((old_small / "config.json").read_text())
    processor = json.loads((BUNDLED_MODEL / "processor_config.json").read_text())
    processor |= json.loads((old_small / "processor_config.json").read_text())
    shutil.copytree(BUNDLED_MODEL, old_whole)
    for file in old_small.glob("*.py"):
        shutil.copyfile(file, old_whole / file.name)
    config["holitom_config"]["base_model_name_or_path"] = str(BUNDLED_MODEL)
    (old_small / "config.json").write_text(json.dumps(config))
    config["holitom_config"]["base_model_name_or_path"] = None
    (old_whole / "config.json").write_text(json.dumps(config))
    (old_whole / "processor_config.json").write_text(json.dumps(processor))

    model = HoliTomLlavaOnevisionForConditionalGeneration.from_pretrained(BUNDLED_MODEL)
    model.save_pretrained(folder / "new-whole")
    HoliTomProcessor.from_pretrained(BUNDLED_MODEL).save_pretrained(folder / "new-whole")
    model.config.holitom_config.base_model_name_or_path = str(BUNDLED_MODEL)
    model.save_pretrained(folder / "new-small", config_only=True)
    return {name: folder / name for name in ("old-whole", "old-small", "new-whole", "new-small")}


def test_all_layouts_answer_alike_without_the_package(folders, inputs, tmp_path):
    assert (folders["old-whole"] / "token_merging.py").exists()
    assert (folders["new-whole"] / "merging_outer.py").exists()
    if CACHE_NAME != "past_key_values":  # the code of 0.1 knows only releases of transformers before 5.24
        folders = {name: folder for name, folder in folders.items() if name.startswith("new")}
    torch.save(inputs, tmp_path / "inputs.pt")
    command = [sys.executable, "-c", ANSWER, str(tmp_path / "inputs.pt"), *map(str, folders.values())]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    answers = list(json.loads(run.stdout.splitlines()[-1]).values())
    assert answers == [answers[0]] * len(folders)
    assert answers[0][2] == "HoliTomProcessor"
    # Each went on with its own code.
    for name, folder in folders.items():
        file = "token_merging.py" if name.startswith("old") else "merging_outer.py"
        assert (folder.parent / f"{name}-again" / file).exists()


def test_all_layouts_load_with_the_package(folders, inputs):
    logits = []
    for folder in folders.values():
        model = HoliTomLlavaOnevisionForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            logits.append(model(**inputs, logits_to_keep=1).logits)
    assert all(torch.equal(logits[0], other) for other in logits[1:])
