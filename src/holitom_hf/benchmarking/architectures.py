"""The sizes of published models by name, so that speed and operations can be told without weights."""

from ..configuration import HoliTomConfig
from ..models.llava_onevision.configuration import HoliTomLlavaOnevisionConfig
from ..models.llava_video.configuration import HoliTomLlavaVideoConfig
from ..models.registry import backbone_class, backbones


# Of Qwen2 in the checkpoints llava-hf/llava-onevision-qwen2-*-ov-hf.
_DECODERS = {
    "0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 152000,
        "tie_word_embeddings": True,
    },
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152128,
    },
    "72b": {
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
    },
    # As many tokens a frame as the others, at a size that a CPU runs in seconds.
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 2048,
    },
}
_SIGLIP = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
_TINY_SIGLIP = _SIGLIP | {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
ARCHITECTURES = tuple(_DECODERS)
# Of lmms-lab/LLaVA-Video-7B-Qwen2, pooled as its authors evaluate it, and the one above at that layout.
_LLAVA_VIDEO = {"llava-video-7b": ("7b", {"vocab_size": 152064}), "llava-video-small": ("tiny", {})}
LLAVA_VIDEO_ARCHITECTURES = tuple(_LLAVA_VIDEO)
# Parts of the Qwen-VL families below. The small ones are of a size that a CPU runs in seconds, with patches and
# windows as they are.
_SMALL_QWEN = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
}
# The tower of Qwen3-VL-8B, which the later ones have, too.
_QWEN3_TOWER = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "patch_size": 16,
}
_SMALL_QWEN3_TOWER = {
    "depth": 4,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_heads": 4,
    "patch_size": 16,
    "out_hidden_size": 256,
}
_SMALL_QWEN3 = _SMALL_QWEN | {
    "head_dim": 64,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 5e6,
        "mrope_section": [12, 10, 10],
        "mrope_interleaved": True,
    },
}
_SMALL_QWEN3_5 = _SMALL_QWEN | {
    "head_dim": 64,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e7,
        "partial_rotary_factor": 0.25,
        "mrope_section": [3, 3, 2],
        "mrope_interleaved": True,
    },
}
_SMALL_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
# `model_type`, vision tower, decoder: of Qwen/Qwen2.5-VL-7B-Instruct, Qwen/Qwen3-VL-8B-Instruct,
# Qwen/Qwen3-VL-30B-A3B-Instruct, Qwen/Qwen3.5-9B and Qwen/Qwen3.5-35B-A3B, and one small model of each family.
_QWEN = {
    "qwen2.5-vl-7b": (
        "qwen2_5_vl",
        {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "patch_size": 14,
            "out_hidden_size": 3584,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
    ),
    "qwen3-vl-8b": (
        "qwen3_vl",
        _QWEN3_TOWER | {"out_hidden_size": 4096, "deepstack_visual_indexes": [8, 16, 24]},
        {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
        },
    ),
    "qwen2.5-vl-small": (
        "qwen2_5_vl",
        {
            "depth": 4,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_heads": 4,
            "patch_size": 14,
            "out_hidden_size": 256,
            "window_size": 112,
            "fullatt_block_indexes": [1, 3],
        },
        _SMALL_QWEN | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}},
    ),
    "qwen3-vl-small": (
        "qwen3_vl",
        _SMALL_QWEN3_TOWER | {"deepstack_visual_indexes": [0, 1, 2]},
        _SMALL_QWEN3,
    ),
    "qwen3-vl-30b-a3b": (
        "qwen3_vl_moe",
        _QWEN3_TOWER | {"out_hidden_size": 2048, "deepstack_visual_indexes": [8, 16, 24]},
        {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "vocab_size": 151936,
            "tie_word_embeddings": False,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
        },
    ),
    "qwen3-vl-moe-small": (
        "qwen3_vl_moe",
        _SMALL_QWEN3_TOWER | {"deepstack_visual_indexes": [0, 1, 2]},
        _SMALL_QWEN3 | _SMALL_EXPERTS,
    ),
    "qwen3.5-9b": (
        "qwen3_5",
        _QWEN3_TOWER | {"out_hidden_size": 4096},
        {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "vocab_size": 248320,
        },
    ),
    "qwen3.5-small": ("qwen3_5", _SMALL_QWEN3_TOWER, _SMALL_QWEN3_5),
    "qwen3.5-35b-a3b": (
        "qwen3_5_moe",
        _QWEN3_TOWER | {"out_hidden_size": 2048},
        {
            "hidden_size": 2048,
            "num_hidden_layers": 40,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "head_dim": 256,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "num_experts": 256,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
            "vocab_size": 248320,
        },
    ),
    "qwen3.5-moe-small": (
        "qwen3_5_moe",
        _SMALL_QWEN3_TOWER,
        {name: value for name, value in _SMALL_QWEN3_5.items() if name != "intermediate_size"}
        | _SMALL_EXPERTS
        | {"shared_expert_intermediate_size": 256},
    ),
}
QWEN_ARCHITECTURES = tuple(_QWEN)


