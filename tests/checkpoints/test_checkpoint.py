"""What a checkpoint is: saved, loaded, wrapped, with and without its weights, with and without this package."""

import copy
import functools
import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import LlavaOnevisionForConditionalGeneration, LlavaOnevisionModel
from transformers.dynamic_module_utils import get_relative_import_files

from holitom_hf import (
    HoliTomConfig,
    HoliTomLlavaOnevisionConfig,
    HoliTomLlavaOnevisionForConditionalGeneration,
    HoliTomLlavaOnevisionModel,
    HoliTomLlavaVideoConfig,
    HoliTomProcessor,
    HoliTomQwen2Model,
)
from holitom_hf.benchmarking.architectures import architecture
from holitom_hf.bundled.tiny_model import tiny_processor
from holitom_hf.checkpoints.hub import hub_options
from holitom_hf.checkpoints.model_card import model_card
from holitom_hf.checkpoints.writing import BROKEN_OFF, written_aside

from ..conftest import make_prompt, make_video


# What checkpoints on the Hub say, whatever the package calls its modules.
AUTO_MAP = {
    "AutoConfig": "configuration_holitom.HoliTomLlavaOnevisionConfig",
    "AutoModel": "modeling_holitom.HoliTomLlavaOnevisionModel",
    "AutoModelForImageTextToText": "modeling_holitom.HoliTomLlavaOnevisionForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_holitom.HoliTomLlavaOnevisionForConditionalGeneration",
    "AutoProcessor": "processing_holitom.HoliTomProcessor",
    "AutoVideoProcessor": "processing_holitom.HoliTomVideoProcessor",
}
ENTRY_FILES = {f"{name}_holitom.py" for name in ("configuration", "modeling", "processing", "pipeline")}


def carried_files(folder: Path) -> set[str]:
    """The entry files, and what transformers finds that they import."""
    found = {Path(file).name for entry in ENTRY_FILES for file in get_relative_import_files(folder / entry)}
    return ENTRY_FILES | found


