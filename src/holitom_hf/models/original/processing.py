"""The processor of checkpoints that LLaVA's authors published, which have a tokenizer alone."""

from tokenizers import AddedToken
from transformers import AutoTokenizer, LlavaOnevisionImageProcessor

from ...checkpoints.checkpoint import HUB_KWARGS
from ..registry import backbone_class
from .configuration import IMAGE_TOKEN_ID, VIDEO_TOKEN_ID


# Qwen2's conversations. Media stand before the text, each on a line, as in transformers' conversion of such
# checkpoints. Where there is no system message, there is the one of the authors' template "qwen_1_5".
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for kind in ('image', 'video') %}{% for part in message['content'] if part['type'] == kind %}"
    "{{ '<' + kind + '>\n' }}{% endfor %}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def original_processor(processor_class: type, checkpoint: str, **kwargs):
    """
    A processor of ours for an original checkpoint: its tokenizer, and what its model takes of pictures.

    Args:
        processor_class: Of the backbone.
        checkpoint: Folder or Hub repository.
        kwargs: Where and how to download, and for the tokenizer.

    Raises:
        OSError: If there is no tokenizer.
        ValueError: If the tokenizer gives the tokens of media other numbers than the model's, or the checkpoint is not
            of that backbone.
    """
    hub = {name: kwargs[name] for name in (*HUB_KWARGS, "revision", "subfolder") if name in kwargs}
    config = backbone_class(processor_class.backbone, "config").from_pretrained(checkpoint, **hub)
    kwargs = {name: value for name, value in kwargs.items() if name not in ("_from_auto", "trust_remote_code")}
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, config=config, **kwargs)
    except (OSError, ValueError) as error:
        raise OSError(f"{checkpoint} has no tokenizer that can be read: {error}") from error
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
