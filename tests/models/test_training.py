"""Training over compressed videos: checkpointing, LoRA with Trainer, saving what was learned."""

import copy

import peft
import pytest
import torch
from transformers import Trainer, TrainingArguments

from ..conftest import VIDEO_TOKEN, make_prompt, make_video, pad_batch


ANSWERS = [7, 31]


def examples() -> list[dict]:
    """Two videos, and a token to answer with for each."""
    rows = []
    for seed, answer in enumerate(ANSWERS):
        prompt = torch.cat([make_prompt(3, "video:4", 4, seed=40), torch.tensor([answer])])
        labels = torch.full_like(prompt, -100)
        labels[-1] = answer
        rows.append({"input_ids": prompt, "labels": labels, "pixel_values_videos": make_video(4, seed=41 + seed)})
    return rows


def collate(rows) -> dict:
    ids, mask = pad_batch([row["input_ids"] for row in rows])
    labels, _ = pad_batch([row["labels"] for row in rows])
    videos = torch.stack([row["pixel_values_videos"] for row in rows])
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels.masked_fill(mask == 0, -100),
        "pixel_values_videos": videos,
    }


def gradients(model, inputs) -> tuple[torch.Tensor, dict]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(model, use_reentrant):
    trained = copy.deepcopy(model).train()
    inputs = collate(examples())
    loss, plain = gradients(trained, inputs)
    trained.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    checkpointed_loss, checkpointed = gradients(trained, inputs)
    assert torch.equal(loss, checkpointed_loss)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(gradient, checkpointed[name])


def test_the_loss_of_a_batch_is_over_the_text_of_all_rows(model, plain, settings):
    inputs = collate(examples())
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == VIDEO_TOKEN, -100)
    with torch.no_grad():
        loss = model(**inputs | {"labels": labels}).loss
    total = torch.tensor(0.0)
    count = 0
    for row, ids in enumerate(inputs["input_ids"]):
        logits = plain.logits(ids, [inputs["pixel_values_videos"][row]], settings)
        total += torch.nn.functional.cross_entropy(logits[:-1], labels[row, 1:], ignore_index=-100, reduction="sum")
        count += int((labels[row, 1:] != -100).sum())
    torch.testing.assert_close(loss, total / count, atol=1e-5, rtol=1e-5)


def test_a_lora_is_trained_with_trainer_saved_and_loaded(model, tmp_path):
    torch.manual_seed(0)
    modules = ["q_proj", "v_proj", "up_proj", "down_proj", "linear_2", "lm_head"]
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
    trainer = Trainer(trained, arguments, train_dataset=examples() * 10, data_collator=collate)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] / 4, (losses[0], losses[-1])
    trained.save_pretrained(tmp_path / "adapter")
    trained.eval()
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter").eval()
    for row, answer in zip(examples(), ANSWERS):
        prompt = {"input_ids": row["input_ids"][None, :-1], "pixel_values_videos": row["pixel_values_videos"][None]}
        first = trained.generate(**prompt, max_new_tokens=1, do_sample=False)
        assert torch.equal(loaded.generate(**prompt, max_new_tokens=1, do_sample=False), first)
        assert int(first[0, -1]) == answer
    merged = loaded.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = type(model).from_pretrained(tmp_path / "merged").eval()
    inputs = {name: value for name, value in collate(examples()).items() if name != "labels"}
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, merged(**inputs).logits)
