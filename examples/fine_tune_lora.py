"""
Fine-tunes under compression: a LoRA on the decoder learns to read the shortened sequence, with peft and Trainer as for
any other model. On drawn clips it wins back what compression costs the bundled model most, motion and changes.

    python examples/fine_tune_lora.py [--steps 150] [--retention-ratio 0.15] [--out my-lora]
"""

import argparse
import itertools

import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments, logging

from holitom_hf import HoliTomLlavaOnevisionForConditionalGeneration, HoliTomProcessor
from holitom_hf.bundled import BUNDLED_MODEL
from holitom_hf.bundled.questions import DrawnVideoQuestions


TYPES = ("motion", "change", "count")


def questions(split: str, number: int, seed: int) -> list[dict]:
    """Drawn questions of the hard types."""
    drawn = DrawnVideoQuestions(20 * number, split=split, seed=seed)
    return list(itertools.islice((question for question in drawn if question["type"] in TYPES), number))


class Collator:
    """Prompts, videos and labels of a batch; only the answers are learned."""

    def __init__(self, processor: HoliTomProcessor):
        self.processor = processor
        self.processor.tokenizer.padding_side = "left"

    def prompt(self, question: dict) -> str:
        content = [{"type": "video"}, {"type": "text", "text": question["question"]}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def inputs(self, batch: list[dict], texts: list[str]) -> dict:
        videos = [torch.from_numpy(question["video"]).permute(0, 3, 1, 2) for question in batch]
        return self.processor(text=texts, videos=videos, padding=True, return_tensors="pt")

    def __call__(self, batch: list[dict]) -> dict:
        answers = [question["answer"] + "<|im_end|>" for question in batch]
        inputs = self.inputs(batch, [self.prompt(question) + answer for question, answer in zip(batch, answers)])
        inputs["labels"] = torch.full_like(inputs["input_ids"], -100)
        for row, answer in enumerate(answers):
            length = len(self.processor.tokenizer(answer)["input_ids"])
            inputs["labels"][row, -length:] = inputs["input_ids"][row, -length:]
        return inputs


@torch.inference_mode()
def accuracy(model, collator: Collator, asked: list[dict], batch_size: int = 8) -> float:
    """Share of right answers."""
    model.eval()
    right = 0
    for start in range(0, len(asked), batch_size):
        batch = asked[start : start + batch_size]
        inputs = collator.inputs(batch, [collator.prompt(question) for question in batch]).to(model.device)
        output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        texts = collator.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(text.strip() == question["answer"] for text, question in zip(texts, batch))
    return right / len(asked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--num-tested", type=int, default=100)
    parser.add_argument("--retention-ratio", type=float, default=0.15)
    parser.add_argument("--out", default="my-lora")
    options = parser.parse_args()
    logging.set_verbosity_error()

    processor = HoliTomProcessor.from_pretrained(BUNDLED_MODEL)
    model = HoliTomLlavaOnevisionForConditionalGeneration.from_pretrained(BUNDLED_MODEL, dtype=torch.float32)
    model.config.holitom_config.retention_ratio = options.retention_ratio
    collator = Collator(processor)
    tested = questions("test", options.num_tested, seed=100)
    before = accuracy(model, collator, tested)
    print(f"before: {before:.0%} of {len(tested)} questions about {', '.join(TYPES)}", flush=True)

    modules = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    lora = get_peft_model(model, LoraConfig(r=32, lora_alpha=64, target_modules=modules))
    arguments = TrainingArguments(
        output_dir=options.out,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=min(10, options.steps),
        logging_steps=25,
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
    )
    learned = questions("train", max(options.batch_size, min(1000, options.steps * options.batch_size)), seed=1)
    Trainer(lora, arguments, train_dataset=learned, data_collator=collator).train()
    lora.save_pretrained(options.out)
    print(f"after:  {accuracy(lora, collator, tested):.0%}; the adapter is in {options.out}")


if __name__ == "__main__":
    main()
