"""Training over compressed videos: checkpointing, LoRA with Trainer, saving what was learned."""

import copy
from functools import partial

import peft
import pytest
import torch
from transformers import Trainer, TrainingArguments


ANSWERS = [7, 31]


def examples(subject) -> list[dict]:
    """Two prompts with videos, and a token to answer with for each."""
    return [
        {
            "prompt": torch.cat([subject.prompt(3, 4, 4, seed=40), torch.tensor([answer])]),
            "video": subject.video(4, seed),
        }
        for answer, seed in zip(ANSWERS, (41, 42))
    ]


def collate(subject, rows) -> dict:
    inputs = subject.inputs([row["prompt"] for row in rows], [row["video"] for row in rows])
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -1] = inputs["input_ids"][:, -1]
    return inputs | {"labels": labels}


def gradients(model, inputs) -> tuple[torch.Tensor, dict]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(subject, use_reentrant):
    trained = copy.deepcopy(subject.model).train()
    inputs = collate(subject, examples(subject))
    loss, plain = gradients(trained, inputs)
    trained.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    checkpointed_loss, checkpointed = gradients(trained, inputs)
    assert torch.equal(loss, checkpointed_loss)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(gradient, checkpointed[name])


def test_the_loss_of_a_batch_is_over_the_text_of_all_rows(subject):
    rows = examples(subject)
    inputs = collate(subject, rows)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == subject.config.video_token_id, -100)
    with torch.no_grad():
        loss = subject.model(**inputs | {"labels": labels}).loss
    total = torch.tensor(0.0)
    count = 0
    for row, ids in enumerate(inputs["input_ids"]):
        logits = subject.logits(ids, rows[row]["video"], subject.config.holitom_config)
        total += torch.nn.functional.cross_entropy(logits[:-1], labels[row, 1:], ignore_index=-100, reduction="sum")
        count += int((labels[row, 1:] != -100).sum())
    torch.testing.assert_close(loss, total / count, atol=1e-5, rtol=1e-5)


def test_a_lora_is_trained_with_trainer_saved_and_loaded(subject, tmp_path):
    torch.manual_seed(0)
    model = subject.model
    modules = ["q_proj", "v_proj", "up_proj", "down_proj", "lm_head"]
    modules += {
        "llava_onevision": ["linear_2"],
        "llava_video": ["linear_2"],
        "qwen2_5_vl": ["merger.mlp.2"],
        "qwen3_vl": ["linear_fc2"],
    }[subject.name]
    lora = peft.LoraConfig(r=8, lora_alpha=32, target_modules=modules)
    trained = peft.get_peft_model(copy.deepcopy(model), lora)
    arguments = TrainingArguments(
        output_dir=tmp_path / "run",
        max_steps=100,
        per_device_train_batch_size=2,
        learning_rate=5e-3,
        lr_scheduler_type="linear",
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
        gradient_checkpointing=True,
    )
    rows = examples(subject)
    trainer = Trainer(trained, arguments, train_dataset=rows * 10, data_collator=partial(collate, subject))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] / 4, (losses[0], losses[-1])
    trained.save_pretrained(tmp_path / "adapter")
    trained.eval()
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter").eval()
    for row, answer in zip(rows, ANSWERS):
        prompt = subject.inputs([row["prompt"][:-1]], [row["video"]])
        first = trained.generate(**prompt, max_new_tokens=1, do_sample=False)
        assert torch.equal(loaded.generate(**prompt, max_new_tokens=1, do_sample=False), first)
        assert int(first[0, -1]) == answer
    merged = loaded.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = type(model).from_pretrained(tmp_path / "merged").eval()
    inputs = {name: value for name, value in collate(subject, rows).items() if name != "labels"}
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, merged(**inputs).logits)
