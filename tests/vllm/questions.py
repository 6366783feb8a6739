"""Questions about drawn clips as both sides of the comparison ask them: frames in memory, and the whole prompt."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from holitom_hf.bundled.questions import NUM_FRAMES, draw_set, uniform_times


SIDE = 112  # of the frames of both models
SMALL_QWEN = Path(__file__).parents[2] / "examples" / "small_qwen3_vl"
PROMPT = "<|im_start|>user {video}\n{question}<|im_end|><|im_start|>assistant\n"
QWEN_PROMPT = (
    "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
)
# What our transformers classes do as an engine does it.
ENGINE = {"exact_budget": True, "inner_method": "none"}
RATIOS = (1.0, 0.15, 0.05)
QWEN_RATIOS = (1.0, 0.25)
# Options of `holitom-hf batch`, whose frames are not those of the file then.
BATCHES = {
    "llava_onevision": [],
    "qwen3_vl": ["--model", str(SMALL_QWEN), "--fps", "2", "--max-pixels", "60000"],
}
# Models with random weights, see random_models.py, and what vLLM computes in: of linear attention its CPU build has
# nothing but bfloat16, so that the same without it stands beside.
RANDOM_MODELS = {
    "qwen3_vl_moe": "float32",
    "qwen3_5": "bfloat16",
    "qwen3_5_attention": "float32",
    "qwen3_5_moe": "bfloat16",
    "qwen3_5_moe_attention": "float32",
}
RANDOM_RATIOS = (1.0, 0.25, 0.05)
REUSE = {"retention_ratio": 0.15, "vision_reuse_layer": 1, "vision_reuse_threshold": 0.98}


@dataclass
class MixedPrompt:
    """
    A prompt of the small Qwen3-VL that shows several things.

    Attributes:
        text: The prompt.
        videos: Frames (F, H, W, 3) of each, uint8.
        images: (H, W, 3) of each, uint8.
    """

    text: str
    videos: list[np.ndarray]
    images: list[np.ndarray]


def prompt_of(question: str, num_videos: int = 1) -> str:
    """As the bundled model's chat template writes it."""
    return PROMPT.format(video="<video>" * num_videos, question=question)


def drawn_questions(number: int) -> Iterator[tuple[np.ndarray, str, str]]:
    """Frames (F, H, W, 3) of uint8, the question, and its right answer."""
    for clip, questions in draw_set(number):
        frames = clip.render(uniform_times(clip.num_frames or NUM_FRAMES), SIDE)
        for question in questions:
            yield frames, question.text, question.answer


def questions_about_clips(number: int) -> Iterator[tuple[np.ndarray, str, str]]:
    """As [`drawn_questions`], each about a clip of its own."""
    for clip, (question, *_) in islice(draw_set(6 * number), number):
        yield clip.render(uniform_times(clip.num_frames or NUM_FRAMES), SIDE), question.text, question.answer


def drawn_pixels() -> list[np.ndarray]:
    """Of two clips, the second one shorter, pixels (F, C, H, W) for a tower."""
    first, *_, second = (frames for frames, _, _ in drawn_questions(9))
    return [video.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1 for video in (first, second[:11])]


def metadata_of(frames: np.ndarray) -> dict:
    """Of frames that are all of a video, two a second, which is what Qwen3-VL's times are told from."""
    number = len(frames)
    return {"fps": 2.0, "total_num_frames": number, "duration": number / 2, "frames_indices": list(range(number))}


def mixed_prompts() -> Iterator[MixedPrompt]:
    """Two videos, of other lengths and sides, and images before, between and behind videos."""
    (first, question, _), (second, _, _) = list(drawn_questions(8))[::7]
    shown = {"v": first, "w": second[:7, :80], "i": second[3, :, :64], "j": first[5, 32:]}
    for order in ("vw", "wv", "iv", "vi", "viw", "jwiv"):
        kinds = ["video" if name in "vw" else "image" for name in order]
        marks = "".join(f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in kinds)
        text = QWEN_PROMPT.replace("<|vision_start|><|video_pad|><|vision_end|>", marks).format(question=question)
        yield MixedPrompt(text, *([shown[name] for name in order if name in names] for names in ("vw", "ij")))
