"""Checkpoints in the format of LLaVA's authors, made from random ones by naming weights the other way round."""

import gc
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Tokenizer,
    SiglipConfig,
    SiglipModel,
    pipeline,
)
from typer.testing import CliRunner

from holitom_hf import (
    HoliTomLlavaOnevisionConfig,
    HoliTomLlavaOnevisionForConditionalGeneration,
    HoliTomLlavaOnevisionModel,
    HoliTomLlavaVideoConfig,
    HoliTomLlavaVideoForConditionalGeneration,
    HoliTomLlavaVideoProcessor,
    HoliTomProcessor,
)
from holitom_hf.apps.command_line.app import app
from holitom_hf.apps.demo import write_clip
from holitom_hf.models.original import converting
from holitom_hf.models.original.configuration import converted_config
from holitom_hf.models.registry import backbone_class

from ..conftest import IDENTITY
from ..hub import LoopbackHub, Repository


SIDE = 28
VOCABULARY = 151_680
# What config.json of lmms-lab/llava-onevision-qwen2-7b-ov says, as facts: every field and value was compared with the
# copy in PaddleMIX's test of its LLaVA, which names that file as its source.
ONEVISION_7B = {
    "_name_or_path": "lmms-lab/llava-onevision-qwen2-7b-ov",
    "architectures": ["LlavaQwenForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "image_aspect_ratio": "anyres_max_9",
    "image_crop_resolution": None,
    "image_grid_pinpoints": [[384 * w, 384 * h] for w in range(1, 7) for h in range(1, 7)],
    "image_split_resolution": None,
    "image_token_index": 151646,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "mm_hidden_size": 1152,
    "mm_newline_position": "one_token",
    "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_lr": None,
    "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None,
    "mm_spatial_pool_mode": "bilinear",
    "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "google/siglip-so400m-patch14-384",
    "mm_vision_tower_lr": 2e-06,
    "model_type": "llava",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "pos_skipping_range": 4096,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "tokenizer_model_max_length": 32768,
    "tokenizer_padding_side": "right",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0.dev0",
    "use_cache": True,
    "use_mm_proj": True,
    "use_pos_skipping": False,
    "use_sliding_window": False,
    "vision_tower_pretrained": None,
    "vocab_size": 152064,
}
# Of lmms-lab/LLaVA-Video-7B-Qwen2. Seen in the config.json of nkkbr/ViCA-ScanNet-80p, which was trained from it: the
# first five. Remembered, and compared with nothing: the pooling and the newlines.
VIDEO_7B = ONEVISION_7B | {
    "add_faster_video": False,
    "add_time_instruction": True,
    "faster_token_stride": 10,
    "force_sample": True,
    "ignore_index": -100,
    "mm_newline_position": "grid",
    "mm_spatial_pool_mode": "average",
    "mm_spatial_pool_stride": 2,
}
# Seen at the head of lmms-lab/LLaVA-Video-7B-Qwen2-Video-Only's, beside fields as above.
VIDEO_ONLY = {
    "delay_load": False,
    "freeze_mm_mlp_adapter": False,
    "freeze_mm_vision_resampler": False,
    "image_crop_resolution": 224,
}


def test_the_published_onevision_is_what_transformers_calls_so():
    config = HoliTomLlavaOnevisionConfig.from_dict(converted_config(ONEVISION_7B))
    default = LlavaOnevisionConfig()
    assert config.image_grid_pinpoints == default.image_grid_pinpoints
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size"):
        assert getattr(config.vision_config, name) == getattr(default.vision_config, name)
    text = config.text_config
    assert (text.hidden_size, text.num_hidden_layers, text.num_key_value_heads, text.vocab_size) == (
        3584,
        28,
        4,
        152064,
    )
    assert text.rope_parameters["rope_theta"] == 1e6
    assert (config.image_token_id, config.video_token_id) == (151646, 151647)
    assert config.tokens_per_frame == 196
    assert not config.tie_word_embeddings
    assert config.dtype in (torch.bfloat16, "bfloat16")


def test_the_published_llava_video_has_its_grid():
    config = HoliTomLlavaVideoConfig.from_dict(converted_config(VIDEO_7B | VIDEO_ONLY))
    assert config.layout.num_tokens(64) == 64 * 182
    no_stride = converted_config(VIDEO_7B | {"mm_spatial_pool_stride": None})
    assert HoliTomLlavaVideoConfig.from_dict(no_stride).layout == config.layout
    bilinear = HoliTomLlavaVideoConfig.from_dict(converted_config(VIDEO_7B | {"mm_spatial_pool_mode": "bilinear"}))
    assert bilinear.layout.num_tokens(64) == 64 * 210


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"add_faster_video": True}, "add_faster_video=True"),
        ({"mm_newline_position": "frame"}, "mm_newline_position='frame'"),
        ({"mm_spatial_pool_mode": "nearest"}, "mm_spatial_pool_mode='nearest'"),
        ({"mm_patch_merge_type": "flat"}, "mm_patch_merge_type='flat'"),
        ({"mm_projector_type": "linear", "mm_vision_select_layer": -1}, "'linear', mm_vision_select_layer=-1"),
        ({"image_aspect_ratio": "pad"}, "image_aspect_ratio='pad'"),
        ({"mm_new_idea": 3}, "mm_new_idea"),
    ],
)
def test_what_is_not_known_is_named_and_never_ignored(changed, named):
    with pytest.raises(ValueError, match=f"fields that are not supported: .*{named}"):
        converted_config(VIDEO_7B | changed)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """As long as Qwen2's, so that what is added gets the numbers that it gets there."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(letters)}
    vocabulary |= {f"{number} ": number for number in range(len(letters), 151_643)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return Qwen2Tokenizer(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def original_name(name: str) -> str:
    """What the authors' files call a weight of transformers' module."""
    for ours, theirs in (
        ("model.vision_tower.", "model.vision_tower.vision_tower.vision_model."),
        ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
        ("model.language_model.", "model."),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    assert name in ("model.image_newline", "lm_head.weight"), name
    return name


class Original:
    """An original checkpoint in a folder, and the upstream model that its weights are from."""

    def __init__(self, folder, tower, **changed):
        self.folder = folder
        self.values = ONEVISION_7B | {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_window_layers": 3,
            "vocab_size": VOCABULARY,
            "mm_vision_tower": str(tower),
            "image_grid_pinpoints": [[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE]],
            "torch_dtype": "float32",
            **changed,
        }
        converted = converted_config(self.values) | {"model_type": "llava_onevision"}
        torch.manual_seed(0)
        self.upstream = LlavaOnevisionForConditionalGeneration(LlavaOnevisionConfig(**converted)).eval()
        self.tensors = {original_name(n): t.clone() for n, t in self.upstream.state_dict().items()}
        if self.values["tie_word_embeddings"]:
            del self.tensors["lm_head.weight"]
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(self.values))
        qwen_tokenizer().save_pretrained(folder)

    def write(self, shards: int = 1, without: str | None = None):
        tensors = {n: t for n, t in self.tensors.items() if without is None or without not in n}
        names, weight_map = sorted(tensors), {}
        for number in range(shards):
            file = "model.safetensors" if shards == 1 else f"model-{number + 1:05}-of-{shards:05}.safetensors"
            save_file({name: tensors[name] for name in names[number::shards]}, self.folder / file, {"format": "pt"})
            weight_map |= dict.fromkeys(names[number::shards], file)
        if shards > 1:
            index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return self


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    """A SigLIP of four layers with a head and a text model, as Google's is."""
    folder = tmp_path_factory.mktemp("siglip")
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    vision |= {"image_size": SIDE, "patch_size": 4}
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"vocab_size": 50, "projection_size": 32}
    torch.manual_seed(1)
    SiglipModel(SiglipConfig(vision_config=vision, text_config=text)).save_pretrained(folder)
    return folder


