"""Qwen3-VL at small size, its tokenizer and its processor: trained on drawn clips beside the bundled model."""

import torch
from transformers import Qwen2Tokenizer, Qwen2VLImageProcessorPil

from ..configuration import HoliTomConfig
from ..models.qwen3_vl.configuration import HoliTomQwen3VLConfig
from ..models.qwen3_vl.modeling import HoliTomQwen3VLForConditionalGeneration
from ..models.qwen3_vl.processing import HoliTomQwen3VLProcessor, HoliTomQwen3VLVideoProcessor
from .questions import NUM_FRAMES
from .tiny_model import tiny_tokenizer


# Qwen's conversation format: pictures and text as they come.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}"
    "{% if part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% endif %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IMAGE, VIDEO, VISION_START, VISION_END = "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", VISION_START, VISION_END, IMAGE, VIDEO]
SIDE, PATCH, MERGE = 112, 8, 2


def tiny_qwen3_vl_tokenizer() -> Qwen2Tokenizer:
    """As the bundled model's, with Qwen3-VL's special tokens and the words for a frame's time."""
    return tiny_tokenizer(SPECIAL_TOKENS, ("<0.5 seconds>", "<12.5 seconds>"), image_token=IMAGE, video_token=VIDEO)


def tiny_qwen3_vl_processor() -> HoliTomQwen3VLProcessor:
    """The processor of [`tiny_qwen3_vl`]: 16 frames of a video, of at most 112 x 112 pixels."""
    sizes = {"patch_size": PATCH, "merge_size": MERGE}
    return HoliTomQwen3VLProcessor(
        Qwen2VLImageProcessorPil(
            **sizes,
            size={"shortest_edge": (PATCH * MERGE) ** 2, "longest_edge": SIDE**2},
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        ),
        tiny_qwen3_vl_tokenizer(),
        HoliTomQwen3VLVideoProcessor(
            **sizes,
            size={"shortest_edge": (PATCH * MERGE) ** 2, "longest_edge": 2 * NUM_FRAMES * SIDE**2},
            cap_pixels_per_frame=True,
            max_video_tokens=(SIDE // PATCH // MERGE) ** 2,
            num_frames=NUM_FRAMES,
            fps=None,
        ),
        chat_template=CHAT_TEMPLATE,
    )


def tiny_qwen3_vl(
    tokenizer: Qwen2Tokenizer, holitom_config: HoliTomConfig | None = None
) -> HoliTomQwen3VLForConditionalGeneration:
    """
    A Qwen3-VL of 2.9 M random parameters: 49 tokens for two frames, DeepStack's features of one layer, 8 decoder
    layers.
    """
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(token)
        for name, token in (
            ("image", IMAGE),
            ("video", VIDEO),
            ("vision_start", VISION_START),
            ("vision_end", VISION_END),
        )
    }
    config = HoliTomQwen3VLConfig(
        vision_config={
            "depth": 4,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_heads": 4,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "out_hidden_size": 128,
            "num_position_embeddings": (SIDE // PATCH) ** 2,
            "deepstack_visual_indexes": [1],
        },
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 8192,
            "initializer_range": 0.05,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        tie_word_embeddings=False,
        holitom_config=holitom_config or HoliTomConfig(inner_merge_layer=5),
        **ids,
    )
    torch.manual_seed(0)
    model = HoliTomQwen3VLForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model
