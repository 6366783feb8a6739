"""Checkpoints in the format of LLaVA's authors, made from random ones by naming weights the other way round."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Tokenizer,
    SiglipConfig,
    SiglipModel,
)
from typer.testing import CliRunner

from holitom_hf import (
    HoliTomLlavaOnevisionConfig,
    HoliTomLlavaOnevisionForConditionalGeneration,
    HoliTomLlavaVideoConfig,
    HoliTomLlavaVideoForConditionalGeneration,
    HoliTomLlavaVideoProcessor,
    HoliTomProcessor,
)
from holitom_hf.apps.command_line.app import app
from holitom_hf.models.original.configuration import converted_config
from holitom_hf.models.registry import backbone_of

from ..conftest import IDENTITY


SIDE = 28
VOCABULARY = 151_680
# Of lmms-lab/llava-onevision-qwen2-7b-ov and lmms-lab/LLaVA-Video-7B-Qwen2: what their config.json say, as facts.
ONEVISION_7B = {
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
    "model_type": "llava_qwen",
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
# As it is remembered, like the one above: neither was compared with the Hub.
VIDEO_7B = ONEVISION_7B | {
    "add_faster_video": False,
    "add_time_instruction": True,
    "faster_token_stride": 10,
    "force_sample": True,
    "mm_newline_position": "grid",
    "mm_spatial_pool_mode": "average",
    "mm_spatial_pool_stride": 2,
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
    config = HoliTomLlavaVideoConfig.from_dict(converted_config(VIDEO_7B))
    assert config.layout.num_tokens(64) == 64 * 182
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

    @pytest.mark.parametrize("damage", ["a shard is not there", "a file is cut off"])
    def test_half_a_download_is_one_line(self, tower, tmp_path, damage):
        original = Original(tmp_path / "original", tower).write(shards=2)
        shard = original.folder / "model-00002-of-00002.safetensors"
        if damage == "a shard is not there":
            shard.unlink()
        else:
            shard.write_bytes(shard.read_bytes()[:5000])
        result = convert(original, tmp_path / "out")
        assert result.exit_code == 1
        assert len(result.stderr.strip().splitlines()) <= 2
        assert "Traceback" not in result.stderr
        assert not (tmp_path / "out").exists()

    def test_other_commands_say_what_to_do_first(self, tower, tmp_path):
        original = Original(tmp_path / "original", tower)
        with pytest.raises(ValueError, match=r"`holitom-hf convert .*original FOLDER` first"):
            backbone_of(str(original.folder))
        result = convert(original, tmp_path / "out", "--config-only")
        assert result.exit_code == 1
        assert "is not in transformers' format" in result.stderr

    def test_another_tokenizer_is_told(self, tower, tmp_path):
        original = Original(tmp_path / "original", tower).write()
        from holitom_hf.bundled.tiny_model import tiny_tokenizer

        for file in original.folder.glob("*token*"):
            file.unlink()
        tiny_tokenizer().save_pretrained(original.folder)
        result = convert(original, tmp_path / "out")
        assert result.exit_code == 1
        assert "it is not the one that Qwen2's checkpoints have" in result.stderr