NO_INNER = ("--preset", "llava-onevision-7b-r10-no-inner")  # there are three layers


def convert(original: Original, out, *options: str):
    options = (*NO_INNER, *options)
    return CliRunner(env={"COLUMNS": "300"}).invoke(app, ["convert", str(original.folder), str(out), *options])


def converted(original: Original, out, *options: str):
    result = convert(original, out, *options)
    assert result.exit_code == 0, result.stdout + result.stderr
    return result


def same_weights(model, upstream) -> bool:
    expected = upstream.state_dict()
    return all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


NO_STAGE_3 = {"inner_merge_layer": None}
VIDEO_LAYOUT = {"mm_newline_position": "grid", "mm_spatial_pool_mode": "average", "mm_spatial_pool_stride": 2}


def is_clean(report) -> bool:
    return not (report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"])


class TestAsItIs:
    """`from_pretrained` of the original itself."""

    @torch.no_grad()
    @pytest.mark.parametrize(("shards", "model_type"), [(1, "llava"), (3, "llava_qwen")])
    def test_a_onevision_is_upstreams_to_the_bit(self, tower, tmp_path, shards, model_type):
        original = Original(tmp_path / "original", tower, model_type=model_type).write(shards)
        model, report = HoliTomLlavaOnevisionForConditionalGeneration.from_pretrained(
            original.folder, holitom_config=NO_STAGE_3, output_loading_info=True, device_map={"": "cpu"}
        )
        assert is_clean(report)
        assert same_weights(model, original.upstream)
        processor = HoliTomProcessor.from_pretrained(original.folder)
        assert [processor.image_token_id, processor.video_token_id] == [151646, 151647]
        frames = torch.randint(0, 256, (3, 3, 40, 40), dtype=torch.uint8)
        inputs = processor(text="Now <video> what?", videos=[frames], return_tensors="pt")
        expected = original.upstream(**inputs).logits
        assert torch.equal(model(**inputs, holitom_config=IDENTITY).logits, expected)
        assert model(**inputs, holitom_config={"retention_ratio": 0.2}).merged_videos[0][0].num_tokens < 48

        # Saved, it has the names that transformers knows.
        model.save_pretrained(tmp_path / "saved")
        plain, report = LlavaOnevisionForConditionalGeneration.from_pretrained(
            tmp_path / "saved", output_loading_info=True
        )
        assert is_clean(report)
        assert torch.equal(plain(**inputs).logits, expected)

    def test_without_a_head_it_is_the_same_model(self, tower, tmp_path):
        original = Original(tmp_path / "original", tower).write()
        model, report = HoliTomLlavaOnevisionModel.from_pretrained(
            original.folder, holitom_config=NO_STAGE_3, output_loading_info=True
        )
        assert is_clean(report)
        assert same_weights(model, original.upstream.model)

    def test_tied_weights_stay_tied_and_the_dtype_can_be_chosen(self, tower, tmp_path):
        original = Original(tmp_path / "original", tower, tie_word_embeddings=True, torch_dtype="bfloat16").write()
        load = HoliTomLlavaOnevisionForConditionalGeneration.from_pretrained
        model, report = load(original.folder, holitom_config=NO_STAGE_3, output_loading_info=True)
        assert is_clean(report)
        assert model.dtype == torch.bfloat16
        assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
        model = load(original.folder, holitom_config=NO_STAGE_3, dtype=torch.float32)
        assert same_weights(model, original.upstream)

    def test_a_llava_video_takes_a_missing_tower_from_where_it_names_and_says_so(self, tower, tmp_path, caplog):
        original = Original(tmp_path / "original", tower, **VIDEO_LAYOUT).write(without="vision_tower")
        model, report = HoliTomLlavaVideoForConditionalGeneration.from_pretrained(
            original.folder, holitom_config=NO_STAGE_3, output_loading_info=True
        )
        assert is_clean(report)
        assert f"has no weights of its vision tower: they are taken from {tower}" in caplog.text
        source = SiglipModel.from_pretrained(tower).vision_model.state_dict()
        for name, tensor in model.model.vision_tower.state_dict().items():
            assert torch.equal(tensor, source[name]), name
        assert torch.equal(model.lm_head.weight, original.upstream.lm_head.weight)
        assert HoliTomLlavaVideoProcessor.from_pretrained(original.folder).layout == model.config.layout

    def test_a_class_of_another_layout_says_whose_it_is(self, tower, tmp_path):
        original = Original(tmp_path / "original", tower, **VIDEO_LAYOUT).write()
        with pytest.raises(ValueError, match=r"needs a 'llava_onevision' checkpoint .* this one is 'llava_video'"):
            HoliTomLlavaOnevisionForConditionalGeneration.from_pretrained(original.folder)
        with pytest.raises(ValueError, match=r"a 'llava_video' checkpoint .*: use HoliTomLlavaVideoProcessor$"):
            HoliTomProcessor.from_pretrained(original.folder)

    @pytest.mark.parametrize("layout", [{}, VIDEO_LAYOUT])
    def test_auto_classes_take_the_type_of_the_authors_code(self, tower, tmp_path, layout):
        folder = Original(tmp_path / "original", tower, model_type="llava_qwen", **layout).write().folder
        config = AutoConfig.from_pretrained(folder)
        assert type(config) is (HoliTomLlavaVideoConfig if layout else HoliTomLlavaOnevisionConfig)
        for auto, role in ((AutoModelForImageTextToText, "generation"), (AutoModel, "model")):
            model = auto.from_pretrained(folder, holitom_config=NO_STAGE_3)
            assert type(model) is backbone_class(config.backbone, role)
        processor = AutoProcessor.from_pretrained(folder)
        assert type(processor) is backbone_class(config.backbone, "processor")
        pipe = pipeline("video-text-to-text", model=str(folder), model_kwargs={"holitom_config": NO_STAGE_3})
        assert type(pipe.model) is backbone_class(config.backbone, "generation")

    def test_the_command_line_answers_with_it(self, tower, tmp_path):
        original = Original(tmp_path / "original", tower, **VIDEO_LAYOUT).write()
        write_clip(tmp_path / "clip.mp4", num_frames=8, side=48)
        arguments = ["answer", str(tmp_path / "clip.mp4"), "What?", "--model", str(original.folder), *NO_INNER]
        result = CliRunner().invoke(
            app, [*arguments, "--frames", "4", "--max-new-tokens", "2", "--json", "--device", "cpu"]
        )
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)["visual_tokens_before"] == 4 * 12

    @torch.no_grad()
    def test_settings_without_weights_take_theirs_from_it(self, tower, tmp_path):
        original = Original(tmp_path / "original", tower).write()
        converted(original, tmp_path / "small", "--config-only")
        model = HoliTomLlavaOnevisionForConditionalGeneration.from_pretrained(tmp_path / "small")
        assert same_weights(model, original.upstream)
        assert model.config.holitom_config.retention_ratio == 0.1
        assert HoliTomProcessor.from_pretrained(tmp_path / "small").video_token_id == 151647

        # The code that it carries does not read it, and says so.
        code = (
            "import sys\nsys.modules['holitom_hf'] = None\n"
            "from transformers import AutoModelForImageTextToText\n"
            "AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)"
        )
        environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
        command = [sys.executable, "-c", code, str(tmp_path / "small")]
        result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert result.stderr.strip().splitlines()[-1] == (
            "ImportError: 'models.original.configuration' reads checkpoints of LLaVA's authors, not carried: "
            "pip install holitom-hf"
        )

    @pytest.mark.parametrize(
        ("damage", "named"),
        [
            ("no shard", "model-00002-of-00002.safetensors"),
            ("half a shard", "a .safetensors file is cut off or damaged .*: download or copy it again"),
            ("no index", "model.safetensors"),
            ("no weights of a layer", "are missing or of another shape: model.language_model.layers.1.mlp.up_proj"),
            ("more weights", "have no place in the model: model.faster_token"),
            ("no tokenizer", "has no tokenizer that can be read"),
        ],
    )
    def test_what_is_broken_is_one_line(self, tower, tmp_path, damage, named):
        original = Original(tmp_path / "original", tower)
        if damage == "more weights":
            original.tensors["model.faster_token"] = torch.zeros(32)
        original.write(shards=2, without="layers.1.mlp.up_proj" if "of a layer" in damage else None)
        shard = original.folder / "model-00002-of-00002.safetensors"
        if damage == "no shard":
            shard.unlink()
        elif damage == "half a shard":
            shard.write_bytes(shard.read_bytes()[:5000])
        elif damage == "no index":
            (original.folder / "model.safetensors.index.json").unlink()
        elif damage == "no tokenizer":
            for file in original.folder.glob("*token*"):
                file.unlink()
        cls = HoliTomProcessor if damage == "no tokenizer" else HoliTomLlavaOnevisionForConditionalGeneration
        options = {} if damage == "no tokenizer" else {"holitom_config": NO_STAGE_3}
        with pytest.raises(OSError, match=named):
            cls.from_pretrained(original.folder, **options)
        result = convert(original, tmp_path / "out")
        assert result.exit_code == 1
        assert re.search(named, result.stderr)
        assert result.stderr.startswith("error: ")
        assert len(result.stderr.strip().splitlines()) == 1
        assert not (tmp_path / "out").exists()


