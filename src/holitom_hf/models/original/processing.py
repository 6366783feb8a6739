"""The processor of checkpoints that LLaVA's authors published, which have a tokenizer alone."""

from tokenizers import AddedToken
from transformers import AutoTokenizer, LlavaOnevisionImageProcessor

from .configuration import IMAGE_TOKEN_ID, VIDEO_TOKEN_ID


# Qwen2's conversations with media before the text, as the authors' template "qwen_1_5" has them.
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% set ns = namespace(has_media=false) %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% set ns.has_media = true %}{% endif %}"
    "{% if part['type'] == 'video' %}<video>{% set ns.has_media = true %}{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}"
    "{{ ('\n' if ns.has_media else '') + part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def original_processor(processor_class: type, checkpoint: str, config, **kwargs):
    """
    A processor of ours for an original checkpoint: its tokenizer, and what its model takes of pictures.

    Args:
        processor_class: Of the backbone.
        checkpoint: Folder or Hub repository.
        config: Ours, from [`converted_config`].
        kwargs: Where and how to download.

    Raises:
        ValueError: If the tokenizer gives the tokens of media other numbers than the model's.
    """
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, **kwargs)
    tokens = ["<image>", "<video>"]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens], special_tokens=True)
    tokenizer.padding_side = "left"  # prompts of a batch end together
    found = tokenizer.convert_tokens_to_ids(tokens)
    if found != [config.image_token_id, config.video_token_id]:
        raise ValueError(
            f"the tokenizer of {checkpoint} has <image> and <video> at {found[0]} and {found[1]}, not at "
            f"{IMAGE_TOKEN_ID} and {VIDEO_TOKEN_ID}: it is not the one that Qwen2's checkpoints have"
        )
    vision = config.vision_config
    pictures = {
        "size": {"height": vision.image_size, "width": vision.image_size},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    layout = {
        name: getattr(config, name)
        for name in ("spatial_pool_mode", "spatial_pool_stride", "newline_layout")
        if hasattr(config, name)
    }
    return processor_class(
        LlavaOnevisionImageProcessor(**pictures, image_grid_pinpoints=config.image_grid_pinpoints),
        tokenizer,
        processor_class.own_video_processor(**pictures),
        num_image_tokens=(vision.image_size // vision.patch_size) ** 2,
        vision_feature_select_strategy="full",
        chat_template=tokenizer.chat_template if _takes_media(tokenizer.chat_template) else CHAT_TEMPLATE,
        vision_aspect_ratio=config.vision_aspect_ratio,
        **layout,
    )


def _takes_media(template: str | None) -> bool:
    return bool(template) and "<video>" in template
