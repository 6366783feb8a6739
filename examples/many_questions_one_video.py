"""
One video, many questions: the video is decoded, encoded and prefilled once, and every question starts from a copy of
the cache.

    python examples/many_questions_one_video.py [VIDEO MODEL "What happens?" "How many people?" ...]

Without arguments it draws a clip and asks the small model that comes with the package. Stage 3 keeps what the last
token of the shared prefix attends to, since no question is known yet.
"""

import copy
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import DynamicCache

from holitom_hf import HoliTomLlavaOnevisionForConditionalGeneration, HoliTomProcessor
from holitom_hf.apps.demo import write_clip
from holitom_hf.bundled import BUNDLED_MODEL


@torch.inference_mode()
def main(video: str, name: str, *questions: str) -> None:
    processor = HoliTomProcessor.from_pretrained(name)
    model = HoliTomLlavaOnevisionForConditionalGeneration.from_pretrained(name, dtype="auto", device_map="auto").eval()

    start = time.perf_counter()
    prefix = processor(text="<|im_start|>user <video>\n", videos=video, return_tensors="pt")
    prefix = prefix.to(model.device, model.dtype)
    cache = DynamicCache(config=model.config)
    model(**prefix, cache=cache, use_cache=True, logits_to_keep=1)
    print(f"{time.perf_counter() - start:.2f} s for the video, once")

    for question in questions:
        start = time.perf_counter()
        text = f"{question}<|im_end|><|im_start|>assistant\n"
        new = processor.tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
        ids = torch.cat([prefix["input_ids"], new], dim=1)
        output = model.generate(input_ids=ids, cache=copy.deepcopy(cache), max_new_tokens=64, do_sample=False)
        answer = processor.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        print(f"{time.perf_counter() - start:.2f} s  {question}  {answer.strip()}")


if __name__ == "__main__":
    if len(sys.argv) == 1:
        with tempfile.TemporaryDirectory() as folder:
            clip = Path(folder) / "clip.mp4"
            asked = [question.text for question in write_clip(clip)]
            main(str(clip), str(BUNDLED_MODEL), *asked)
    elif len(sys.argv) < 4:
        sys.exit(__doc__)
    else:
        main(*sys.argv[1:])