FROM_THE_HUB = """
import json, torch
from holitom_hf import HoliTomLlavaOnevisionForConditionalGeneration, HoliTomProcessor

model, report = HoliTomLlavaOnevisionForConditionalGeneration.from_pretrained(
    "lmms-lab/tiny", holitom_config={"inner_merge_layer": None}, output_loading_info=True
)
processor = HoliTomProcessor.from_pretrained("lmms-lab/tiny")
inputs = processor(text="<video>", videos=[torch.zeros(2, 3, 28, 28)], return_tensors="pt")
torch.save({"inputs": dict(inputs), "weights": model.state_dict()}, "loaded.pt")
print("REPORT" + json.dumps([len(names) for names in report.values() if isinstance(names, set)]))
"""


def test_an_original_comes_from_the_hub_and_its_tower_from_another_repository(tower, tmp_path):
    original = Original(tmp_path / "original", tower).write(shards=2, without="vision_tower")
    (original.folder / "config.json").write_text(
        json.dumps(original.values | {"mm_vision_tower": "google/siglip-tiny"})
    )
    with LoopbackHub() as hub:
        for name, folder in (("lmms-lab/tiny", original.folder), ("google/siglip-tiny", tower)):
            hub.repositories[name] = Repository(
                snapshots=[{file.name: file.read_bytes() for file in folder.iterdir()}]
            )
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        result = subprocess.run(
            [sys.executable, "-c", FROM_THE_HUB],
            capture_output=True,
            text=True,
            env=environment,
            cwd=tmp_path,
            check=False,
        )
    assert result.returncode == 0, result.stderr[-3000:]
    assert set(json.loads(result.stdout.split("REPORT")[1])) == {0}
    assert "lmms-lab/tiny has no weights of its vision tower: they are taken from google/siglip-tiny" in result.stderr
    loaded = torch.load(tmp_path / "loaded.pt")
    expected = {name: tensor for name, tensor in original.upstream.state_dict().items() if "vision_tower" not in name}
    source = SiglipModel.from_pretrained(tower).vision_model.state_dict()
    for name, tensor in loaded["weights"].items():
        in_tower = name.removeprefix("model.vision_tower.")
        assert torch.equal(tensor, source[in_tower] if in_tower != name else expected[name]), name
    assert int((loaded["inputs"]["input_ids"] == 151647).sum()) == 2 * 16 + 1


