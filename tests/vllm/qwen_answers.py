"""Of the small Qwen3-VL: what both sides are asked, and what our transformers class answers (see transformers_answers)."""

from pathlib import Path

SMALL_QWEN = Path(__file__).parents[2] / "examples" / "small_qwen3_vl"
PROMPT = (
    "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
)
