"""The architecture of the bundled model: LLaVA-OneVision at small size, its tokenizer and its processor."""

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlavaOnevisionImageProcessorPil, Qwen2Tokenizer

from ..configuration import HoliTomConfig
from ..models.llava_onevision.configuration import HoliTomLlavaOnevisionConfig
from ..models.llava_onevision.modeling import HoliTomLlavaOnevisionForConditionalGeneration
from ..models.llava_onevision.processing import HoliTomProcessor, HoliTomVideoProcessor
from .questions import NUM_FRAMES, vocabulary_texts


# Qwen2's conversation format, as llava-onevision checkpoints have it: pictures first, then the text.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} "
    "{% if message['content'] is string %}{{ '\\n' + message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% endif %}"
    "{% if part['type'] == 'video' %}<video>{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ '\\n' + part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"]


def tiny_tokenizer(special_tokens=SPECIAL_TOKENS, texts: tuple[str, ...] = (), **names: str) -> Qwen2Tokenizer:
    """
    A byte-level BPE tokenizer of some hundred tokens with Qwen2's special tokens.

    Args:
        special_tokens: Which.
        texts: To learn more tokens from than those of the questions.
        names: The special tokens of media, by the names that processors have for them.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*vocabulary_texts(), "user assistant system", *texts], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special_tokens])
    return Qwen2Tokenizer(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        extra_special_tokens=names or {"image_token": "<image>", "video_token": "<video>"},
    )


def tiny_processor(side: int = 112, patch: int = 8, num_frames: int = NUM_FRAMES) -> HoliTomProcessor:
    """The processor of [`tiny_model`], which takes 16 frames of a video."""
    size = {"height": side, "width": side}
    return HoliTomProcessor(
        LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=[[side, side]]),
        tiny_tokenizer(),
        HoliTomVideoProcessor(size=size, num_frames=num_frames),
        num_image_tokens=(side // patch) ** 2,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )


def tiny_model(
    tokenizer: Qwen2Tokenizer, side: int = 112, patch: int = 8, holitom_config: HoliTomConfig | None = None
) -> HoliTomLlavaOnevisionForConditionalGeneration:
    """A LLaVA-OneVision of 2 M random parameters: 49 tokens a frame, 8 decoder layers."""
    config = HoliTomLlavaOnevisionConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": side,
            "patch_size": patch,
            "vision_use_head": False,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 8192,
            "initializer_range": 0.05,
            # Qwen2's. With 10,000 only a quarter of a head's dimensions can compare contents over 800 tokens.
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        image_token_index=tokenizer.image_token_id,
        video_token_index=tokenizer.video_token_id,
        image_grid_pinpoints=[[side, side]],
        holitom_config=holitom_config or HoliTomConfig(inner_merge_layer=5),
    )
    torch.manual_seed(0)
    model = HoliTomLlavaOnevisionForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model