def test_the_chat_template_is_the_authors_with_media_first(tower, tmp_path):
    """Of transformers' conversion: media on lines of their own before all text. Of the authors: the system message."""
    processor = HoliTomProcessor.from_pretrained(Original(tmp_path / "original", tower).folder)
    media = [{"type": "text", "text": "Which"}, {"type": "video"}, {"type": "image"}, {"type": "image"}]
    chat = [
        {"role": "user", "content": [*media, {"type": "text", "text": " is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "That."}]},
        {"role": "user", "content": "Why?"},
    ]
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    turns = (
        "<|im_start|>user\n<image>\n<image>\n<video>\nWhich is it?<|im_end|>\n"
        "<|im_start|>assistant\nThat.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
    )
    assert processor.apply_chat_template(chat) == system + turns
    own = [{"role": "system", "content": "Be short."}, *chat]
    assert processor.apply_chat_template(own, add_generation_prompt=True) == (
        "<|im_start|>system\nBe short.<|im_end|>\n" + turns + "<|im_start|>assistant\n"
    )


def test_a_checkpoints_own_template_is_kept_if_it_knows_media(tower, tmp_path):
    original = Original(tmp_path / "original", tower)
    for template, is_kept in (("{{ '<video>' }}!", True), ("{{ 'text alone' }}", False)):
        (original.folder / "chat_template.jinja").write_text(template)
        assert (HoliTomProcessor.from_pretrained(original.folder).chat_template == template) == is_kept


def test_converting_holds_one_file_of_weights_at_a_time(tower, tmp_path, monkeypatch):
    original = Original(tmp_path / "original", tower).write()
    largest = max(tensor.nbytes for tensor in original.tensors.values())
    total = sum(tensor.nbytes for tensor in original.tensors.values())
    limit = largest + 100_000  # the embedding, the head, and some small ones with each

    def alive() -> int:
        found = {
            t.data_ptr(): t.nbytes
            for t in gc.get_objects()
            if type(t) in (torch.Tensor, torch.nn.Parameter) and not t.is_meta
        }
        return sum(found.values())

    gc.collect()
    before, held = alive(), []

    def watched(tensors, file, **options):
        gc.collect()
        held.append(alive() - before)
        save_file(tensors, file, **options)

    monkeypatch.setattr(converting, "save_file", watched)
    monkeypatch.setattr(converting, "MAX_SHARD_SIZE", limit)
    converted(original, tmp_path / "out")
    assert len(held) > 1
    assert max(held) <= limit + largest < total
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) == len(held)
    tensors = {}
    for file in (tmp_path / "out").glob("model-*.safetensors"):
        tensors |= load_file(file)
    assert tensors.keys() == original.upstream.state_dict().keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in original.upstream.state_dict().items())
    _, report = LlavaOnevisionForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert is_clean(report)


def test_a_head_that_is_tied_and_another_is_refused_and_one_that_repeats_is_left_out(tower, tmp_path):
    original = Original(tmp_path / "original", tower, tie_word_embeddings=True)
    original.tensors["lm_head.weight"] = original.tensors["model.embed_tokens.weight"].clone()
    converted(original.write(), tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    original.tensors["lm_head.weight"] += 1
    result = convert(original.write(), tmp_path / "other")
    assert result.exit_code == 1
    assert "has tie_word_embeddings=True, and another lm_head.weight" in result.stderr


@torch.no_grad()
def test_a_onevision_sharded_loads_as_ours_and_as_upstreams_to_the_bit(tower, tmp_path):
    original = Original(tmp_path / "original", tower).write(shards=3)
    converted(original, tmp_path / "out", "--retention-ratio", "0.2")
    model, report = HoliTomLlavaOnevisionForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert same_weights(model, original.upstream)
    assert model.config.holitom_config.retention_ratio == 0.2
    plain, report = LlavaOnevisionForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    processor = HoliTomProcessor.from_pretrained(tmp_path / "out")
    assert [processor.image_token_id, processor.video_token_id] == [151646, 151647]
    content = [{"type": "video"}, {"type": "text", "text": "What?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert prompt == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<video>\nWhat?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    frames = torch.randint(0, 256, (3, 3, 40, 40), dtype=torch.uint8)
    inputs = processor(text=prompt, videos=[frames], return_tensors="pt")
    expected = original.upstream(**inputs).logits
    assert torch.equal(model(**inputs, holitom_config=IDENTITY).logits, expected)
    assert torch.equal(plain(**inputs).logits, expected)
    assert model(**inputs).merged_videos[0][0].num_tokens < 48
    again = tmp_path / "again"
    model.save_pretrained(again)
    assert same_weights(HoliTomLlavaOnevisionForConditionalGeneration.from_pretrained(again), original.upstream)


def test_tied_weights_stay_tied_and_the_dtype_is_kept(tower, tmp_path):
    original = Original(tmp_path / "original", tower, tie_word_embeddings=True, torch_dtype="bfloat16")
    original.tensors = {name: tensor.to(torch.bfloat16) for name, tensor in original.tensors.items()}
    converted(original.write(), tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert not [name for name in tensors if "lm_head" in name]
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    model = HoliTomLlavaOnevisionForConditionalGeneration.from_pretrained(
        tmp_path / "out", holitom_config={"inner_merge_layer": None}
    )
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert same_weights(model, original.upstream.to(torch.bfloat16))


def test_a_llava_video_without_its_tower_takes_it_from_where_it_names_and_says_so(
    tower, tmp_path, caplog, monkeypatch
):
    grid = {"mm_newline_position": "grid", "mm_spatial_pool_mode": "average", "mm_spatial_pool_stride": 2}
    original = Original(tmp_path / "original", tower, **grid).write(without="vision_tower")
    result = converted(original, tmp_path / "out")
    assert "a LLaVA-Video, which transformers has no class of" in result.stderr + caplog.text
    model = HoliTomLlavaVideoForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert "has no weights of its vision tower: they are taken from" in result.stderr + caplog.text
    source = SiglipModel.from_pretrained(tower).vision_model.state_dict()
    for name, tensor in model.model.vision_tower.state_dict().items():
        assert torch.equal(tensor, source[name]), name
    assert len(model.model.vision_tower.encoder.layers) == 3
    assert torch.equal(model.lm_head.weight, original.upstream.lm_head.weight)
    assert model.config.layout.newline_layout == "grid"
    assert model.config.holitom_config.newline_position == "row"
    processor = HoliTomLlavaVideoProcessor.from_pretrained(tmp_path / "out")
    ids = processor(text="<video>", videos=[torch.zeros(2, 3, SIDE, SIDE)])["input_ids"]
    assert ids[0].count(processor.video_token_id) == 2 * 12


class TestBadInput:
    def test_weights_that_are_missing_are_named(self, tower, tmp_path):
        original = Original(tmp_path / "original", tower).write(without="layers.1.mlp.down_proj")
        result = convert(original, tmp_path / "out")
        assert result.exit_code == 1
        assert "are missing or of another shape: model.language_model.layers.1.mlp.down_proj.weight" in result.stderr
        assert not (tmp_path / "out").exists()

    def test_weights_without_a_place_are_named(self, tower, tmp_path):
        original = Original(tmp_path / "original", tower)
        original.tensors["model.faster_token"] = torch.zeros(32)
        result = convert(original.write(), tmp_path / "out")
        assert result.exit_code == 1
        assert "have no place in the model: model.faster_token" in result.stderr

    def test_the_last_layer_and_the_head_of_the_tower_are_left_out(self, tower, tmp_path):
        original = Original(tmp_path / "original", tower)
        prefix = "model.vision_tower.vision_tower.vision_model."
        original.tensors |= {
            name.replace("layers.2.", "layers.3."): tensor.clone()
            for name, tensor in original.tensors.items()
            if name.startswith(prefix + "encoder.layers.2.")
        }
        original.tensors[prefix + "head.probe"] = torch.zeros(1, 1, 32)
        converted(original.write(), tmp_path / "out")

    def test_another_tokenizer_is_told(self, tower, tmp_path):
        original = Original(tmp_path / "original", tower).write()
        from holitom_hf.bundled.tiny_model import tiny_tokenizer

        for file in original.folder.glob("*token*"):
            file.unlink()
        tiny_tokenizer().save_pretrained(original.folder)
        result = convert(original, tmp_path / "out")
        assert result.exit_code == 1
        assert "it is not the one that Qwen2's checkpoints have" in result.stderr
