"""Small models of the Qwen families that have no trained one here: weights drawn with a seed. Without vLLM."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

import holitom_hf
from holitom_hf import HoliTomConfig

from .questions import ENGINE, SMALL_QWEN


# The tokenizer and the processor are the small Qwen3-VL's, and so are sizes that these depend on.
IDS = {"image_token_id": 534, "video_token_id": 535, "vision_start_token_id": 532, "vision_end_token_id": 533}
VISION = {
    "depth": 3,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 4,
    "patch_size": 8,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 196,
    "initializer_range": 0.1,
}
ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
TEXT = {
    "vocab_size": 536,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 8192,
    "initializer_range": 0.1,
    "rope_parameters": ROPE,
    "bos_token_id": None,
    "eos_token_id": 531,
    "pad_token_id": 529,
    "tie_word_embeddings": False,
}
# As published configurations have it; vLLM's kernel takes multiples of 32.
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "norm_topk_prob": True}
SHARED_EXPERT = {"shared_expert_intermediate_size": 96}
HYBRID = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "mtp_num_hidden_layers": 1,
    "rope_parameters": ROPE | {"partial_rotary_factor": 0.5, "mrope_section": [4, 2, 2]},
}
# In place of linear attention, of which vLLM's CPU build has bfloat16 alone.
ATTENTION = {"layer_types": ["full_attention"] * 4}
DEEPSTACK = {"deepstack_visual_indexes": [1]}
NO_DEEPSTACK = {"deepstack_visual_indexes": []}  # as published configurations say it
# By name the family, as its classes are called, and the configurations of the two halves.
MODELS = {
    "qwen3_vl_moe": ("Qwen3VLMoe", VISION | DEEPSTACK, TEXT | EXPERTS | {"mlp_only_layers": [1]}),
    "qwen3_5": ("Qwen3_5", VISION, TEXT | HYBRID),
    "qwen3_5_attention": ("Qwen3_5", VISION, TEXT | HYBRID | ATTENTION),
    "qwen3_5_moe": ("Qwen3_5Moe", VISION, TEXT | HYBRID | EXPERTS | SHARED_EXPERT),
    "qwen3_5_moe_attention": (
        "Qwen3_5Moe",
        VISION | NO_DEEPSTACK,
        TEXT | HYBRID | EXPERTS | SHARED_EXPERT | ATTENTION,
    ),
}
# This one is written as published: experts together, which transformers saves one by one, and a part that predicts
# further tokens.
PUBLISHED = "qwen3_5_moe_attention"


@torch.no_grad()
def write_random_model(name: str, folder: Path, dtype: torch.dtype):
    """Saves one of [`MODELS`] with a tokenizer and a processor, and returns it, which computes in float32."""
    family, vision, text = MODELS[name]
    config = getattr(holitom_hf, f"HoliTom{family}Config")(
        vision_config=vision,
        text_config=text,
        holitom_config=HoliTomConfig(**ENGINE),
        tie_word_embeddings=False,
        **IDS,
    )
    torch.manual_seed(0)
    model = getattr(holitom_hf, f"HoliTom{family}ForConditionalGeneration")(config).eval()
    model.generation_config.eos_token_id = text["eos_token_id"]
    model.generation_config.pad_token_id = text["pad_token_id"]
    for parameter in model.parameters():
        if parameter.ndim == 1:  # one or zero so far
            parameter.add_(0.2 * torch.randn_like(parameter))
    # Few tokens to choose from are far from each other, as far as rounding goes.
    model.lm_head.weight[::40] *= 4
    shutil.rmtree(folder, ignore_errors=True)
    model.to(dtype).save_pretrained(folder)
    if name == PUBLISHED:
        further = {"mtp.fc.weight": torch.zeros(text["hidden_size"], 2 * text["hidden_size"])}
        save_file(model.state_dict() | further, folder / "model.safetensors", metadata={"format": "pt"})
    for file in ("processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(SMALL_QWEN / file, folder)
    return model.float()
