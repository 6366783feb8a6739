"""
What our transformers classes answer, written to a file: in an environment of its own, since vLLM pins another release.

    python -m tests.vllm.transformers_answers FILE [--questions 200]
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from holitom_hf import (
    HoliTomConfig,
    HoliTomLlavaOnevisionForConditionalGeneration,
    HoliTomProcessor,
    HoliTomQwen3VLForConditionalGeneration,
    HoliTomQwen3VLProcessor,
)
from holitom_hf.bundled import BUNDLED_MODEL
from holitom_hf.bundled.questions import write_set
from holitom_hf.merging.outer import merge_videos

from .questions import (
    BATCHES,
    ENGINE,
    QWEN_PROMPT,
    QWEN_RATIOS,
    RANDOM_MODELS,
    RANDOM_RATIOS,
    RATIOS,
    REUSE,
    SMALL_QWEN,
    drawn_pixels,
    drawn_questions,
    metadata_of,
    mixed_prompts,
    prompt_of,
    questions_about_clips,
)
from .random_models import write_random_model
from .small_qwen2_5_vl import small_qwen2_5_vl_answers


def llava_inputs(processor, frames, question):
    """Of the bundled model."""
    return processor(text=prompt_of(question), videos=[frames], return_tensors="pt")


def qwen_inputs(processor, frames, question):
    """Of the small Qwen3-VL."""
    return processor(
        text=QWEN_PROMPT.format(question=question),
        videos=[frames],
        video_metadata=[metadata_of(frames)],
        do_sample_frames=False,
        return_tensors="pt",
    )


def answers_of(
    model, processor, inputs_of, settings: HoliTomConfig, number: int, questions=drawn_questions
) -> list[dict]:
    """
    Of each question the answer's tokens, how far the best token of each step was from the second, and logarithms of
    the probabilities of the ten likeliest first ones.
    """
    answers = []
    for frames, question, _ in questions(number):
        inputs = inputs_of(processor, frames, question)
        out = model.generate(
            **inputs,
            holitom_config=settings,
            max_new_tokens=8,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
        best = [scores[0].topk(2).values for scores in out.scores]
        ids = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        values, likeliest = out.scores[0][0].log_softmax(-1).topk(10)
        answers.append(
            {
                "ids": ids,
                "margins": [float(first - second) for first, second in best],
                "first_logprobs": dict(zip(likeliest.tolist(), values.tolist())),
            }
        )
    return answers


def mixed_answers(model, processor, settings: HoliTomConfig) -> list[dict]:
    """
    Of each of [`mixed_prompts`] the answer's tokens, log-probabilities (vocabulary,) of the first one, and along three
    axes the positions of everything that the decoder gets: the compressed prompt, and the answer but for its end.
    """
    seen = []

    def see(decoder, args, kwargs):
        seen.append(kwargs["position_ids"][-3:, 0])

    hook = model.model.language_model.register_forward_pre_hook(see, with_kwargs=True)
    answers = []
    for prompt in mixed_prompts():
        inputs = processor(
            text=prompt.text,
            images=prompt.images or None,
            videos=prompt.videos,
            video_metadata=[metadata_of(frames) for frames in prompt.videos],
            do_sample_frames=False,
            return_tensors="pt",
        )
        out = model.generate(
            **inputs,
            holitom_config=settings,
            max_new_tokens=8,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
        answers.append(
            {
                "ids": out.sequences[0, inputs["input_ids"].shape[1] :].tolist(),
                "logprobs": out.scores[0][0].log_softmax(-1).tolist(),
                "positions": torch.cat(seen, 1).tolist(),
            }
        )
        seen.clear()
    hook.remove()
    return answers


@torch.no_grad()
def encoded(model, processor, settings: HoliTomConfig, number: int = 2) -> list[dict]:
    """Of each video the tokens that are left of it, in the order of their places."""
    videos = []
    for frames, question, _ in drawn_questions(number):
        inputs = qwen_inputs(processor, frames, question)
        output = model.model.get_video_features(
            inputs["pixel_values_videos"], inputs["video_grid_thw"], holitom_config=settings
        )
        (merged,), (tokens,) = merge_videos(model.model.video_tokens(output), settings)
        order = merged.place.argsort()
        videos.append({"places": merged.place[order].tolist(), "tokens": tokens[order].tolist()})
    return videos


@torch.no_grad()
def encoded_with_reuse(model) -> list[dict]:
    """Of each of [`drawn_pixels`] the tokens that go into the prompt, and how many patches were computed."""
    settings = HoliTomConfig(**REUSE, **ENGINE)
    videos = []
    for pixels in drawn_pixels():
        output = model.model.get_video_features(torch.from_numpy(pixels)[None], holitom_config=settings)
        _, (tokens,) = merge_videos(model.model.video_tokens(output), settings)
        videos.append({"tokens": tokens.tolist(), "num_computed": int(output.computed_patches[0].sum())})
    return videos


@torch.no_grad()
def received_attention(model, qwen, qwen_processor) -> dict[str, list]:
    """Of a drawn video what its tokens receive of either tower's attention, (F, T)."""
    frames, question, _ = next(drawn_questions(1))
    inputs = qwen_inputs(qwen_processor, frames, question)
    features = {
        "llava_onevision": (model, torch.from_numpy(drawn_pixels()[0])[None]),
        "qwen3_vl": (qwen, inputs["pixel_values_videos"], inputs["video_grid_thw"]),
    }
    found = {}
    for name, (each, *pixels) in features.items():
        output = each.model.get_video_features(*pixels, holitom_config=HoliTomConfig())
        found[name] = each.model.video_tokens(output)[0].importance.tolist()
    return found


