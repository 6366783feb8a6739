"""
What our transformers class answers, written to a file: in an environment of its own, since vLLM pins another release.

    python -m tests.vllm.transformers_answers FILE [--questions 200]
"""

import argparse
import json
from pathlib import Path

import torch

from holitom_hf import HoliTomConfig, HoliTomLlavaOnevisionForConditionalGeneration, HoliTomProcessor
from holitom_hf.bundled import BUNDLED_MODEL

from .questions import drawn_questions, prompt_of


ENGINE = {"exact_budget": True, "inner_method": "none"}
RATIOS = (1.0, 0.15, 0.05)


def main() -> None:
    """Writes for each ratio the answers' tokens, and how far the best token of each step was from the second."""
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("--questions", type=int, default=200)
    args = parser.parse_args()
    model = HoliTomLlavaOnevisionForConditionalGeneration.from_pretrained(BUNDLED_MODEL, dtype=torch.float32).eval()
    processor = HoliTomProcessor.from_pretrained(BUNDLED_MODEL)
    answers = {}
    for ratio in RATIOS:
        settings = HoliTomConfig(retention_ratio=ratio, **ENGINE)
        answers[ratio] = []
        for frames, question, _ in drawn_questions(args.questions):
            inputs = processor(text=prompt_of(question), videos=[frames], return_tensors="pt")
            out = model.generate(
                **inputs,
                holitom_config=settings,
                max_new_tokens=8,
                do_sample=False,
                output_scores=True,
                return_dict_in_generate=True,
            )
            best = [scores[0].topk(2).values for scores in out.scores]
            answers[ratio].append(
                {
                    "ids": out.sequences[0, inputs["input_ids"].shape[1] :].tolist(),
                    "margins": [float(first - second) for first, second in best],
                }
            )
    args.file.write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
