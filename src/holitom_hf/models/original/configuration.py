"""The configuration of checkpoints that LLaVA's authors published, told in transformers' words."""

from typing import Any

from transformers import AutoConfig, Qwen2Config

from ...checkpoints.checkpoint import HUB_KWARGS


IMAGE_TOKEN_ID, VIDEO_TOKEN_ID = 151646, 151647  # of transformers' own conversions; Qwen2's table has room for them
# Of google/siglip-so400m-patch14-384, without the last of its 27 layers, which the authors' code takes away.
TOWERS = {
    "google/siglip-so400m-patch14-384": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 26,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    }
}
TEXT_FIELDS = (
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "max_window_layers",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "rms_norm_eps",
    "sliding_window",
    "tie_word_embeddings",
    "use_cache",
    "use_sliding_window",
    "vocab_size",
)
# Fields that the model depends on, and the values that are known here; the first is taken where there is none.
KNOWN = {
    "add_faster_video": (False, None),
    "mm_newline_position": ("one_token", "grid"),
    "mm_patch_merge_type": ("spatial_unpad",),
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_resampler_type": (None,),
    "mm_spatial_pool_mode": ("bilinear", "average", "max"),
    "mm_use_im_start_end": (False,),
    "mm_vision_select_feature": ("patch",),
    "mm_vision_select_layer": (-2,),
    "use_pos_skipping": (False, None),
}
# Of training, of files and of how the authors' code was called: nothing of the model follows from them.
IGNORED = {
    "_name_or_path",
    "add_time_instruction",
    "architectures",
    "delay_load",
    "dtype",
    "faster_token_stride",
    "force_sample",
    "freeze_mm_mlp_adapter",
    "freeze_mm_vision_resampler",
    "ignore_index",
    "image_crop_resolution",
    "image_split_resolution",
    "image_token_index",
    "mm_hidden_size",
    "mm_projector_lr",
    "mm_tunable_parts",
    "mm_use_im_patch_token",
    "mm_vision_tower_lr",
    "model_type",
    "pos_skipping_range",
    "tokenizer_model_max_length",
    "tokenizer_padding_side",
    "torch_dtype",
    "transformers_version",
    "tune_mm_mlp_adapter",
    "tune_mm_vision_resampler",
    "unfreeze_mm_vision_tower",
    "use_mm_proj",
    "vision_tower_pretrained",
}
OWN = {
    "image_aspect_ratio",
    "image_grid_pinpoints",
    "mm_spatial_pool_stride",
    "mm_vision_tower",
    "rope_scaling",
    "rope_theta",
}


def converted_config(values: dict[str, Any], **kwargs) -> dict[str, Any]:
    """
    The fields of a configuration of ours, as from a `config.json`.

    It is a LLaVA-OneVision if it pools and breaks lines as transformers' class does, else a LLaVA-Video.

    Args:
        values: Of the original `config.json`.
        kwargs: Of `from_pretrained`: how to download the configuration of a vision tower that is not known here.

    Raises:
        ValueError: If a field is unknown, or has a value that neither class knows; it names all of them.
    """
    found = {name: values.get(name, choices[0]) for name, choices in KNOWN.items()}
    wrong = [f"{name}={value!r}" for name, value in found.items() if value not in KNOWN[name]]
    wrong += sorted(set(values) - {*KNOWN, *IGNORED, *OWN, *TEXT_FIELDS})
    aspect_ratio = values.get("image_aspect_ratio", "anyres_max_9")
    pinpoints = values.get("image_grid_pinpoints")
    if not str(aspect_ratio).startswith("anyres_max_"):
        wrong.append(f"image_aspect_ratio={aspect_ratio!r}")
    if pinpoints is not None and not isinstance(pinpoints, list):
        wrong.append(f"image_grid_pinpoints={pinpoints!r}")
    if wrong:
        raise ValueError(f"this checkpoint of LLaVA's authors has fields that are not supported: {', '.join(wrong)}")
    if pinpoints is not None:
        sizes = [[height, width] for width, height in pinpoints]
        # transformers has the height first; a set that is the same turned round keeps its order.
        pinpoints = pinpoints if sorted(sizes) == sorted(map(list, pinpoints)) else sizes
    rope = {"rope_type": "default"} if values.get("rope_scaling") is None else dict(values["rope_scaling"])
    text = {name: values[name] for name in TEXT_FIELDS if name in values}
    tied = bool(values.get("tie_word_embeddings", False))
    converted = {
        "model_type": "llava_onevision",
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "dtype": values.get("torch_dtype", values.get("dtype")),
        "image_token_index": IMAGE_TOKEN_ID,
        "video_token_index": VIDEO_TOKEN_ID,
        "image_grid_pinpoints": pinpoints,
        "vision_aspect_ratio": aspect_ratio,
        "vision_feature_layer": -1,  # of the layers that are left
        "vision_feature_select_strategy": "full",
        "tie_word_embeddings": tied,
        "vision_config": tower_config(
            values.get("mm_vision_tower"), **{name: kwargs[name] for name in HUB_KWARGS if name in kwargs}
        ),
        "text_config": text
        | {
            "model_type": Qwen2Config.model_type,
            "tie_word_embeddings": tied,
            "rope_parameters": rope | {"rope_theta": values.get("rope_theta", 10000.0)},
        },
    }
    stride = values.get("mm_spatial_pool_stride") or 2  # what the authors' code takes, too
    if (found["mm_newline_position"], found["mm_spatial_pool_mode"], stride) != ("one_token", "bilinear", 2):
        converted |= {
            "model_type": "llava_video",
            "architectures": ["HoliTomLlavaVideoForConditionalGeneration"],
            "spatial_pool_mode": found["mm_spatial_pool_mode"],
            "spatial_pool_stride": stride,
            "newline_layout": found["mm_newline_position"],
        }
    return converted


def tower_config(name: str | None, **kwargs) -> dict[str, Any]:
    """
    The configuration of a SigLIP tower without its last layer and its head.

    Args:
        name: Folder or Hub repository.
        kwargs: Where and how to download it, if it is not known here.

    Raises:
        ValueError: If it is no SigLIP.
    """
    if name in TOWERS:
        sizes = TOWERS[name]
    else:
        config = AutoConfig.from_pretrained(str(name), **kwargs)
        vision = getattr(config, "vision_config", config)
        if vision.model_type != "siglip_vision_model":
            raise ValueError(f"mm_vision_tower={name!r} is not supported: it is a {vision.model_type!r}, no SigLIP")
        sizes = {field: getattr(vision, field) for field in next(iter(TOWERS.values()))}
        sizes["num_hidden_layers"] -= 1
    return {"model_type": "siglip_vision_model", "vision_use_head": False, **sizes}