@pytest.fixture(scope="module")
def inputs():
    return {"input_ids": make_prompt(3, "video:5", 6)[None], "pixel_values_videos": make_video(5, seed=1)[None]}


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory) -> Path:
    """A folder with model and processor, as a user saves them."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    tiny_processor(side=32, patch=4, num_frames=32).save_pretrained(folder)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            tensors.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    return tensors


# The base model has no use for the head in a whole checkpoint; upstream's says the same.
HEAD = {"language_model.lm_head.weight"}


def load(cls, folder, **kwargs):
    """Loads, and fails on any weight that is missing, unexpected or of another shape."""
    model, report = cls.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not report["missing_keys"], report
    assert report["unexpected_keys"] == (HEAD if issubclass(cls, LlavaOnevisionModel) else set()), report
    assert not report["mismatched_keys"], report
    return model.eval()


def test_a_round_trip_keeps_settings_weights_and_answers(model, checkpoint, inputs):
    loaded = load(HoliTomLlavaOnevisionForConditionalGeneration, checkpoint)
    assert loaded.config.holitom_config == model.config.holitom_config
    assert isinstance(loaded.model.language_model, HoliTomQwen2Model)
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values()))
    assert torch.equal(
        loaded.generate(**inputs, max_new_tokens=5, do_sample=False),
        model.generate(**inputs, max_new_tokens=5, do_sample=False),
    )


def test_shards_are_written_and_read(model, tmp_path, inputs):
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded = load(HoliTomLlavaOnevisionForConditionalGeneration, tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_the_file_names_its_weights_as_upstream_does(upstream, checkpoint, tmp_path):
    upstream.save_pretrained(tmp_path)
    ours, theirs = weights(checkpoint), weights(tmp_path)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(name.startswith("language_model.model.") for name in theirs), "upstream's names changed"


class TestUpstreamCheckpoints:
    @pytest.fixture(scope="class")
    def folder(self, upstream, tmp_path_factory):
        folder = tmp_path_factory.mktemp("upstream")
        upstream.save_pretrained(folder)
        return folder

    @pytest.mark.parametrize("given", [HoliTomConfig(retention_ratio=0.3, inner_merge_layer=2), None])
    def test_they_are_wrapped_without_conversion(self, model, folder, inputs, given):
        settings = given or HoliTomConfig(inner_merge_layer=None)
        loaded = load(HoliTomLlavaOnevisionForConditionalGeneration, folder, holitom_config=settings)
        assert loaded.config.holitom_config == settings
        with torch.no_grad():
            expected = model(**inputs, holitom_config=settings).logits
            assert torch.equal(loaded(**inputs).logits, expected)

    def test_the_base_model_loads_too(self, model, folder):
        loaded = load(HoliTomLlavaOnevisionModel, folder, holitom_config={"inner_merge_layer": 2})
        state = model.model.state_dict()
        assert loaded.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())

    def test_a_folder_of_ours_loads_as_plain_upstream(self, upstream, checkpoint, inputs):
        loaded = load(LlavaOnevisionForConditionalGeneration, checkpoint)
        with torch.no_grad():
            assert torch.equal(loaded(**inputs).logits, upstream(**inputs).logits)
        load(LlavaOnevisionModel, checkpoint)

    def test_stage_3_beyond_the_decoder_is_refused_before_weights_are_read(self, folder):
        with pytest.raises(ValueError, match=r"inner_merge_layer is 18, but the decoder has 5 layers: choose 1 to 4"):
            HoliTomLlavaOnevisionForConditionalGeneration.from_pretrained(folder)


def test_every_class_and_file_is_written_whichever_class_saves(model, checkpoint, tmp_path):
    model.model.save_pretrained(tmp_path / "base")
    for folder in (checkpoint, tmp_path / "base"):
        assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP
        assert {file.name for file in folder.glob("*.py")} == carried_files(folder)
    assert json.loads((checkpoint / "processor_config.json").read_text())["auto_map"] == {
        name: AUTO_MAP[name] for name in ("AutoProcessor", "AutoVideoProcessor")
    }


REMOTE_CODE = """
import json, sys
sys.modules["holitom_hf"] = None  # as if it were not installed
import torch
from transformers import (
    AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor
)
folder, out, trust = sys.argv[1], sys.argv[2], sys.argv[3] == "trust"
kwargs = {"trust_remote_code": True} if trust else {}
inputs = torch.load(out + "/inputs.pt")
report = {"config": type(AutoConfig.from_pretrained(folder, **kwargs)).__name__}
processor = AutoProcessor.from_pretrained(folder, **kwargs)
report["processor"] = [type(processor).__name__, type(processor.video_processor).__name__]
for auto in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    model, info = auto.from_pretrained(folder, output_loading_info=True, **kwargs)
    head = {"language_model.lm_head.weight"} if auto is AutoModel else set()
    assert not info["missing_keys"] and info["unexpected_keys"] == head, info
    report[auto.__name__] = [type(model).__name__, type(getattr(model, "model", model).language_model).__name__]
tokens = model.eval().generate(**inputs, max_new_tokens=5, do_sample=False)
report["tokens"] = tokens[0, inputs["input_ids"].shape[1]:].tolist()
if trust:
    again = out + "/again"
    model.save_pretrained(again)
    processor.save_pretrained(again)
    loaded = AutoModelForImageTextToText.from_pretrained(again, trust_remote_code=True)
    report["again"] = type(loaded).__name__
    frames = processor(text="<video>", videos=out + "/clip.mp4", num_frames=3, return_tensors="pt")
    report["frames"] = list(frames["pixel_values_videos"].shape)
