"""
The shortest way to an answer: load, ask, and see what was saved.

    python examples/quickstart.py [VIDEO] [MODEL]

Without a video it draws one, without a model it takes the small one that comes with the package. For real videos:

    python examples/quickstart.py holiday.mp4 llava-hf/llava-onevision-qwen2-7b-ov-hf
"""

import sys
import tempfile
from pathlib import Path

from holitom_hf import HoliTomLlavaOnevisionForConditionalGeneration, HoliTomProcessor
from holitom_hf.apps.demo import write_clip
from holitom_hf.bundled import BUNDLED_MODEL


def main(video: str | None = None, name: str = str(BUNDLED_MODEL)) -> None:
    question = "What happens in the video?"
    if video is None:
        video = str(Path(tempfile.mkdtemp()) / "clip.mp4")
        question = write_clip(Path(video))[1].text

    model = HoliTomLlavaOnevisionForConditionalGeneration.from_pretrained(name, dtype="auto", device_map="auto")
    processor = HoliTomProcessor.from_pretrained(name)
    model.config.holitom_config.retention_ratio = 0.15

    content = [{"type": "video"}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=prompt, videos=video, return_tensors="pt").to(model.device, model.dtype)
    output = model.generate(**inputs, max_new_tokens=64, return_dict_in_generate=True)

    answer = processor.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"{question} {answer.strip()}")
    [[merged]] = output.merged_videos
    print(f"{merged.num_input_tokens} video tokens in {len(merged.segments)} segments became {merged.num_tokens}.")


if __name__ == "__main__":
    main(*sys.argv[1:])
