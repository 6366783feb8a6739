"""A short clip and a small model, made in place, so that everything can be tried without a download."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
import typer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlavaOnevisionImageProcessorPil, Qwen2Tokenizer

from .configuration_holitom import HoliTomConfig, HoliTomLlavaOnevisionConfig
from .modeling_holitom import HoliTomLlavaOnevisionForConditionalGeneration
from .processing_holitom import HoliTomProcessor, HoliTomVideoProcessor


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
CORPUS = [
    "What happens in the video? A red square moves to the right, then a blue circle stays in the middle.",
    "How many objects are there? Two. Which colour is the circle? Blue. What comes first? The green triangle.",
    "user assistant system yes no left right up down before after red green blue yellow one two three four five",
]


def write_clip(path: Path, num_frames: int = 64, side: int = 224, fps: int = 16) -> None:
    """
    Writes a H.264 clip of three scenes: still textured backgrounds, and on each a square that moves.

    Args:
        path: File to write.
        num_frames: Length.
        side: Width and height in pixels.
        fps: Frames per second.
    """
    random = np.random.default_rng(0)
    scenes = [random.integers(0, 256, (side // 16, side // 16, 3)).repeat(16, 0).repeat(16, 1) for _ in range(3)]
    colours = [(220, 40, 40), (40, 200, 60), (50, 80, 230)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "20"})
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        for index in range(num_frames):
            scene = index * len(scenes) // num_frames
            picture = scenes[scene].astype(np.uint8)
            size, step = side // 5, index * len(scenes) % num_frames / num_frames
            left, top = int(step * (side - size)), side // 2 - size // 2
            picture[top : top + size, left : left + size] = colours[scene]
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def small_tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer of some hundred tokens with Qwen2's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return Qwen2Tokenizer(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>", "video_token": "<video>"},
    )


def small_processor(side: int = 112, patch: int = 8) -> HoliTomProcessor:
    """The processor of [`small_model`]."""
    size = {"height": side, "width": side}
    return HoliTomProcessor(
        LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=[[side, side]]),
        small_tokenizer(),
        HoliTomVideoProcessor(size=size),
        num_image_tokens=(side // patch) ** 2,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )


def small_model(
    tokenizer: Qwen2Tokenizer, side: int = 112, patch: int = 8, holitom_config: HoliTomConfig | None = None
) -> HoliTomLlavaOnevisionForConditionalGeneration:
    """A LLaVA-OneVision of 1 M random parameters: 49 tokens a frame, 8 decoder layers."""
    config = HoliTomLlavaOnevisionConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": side,
            "patch_size": patch,
            "vision_use_head": False,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(tokenizer),
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_hidden_layers": 8,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 8192,
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


def main(folder: Path) -> None:
    """Writes clip.mp4 and a small model with random weights into FOLDER."""
    folder.mkdir(parents=True, exist_ok=True)
    write_clip(folder / "clip.mp4")
    processor = small_processor()
    processor.save_pretrained(folder / "model")
    small_model(processor.tokenizer).save_pretrained(folder / "model")
    print(f"Wrote {folder / 'clip.mp4'} and {folder / 'model'}.")
    print("The model's weights are random: its answer shows that everything runs, and means nothing.")


if __name__ == "__main__":
    typer.run(main)