print("REPORT" + json.dumps(report))
"""


class TestWithoutThePackage:
    def run(self, folder, tmp_path, inputs, trust: str) -> dict:
        torch.save(inputs, tmp_path / "inputs.pt")
        environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
        result = subprocess.run(
            [sys.executable, "-c", REMOTE_CODE, str(folder), str(tmp_path), trust],
            capture_output=True,
            text=True,
            env=environment,
            cwd=tmp_path,
            check=False,
        )
        assert result.returncode == 0, result.stderr[-4000:]
        return json.loads(result.stdout.split("REPORT")[1])

    def test_auto_classes_give_ours_with_remote_code(self, model, checkpoint, tmp_path, inputs):
        from holitom_hf.apps.demo import write_clip

        write_clip(tmp_path / "clip.mp4", num_frames=16, side=112)
        report = self.run(checkpoint, tmp_path, inputs, "trust")
        name = "HoliTomLlavaOnevisionForConditionalGeneration"
        assert report["config"] == "HoliTomLlavaOnevisionConfig"
        assert report["processor"] == ["HoliTomProcessor", "HoliTomVideoProcessor"]
        assert report["AutoModel"] == ["HoliTomLlavaOnevisionModel", "HoliTomQwen2Model"]
        assert report["AutoModelForImageTextToText"] == [name, "HoliTomQwen2Model"]
        assert report["AutoModelForMultimodalLM"] == [name, "HoliTomQwen2Model"]
        expected = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert report["tokens"] == expected.tolist()
        assert report["again"] == name
        assert report["frames"] == [1, 3, 3, 32, 32]
        assert {file.name for file in (tmp_path / "again").glob("*.py")} == carried_files(checkpoint)

    def test_auto_classes_give_upstreams_without_it(self, upstream, checkpoint, tmp_path, inputs):
        report = self.run(checkpoint, tmp_path, inputs, "plain")
        assert report["config"] == "LlavaOnevisionConfig"
        assert report["processor"] == ["LlavaOnevisionProcessor", "LlavaOnevisionVideoProcessor"]
        assert report["AutoModelForImageTextToText"] == ["LlavaOnevisionForConditionalGeneration", "Qwen2Model"]
        expected = upstream.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert report["tokens"] == expected.tolist()


class TestConfigOnly:
    @pytest.fixture(scope="class")
    def base(self, upstream, tmp_path_factory):
        folder = tmp_path_factory.mktemp("base")
        upstream.save_pretrained(folder)
        tiny_processor(side=32, patch=4, num_frames=32).save_pretrained(folder)
        return folder

    def make(self, base, folder, **settings):
        loaded = HoliTomLlavaOnevisionForConditionalGeneration.from_pretrained(
            base, holitom_config=HoliTomConfig(retention_ratio=0.3, inner_merge_layer=2, **settings)
        )
        loaded.save_pretrained(folder, config_only=True)
        return folder

    def test_it_is_small_and_takes_its_weights_from_the_base(self, model, base, tmp_path, inputs):
        folder = self.make(base, tmp_path / "small")
        assert not list(folder.glob("*.safetensors"))
        assert sum(file.stat().st_size for file in folder.iterdir()) < 220_000
        assert (folder / "README.md").read_text().startswith("---\n")
        loaded = load(HoliTomLlavaOnevisionForConditionalGeneration, folder)
        assert loaded.config.holitom_config.base_model_name_or_path == str(base)
        assert loaded.config.holitom_config.retention_ratio == 0.3
        with torch.no_grad():
            assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)

    def test_auto_classes_load_it_without_the_package(self, model, base, tmp_path, inputs):
        from holitom_hf.apps.demo import write_clip

        write_clip(tmp_path / "clip.mp4", num_frames=16, side=112)
        report = TestWithoutThePackage().run(self.make(base, tmp_path / "small"), tmp_path, inputs, "trust")
        expected = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert report["tokens"] == expected.tolist()
        assert report["processor"] == ["HoliTomProcessor", "HoliTomVideoProcessor"]

    def test_settings_dtype_and_the_processor_can_be_asked_for_as_usual(self, base, tmp_path):
        from holitom_hf import HoliTomProcessor

        folder = self.make(base, tmp_path / "small")
        loaded = load(
            HoliTomLlavaOnevisionForConditionalGeneration,
            folder,
            dtype=torch.bfloat16,
            holitom_config={"retention_ratio": 0.2, "inner_merge_layer": 3},
        )
        assert loaded.dtype == torch.bfloat16
        assert loaded.config.holitom_config.retention_ratio == 0.2
        assert load(HoliTomLlavaOnevisionForConditionalGeneration, folder, dtype="auto").dtype == torch.float32
        assert HoliTomProcessor.from_pretrained(folder).tokenizer.video_token == "<video>"

    def test_saving_it_whole_writes_weights_and_forgets_the_base(self, base, tmp_path):
        loaded = HoliTomLlavaOnevisionForConditionalGeneration.from_pretrained(self.make(base, tmp_path / "small"))
        loaded.save_pretrained(tmp_path / "whole")
        saved = json.loads((tmp_path / "whole" / "config.json").read_text())
        assert saved["holitom_config"]["base_model_name_or_path"] is None
        assert (tmp_path / "whole" / "model.safetensors").exists()
        assert loaded.config.holitom_config.base_model_name_or_path == str(base)

    def test_a_model_from_nowhere_has_no_base_to_name(self, model, tmp_path):
        with pytest.raises(ValueError, match=r"must name its base model.*base_model_name_or_path first"):
            model.save_pretrained(tmp_path / "small", config_only=True)
        assert not (tmp_path / "small").exists()

    def test_a_missing_base_is_named(self, base, tmp_path):
        folder = self.make(base, tmp_path / "small", base_model_name_or_path=str(tmp_path / "gone"))
        with pytest.raises(OSError, match=r"small holds no weights; they come from its base model '.*gone'"):
            HoliTomLlavaOnevisionForConditionalGeneration.from_pretrained(folder)

    def test_a_base_of_another_architecture_is_named(self, base, tmp_path):
        other = tmp_path / "other"
        other.mkdir()
        (other / "config.json").write_text(json.dumps({"model_type": "llama"}))
        folder = self.make(base, tmp_path / "small", base_model_name_or_path=str(other))
        with pytest.raises(ValueError, match=r"which is a 'llama' model, not 'llava_onevision'"):
            HoliTomLlavaOnevisionForConditionalGeneration.from_pretrained(folder)

    def test_a_base_of_another_size_is_named(self, upstream, base, tmp_path):
        folder = self.make(base, tmp_path / "small")
        values = json.loads((folder / "config.json").read_text())
        values["text_config"]["num_hidden_layers"] = 4
        values["text_config"]["layer_types"] = values["text_config"]["layer_types"][:4]
        (folder / "config.json").write_text(json.dumps(values))
        with pytest.raises(ValueError, match=r"text_config.num_hidden_layers is 5, but its own config says 4"):
            HoliTomLlavaOnevisionForConditionalGeneration.from_pretrained(folder)

    def test_code_in_the_base_is_never_run(self, base, tmp_path, inputs):
        """The base names remote code that would leave a trace."""
        trap = tmp_path / "trap"
        shutil.copytree(base, trap)
        values = json.loads((trap / "config.json").read_text())
        values["auto_map"] = dict.fromkeys(AUTO_MAP, "evil.Evil")
        (trap / "config.json").write_text(json.dumps(values))
        processor = json.loads((trap / "processor_config.json").read_text())
        processor["auto_map"] = {"AutoProcessor": "evil.Evil", "AutoVideoProcessor": "evil.Evil"}
        (trap / "processor_config.json").write_text(json.dumps(processor))
        (trap / "evil.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w').close()\nclass Evil: pass\n")
        from holitom_hf.apps.demo import write_clip

        write_clip(tmp_path / "clip.mp4", num_frames=16, side=112)
        TestWithoutThePackage().run(self.make(trap, tmp_path / "small"), tmp_path, inputs, "trust")
        assert not (tmp_path / "trace").exists()


SAVE_AND_DIE = """
import os, sys
import torch
from holitom_hf import HoliTomLlavaOnevisionForConditionalGeneration
import safetensors.torch, transformers.modeling_utils