def write_batch(folder: Path, number: int = 40) -> None:
    """Inputs of `holitom-hf batch`, some of which can't be answered, and each model's records of transformers."""
    shutil.rmtree(folder, ignore_errors=True)
    asked = write_set(folder, number)
    rows = [{"id": question.id, "video": question.video, "question": question.text} for question in asked]
    (folder / "broken.mp4").write_bytes(b"not a video")
    rows.insert(3, {"id": "broken", "video": "broken.mp4", "question": "What?"})
    rows.insert(5, {"id": "gone", "video": "gone.mp4", "question": "What?"})
    rows.insert(7, {"id": "marked", "video": rows[0]["video"], "question": "What <video>, <|video_pad|>?"})
    (folder / "inputs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = HoliTomConfig(retention_ratio=0.15, **ENGINE)
    (folder / "settings.json").write_text(json.dumps(settings.to_dict()))
    options = ["--preset", str(folder / "settings.json"), "--dtype", "float32", "--device", "cpu"]
    for name, of_model in BATCHES.items():
        files = [str(folder.absolute() / "inputs.jsonl"), str(folder / f"{name}.jsonl")]
        subprocess.run([sys.executable, "-m", "holitom_hf", "batch", *files, *options, *of_model], check=True)


def write_random_models(folder: Path, processor, number: int) -> dict[str, dict]:
    """Saves [`RANDOM_MODELS`], and returns of each what it answers and encodes, by ratio."""
    found = {}
    for name, dtype in RANDOM_MODELS.items():
        model = write_random_model(name, folder / name, getattr(torch, dtype))
        found[name] = {"answers": {}, "encoder": {}}
        for ratio in RANDOM_RATIOS:
            settings = HoliTomConfig(retention_ratio=ratio, position_ids="kept", **ENGINE)
            asked = (model, processor, qwen_inputs, settings, number, questions_about_clips)
            found[name]["answers"][ratio] = answers_of(*asked)
            found[name]["encoder"][ratio] = encoded(model, processor, settings)
    return found


def write_checkpoints(folder: Path, model: HoliTomLlavaOnevisionForConditionalGeneration, processor) -> None:
    """The model with the code that it runs, and settings of another rate, with code, too."""
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder / "whole")
    processor.save_pretrained(folder / "whole")
    model.config.holitom_config = model.config.holitom_config.overlaid({"retention_ratio": 0.3})
    model.save_pretrained(folder / "settings", config_only=True)


def main() -> None:
    """Writes what the models answer and encode, by ratio, and beside it a batch and checkpoints of ours."""
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("--questions", type=int, default=200)
    args = parser.parse_args()
    kwargs = {"dtype": torch.float32}
    model = HoliTomLlavaOnevisionForConditionalGeneration.from_pretrained(BUNDLED_MODEL, **kwargs).eval()
    processor = HoliTomProcessor.from_pretrained(BUNDLED_MODEL)
    qwen = HoliTomQwen3VLForConditionalGeneration.from_pretrained(SMALL_QWEN, **kwargs).eval()
    qwen_processor = HoliTomQwen3VLProcessor.from_pretrained(SMALL_QWEN)
    answers = {"llava_onevision": {}, "qwen3_vl": {}, "qwen3_vl_mixed": {}, "qwen3_vl_encoder": {}}
    for ratio in RATIOS:
        settings = HoliTomConfig(retention_ratio=ratio, **ENGINE)
        answers["llava_onevision"][ratio] = answers_of(model, processor, llava_inputs, settings, args.questions)
        kept = settings.overlaid({"position_ids": "kept"})
        answers["qwen3_vl"][ratio] = answers_of(qwen, qwen_processor, qwen_inputs, kept, min(args.questions, 20))
        answers["qwen3_vl_mixed"][ratio] = mixed_answers(qwen, qwen_processor, kept)
    for ratio in QWEN_RATIOS:
        settings = HoliTomConfig(retention_ratio=ratio, position_ids="kept", **ENGINE)
        answers["qwen3_vl_encoder"][ratio] = encoded(qwen, qwen_processor, settings)
    answers["qwen2_5_vl"] = small_qwen2_5_vl_answers(args.file.with_suffix(".qwen2_5_vl"))
    answers["reuse"] = encoded_with_reuse(model)
    answers["importance"] = received_attention(model, qwen, qwen_processor)
    models = args.file.with_suffix(".models")
    answers["random_models"] = write_random_models(models, qwen_processor, min(args.questions, 20))
    write_batch(args.file.with_suffix(".batch"))
    write_checkpoints(args.file.with_suffix(".checkpoints"), model, processor)
    args.file.write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