def qwen_architecture(name: str, settings: HoliTomConfig | None = None):
    """
    The config of a Qwen-VL model at one of its sizes.

    Args:
        name: One of `QWEN_ARCHITECTURES`.
        settings: Compression settings; default: the paper's, stage 3 at 18 of 28 layers' depth, or at the layer next
            to it that follows one of full attention.
    """
    model_type, vision, text = _QWEN[name]
    # No token ends an answer, and those of vision are the last ones of any vocabulary.
    text = text | dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    names = ("vision_start", "vision_end", "image", "video")
    ids = {f"{name}_token_id": text["vocab_size"] - 4 + number for number, name in enumerate(names)}
    config = backbone_class(backbones()[model_type], "config")(vision_config=vision, text_config=text, **ids)
    types = getattr(config.text_config, "layer_types", None) or ["full_attention"] * text["num_hidden_layers"]
    allowed = [layer + 1 for layer, kind in enumerate(types[:-1]) if kind == "full_attention"]
    middle = min(allowed, key=lambda layer: abs(layer - 18 / 28 * len(types)))
    config.holitom_config = settings or HoliTomConfig(inner_merge_layer=middle)
    return config


def architecture(name: str, settings: HoliTomConfig | None = None):
    """
    The config of a model at one of its sizes.

    Args:
        name: One of `ARCHITECTURES`, those of LLaVA-OneVision, `LLAVA_VIDEO_ARCHITECTURES` or `QWEN_ARCHITECTURES`.
        settings: Compression settings; default: the paper's, stage 3 at 18 of 28 layers' depth.

    Raises:
        ValueError: If there is no such name.
    """
    if name in _QWEN:
        return qwen_architecture(name, settings)
    known = ARCHITECTURES + QWEN_ARCHITECTURES + LLAVA_VIDEO_ARCHITECTURES
    if name not in known:
        raise ValueError(f"there is no architecture {name!r}: choose one of {', '.join(known)}")
    config_class = HoliTomLlavaVideoConfig if name in _LLAVA_VIDEO else HoliTomLlavaOnevisionConfig
    name, own = _LLAVA_VIDEO.get(name, (name, {}))
    decoder = _DECODERS[name] | own
    tied = decoder.pop("tie_word_embeddings", False)
    layers, vocabulary = decoder["num_hidden_layers"], decoder["vocab_size"]
    return config_class(
        vision_config={
            "model_type": "siglip_vision_model",
            "vision_use_head": False,
            **(_TINY_SIGLIP if name == "tiny" else _SIGLIP),
        },
        text_config={
            "model_type": "qwen2",
            "max_position_embeddings": 2**18,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "tie_word_embeddings": tied,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
            **decoder,
        },
        tie_word_embeddings=tied,
        image_token_index=vocabulary - 2,
        video_token_index=vocabulary - 1,
        holitom_config=settings or HoliTomConfig(inner_merge_layer=round(18 / 28 * layers)),
    )


def usual_frames(config) -> int:
    """How many frames a backbone's published results have."""
    return 64 if config.model_type == "llava_video" else 32