folder, what = sys.argv[1:]
model = HoliTomLlavaOnevisionForConditionalGeneration.from_pretrained(folder)
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(1)
model.config.holitom_config.retention_ratio = 0.77
write = transformers.modeling_utils.safe_save_file

def half(tensors, filename, **kwargs):
    write(tensors, filename, **kwargs)
    if what == "second" and "00001-of" in str(filename):
        return
    with open(filename, "r+b") as file:
        file.truncate(1000)
    os.kill(os.getpid(), 9)

transformers.modeling_utils.safe_save_file = half
model.save_pretrained(folder, max_shard_size="40KB" if what == "second" else "1GB")
"""


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def stop_at(monkeypatch, folder: Path, number: int) -> None:
    """Raises in place of the change of `folder` that has this number."""
    changes, replace, unlink = itertools.count(), os.replace, Path.unlink

    def count():
        if next(changes) == number:
            raise KeyboardInterrupt

    def counted_replace(source, target):
        count()
        replace(source, target)

    def counted_unlink(path, *args, **kwargs):
        if path.parent == folder:
            count()
        unlink(path, *args, **kwargs)

    monkeypatch.setattr(os, "replace", counted_replace)
    monkeypatch.setattr(Path, "unlink", counted_unlink)


class TestSaving:
    @pytest.mark.parametrize("what", ["first", "second"])
    def test_a_save_that_is_killed_leaves_the_checkpoint_as_it_was(self, checkpoint, tmp_path, what):
        folder = tmp_path / "model"
        shutil.copytree(checkpoint, folder)
        before = {file.name: file.read_bytes() for file in folder.iterdir()}
        run = subprocess.run([sys.executable, "-c", SAVE_AND_DIE, str(folder), what], check=False)
        assert run.returncode == -9
        assert {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()} == before
        load(HoliTomLlavaOnevisionForConditionalGeneration, folder)

    def saves(self, model, checkpoint) -> dict:
        """Ways to save something else over a checkpoint."""
        other = HoliTomLlavaOnevisionForConditionalGeneration(copy.deepcopy(model.config))
        other.config.holitom_config.retention_ratio = 0.77
        small = copy.deepcopy(other)
        small.config.holitom_config.base_model_name_or_path = str(checkpoint)
        processor = HoliTomProcessor.from_pretrained(checkpoint)
        processor.video_processor.num_frames = 3
        return {
            "model": other.save_pretrained,
            "shards": functools.partial(other.save_pretrained, max_shard_size="40KB"),
            "config_only": functools.partial(small.save_pretrained, config_only=True),
            "processor": processor.save_pretrained,
            "video_processor": processor.video_processor.save_pretrained,
        }

    def loaders(self):
        return (
            HoliTomLlavaOnevisionForConditionalGeneration.from_pretrained,
            HoliTomProcessor.from_pretrained,
            LlavaOnevisionForConditionalGeneration.from_pretrained,
        )

    @pytest.mark.parametrize("who", ["model", "shards", "config_only", "processor", "video_processor"])
    def test_a_folder_is_the_old_or_the_new_or_refused_wherever_its_renaming_stops(
        self, model, checkpoint, tmp_path, monkeypatch, who
    ):
        """At every step that changes a folder: renaming into it, renaming out of it, removing from it."""
        self.saves(model, checkpoint)[who](tmp_path / "fresh")
        shutil.copytree(checkpoint, tmp_path / "old")
        for file in (tmp_path / "old").glob("*.py"):  # of an earlier version
            file.write_text("old")

        def save(folder):
            with written_aside(folder) as aside:
                shutil.copytree(tmp_path / "fresh", aside, dirs_exist_ok=True)

        shutil.copytree(tmp_path / "old", tmp_path / "new")
        save(tmp_path / "new")
        old, new = content(tmp_path / "old"), content(tmp_path / "new")
        assert old != new
        num_refused = 0
        for stop in itertools.count():
            folder = tmp_path / f"folder-{stop}"
            shutil.copytree(tmp_path / "old", folder)
            with monkeypatch.context() as patched:
                stop_at(patched, folder, stop)
                try:
                    save(folder)
                    break
                except KeyboardInterrupt:
                    pass
            if content(folder) in (old, new):
                continue
            num_refused += 1
            for load_any in self.loaders():
                with pytest.raises(OSError, match=r"config\.json"):
                    load_any(folder)
            assert list(folder.glob(".saving.*"))
            save(folder)
            # Not even then is a model whose code was changed the old one, nor the new.
            is_model = (tmp_path / "fresh" / "config.json").exists()
            assert content(folder) == new | ({} if is_model else {"config.json": BROKEN_OFF.encode()})
        assert num_refused > 3
        assert content(folder) == new
        assert not list(folder.glob(".*"))

    def test_a_processor_whose_save_is_broken_off_leaves_the_model(self, model, checkpoint, tmp_path, monkeypatch):
        shutil.copytree(checkpoint, tmp_path / "folder")
        with monkeypatch.context() as patched:
            stop_at(patched, tmp_path / "folder", 5)
            with pytest.raises(KeyboardInterrupt):
                self.saves(model, checkpoint)["processor"](tmp_path / "folder")
        load(HoliTomLlavaOnevisionForConditionalGeneration, tmp_path / "folder")
        with pytest.raises(OSError, match=r"processor_config\.json"):
            HoliTomProcessor.from_pretrained(tmp_path / "folder")

    @pytest.mark.parametrize("who", ["model", "config_only"])
    def test_a_save_that_is_broken_off_says_so(self, model, checkpoint, tmp_path, monkeypatch, who):
        folder = tmp_path / "folder"
        shutil.copytree(checkpoint, folder)
        save = self.saves(model, checkpoint)[who]
        with monkeypatch.context() as patched:
            stop_at(patched, folder, 5)
            with pytest.raises(KeyboardInterrupt):
                save(folder)
        with pytest.raises(ValueError, match=r"must hold one JSON object \(a save into it was broken off: save again"):
            hub_options(str(folder))
        assert "broken off" in (folder / "config.json").read_text()
        for load_any in self.loaders():
            with pytest.raises(OSError, match=r"config\.json"):
                load_any(folder)

    def test_an_error_before_all_is_written_leaves_a_folder_as_it_was(self, checkpoint, tmp_path, monkeypatch):
        shutil.copytree(checkpoint, tmp_path / "folder")
        processor = HoliTomProcessor.from_pretrained(checkpoint)
        processor.video_processor.num_frames = 3
        monkeypatch.setattr(processor.tokenizer, "save_pretrained", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            processor.save_pretrained(tmp_path / "folder")
        assert content(tmp_path / "folder") == content(checkpoint)
        assert not list((tmp_path / "folder").glob(".*"))

    def test_a_processor_says_what_it_wrote(self, checkpoint, tmp_path):
        processor = HoliTomProcessor.from_pretrained(checkpoint)
        assert processor.save_pretrained(tmp_path / "a") == [str(tmp_path / "a" / "processor_config.json")]

    def test_whole_weights_replace_shards_and_shards_replace_them(self, model, tmp_path):
        other = HoliTomLlavaOnevisionForConditionalGeneration(model.config)
        (tmp_path / "notes.txt").write_text("mine")
        for size, saved in (("40KB", model), ("1GB", other), ("40KB", model)):
            saved.save_pretrained(tmp_path, max_shard_size=size)
            loaded = load(HoliTomLlavaOnevisionForConditionalGeneration, tmp_path).state_dict()
            assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.state_dict().items())
            assert (tmp_path / "model.safetensors").exists() == (size == "1GB")
            assert (tmp_path / "model.safetensors.index.json").exists() == (size == "40KB")
        assert (tmp_path / "notes.txt").read_text() == "mine"
        assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]

    def test_a_file_is_no_folder(self, model, tmp_path):
        (tmp_path / "file").write_text("mine")
        with pytest.raises(ValueError, match="file is a file; save_pretrained needs a folder"):
            model.save_pretrained(tmp_path / "file")
        assert (tmp_path / "file").read_text() == "mine"


class TestLocalBase:
    """A config-only checkpoint whose base is a folder of this machine."""

    def small(self, upstream, tmp_path, monkeypatch, caplog) -> Path:
        (tmp_path / "secret").mkdir()
        upstream.save_pretrained(tmp_path / "secret" / "base")
        monkeypatch.chdir(tmp_path / "secret")
        model = HoliTomLlavaOnevisionForConditionalGeneration.from_pretrained(
            "base", holitom_config={"inner_merge_layer": 2}
        )
        monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
        model.save_pretrained(tmp_path / "small", config_only=True)
        self.model = model
        return tmp_path / "small"

    def test_its_path_is_absolute_and_a_warning_says_who_can_load_it(self, upstream, tmp_path, monkeypatch, caplog):
        folder = self.small(upstream, tmp_path, monkeypatch, caplog)
        [record] = [r for r in caplog.records if "takes its weights from" in r.message]
        assert record.levelname == "WARNING"
        assert str(tmp_path / "secret" / "base") in record.message
        monkeypatch.chdir(tmp_path)
        loaded = load(HoliTomLlavaOnevisionForConditionalGeneration, folder, holitom_config={"retention_ratio": 0.4})
        assert loaded.config.holitom_config.base_model_name_or_path == str(tmp_path / "secret" / "base")
        config = HoliTomLlavaOnevisionConfig.from_pretrained(folder, holitom_config={"retention_ratio": 0.4})
        assert config.holitom_config.base_model_name_or_path == str(tmp_path / "secret" / "base")

    def test_the_path_stays_out_of_the_model_card_and_such_a_push_is_refused(
        self, upstream, tmp_path, monkeypatch, caplog
    ):
        folder = self.small(upstream, tmp_path, monkeypatch, caplog)
        card = (folder / "README.md").read_text()
        assert "secret" not in card
        assert "base_model:" not in card
        assert "holds no weights" in card
        assert "loads as the plain" not in card
        for card in (model_card(self.model.config, False), model_card(self.model.config, True)):
            assert "secret" not in card
            assert str(tmp_path) not in card
        with pytest.raises(ValueError, match="nobody else could load user/small: its base model is a folder"):
            self.model.push_to_hub("user/small", config_only=True)

    def test_a_model_that_transformers_does_not_know_is_not_said_to_load_without_trust(self):
        card = model_card(HoliTomLlavaVideoConfig(), False)
        assert card.startswith("---")
        assert "# LLaVA-Video with HoliTom" in card
        assert "transformers has no class of this model itself" in card
        assert "loads as the plain" not in card

    def test_the_card_has_a_section_of_savings_only_where_they_are_known(self):
        for name, is_known in (("tiny", True), ("qwen3-vl-small", False), ("qwen3.5-moe-small", False)):
            card = model_card(architecture(name), True)
            assert ("## Savings" in card) == ("| frames | tokens |" in card) == is_known
            assert "\n\n## Settings\n\n| setting" in card
            assert "\n\n\n" not in card

    def test_a_whole_checkpoint_says_that_it_loads_without_trust(self, model):
        card = model_card(model.config, False)
        assert "loads as the plain, uncompressed model" in card
        assert "holds no weights" not in card
