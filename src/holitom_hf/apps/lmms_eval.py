"""HoliTom as a model of lmms-eval, found through the entry-point group `lmms_eval.models`."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.utils import Collator
from tqdm import tqdm

from ..answering.answerer import Answerer
from ..bundled import model_name
from ..configuration import HoliTomConfig


# LLaVA-NeXT's "qwen_1_5" conversation, in which the paper's results were taken.
AUTHORS_PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"
)
GENERATION_OPTIONS = ("max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "num_beams")


class HoliTomLmms(lmms):
    """
    `lmms_eval --model holitom --model_args pretrained=...,preset=llava-onevision-7b-r15 --tasks videomme`.

    Args:
        pretrained: Folder or Hub repository, or "bundled".
        preset: Settings by name, or a JSON file of them; `None`: the checkpoint's.
        retention_ratio: Replaces that of the settings; 1.0 with `inner_merge_layer` unset is the uncompressed model.
        num_frames: Frames of a video, spread uniformly with both ends; all of a shorter one. Of LLaVA-Video the most:
            of a shorter video a frame a second. `None`: as in the paper's results, 64 of LLaVA-Video and 32 of others.
        prompt: "authors" for the conversation of the paper's results (LLaVA-NeXT's qwen_1_5), "chat_template" for
            the checkpoint's own; `None`: the authors' with LLaVA-OneVision and LLaVA-Video, the checkpoint's with
            others.
        add_time_instruction: Whether LLaVA-Video is told how long a video is and when its frames are, which in the
            paper's results it is not.
        device: "cuda", "cuda:1", "cpu", or "auto" to spread the layers over all GPUs. Under `accelerate launch` with
            several processes each takes its own GPU.
        dtype: "auto", "float32", "bfloat16" or "float16".
        batch_size: Questions at once.
        max_batch_size: Taken for lmms-eval's sake, not used.

    Raises:
        ValueError: If an argument is not known or out of range.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str = "llava-hf/llava-onevision-qwen2-7b-ov-hf",
        preset: str | None = None,
        retention_ratio: float | None = None,
        num_frames: int | None = None,
        prompt: str | None = None,
        add_time_instruction: bool = False,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **kwargs,
    ):
        super().__init__()
        if kwargs:
            raise ValueError(f"unknown model_args: {', '.join(kwargs)}")
        if prompt not in (None, "authors", "chat_template"):
            raise ValueError(f"prompt must be authors or chat_template, got {prompt!r}")
        if str(batch_size) == "auto":
            raise ValueError("batch_size must be a number")
        # lmms-eval's own default is "cuda", which is not there everywhere.
        if device in (None, "cuda") and not torch.cuda.is_available():
            device = "cpu"
        self.accelerator = Accelerator(cpu=device == "cpu")
        if self.accelerator.num_processes > 1:
            device = str(self.accelerator.device)
        settings = HoliTomConfig.coerce(preset) if preset is not None else None
        self.answerer = Answerer(
            model_name(pretrained), settings, retention_ratio, device=device or "auto", dtype=dtype
        )
        self.answerer.load_model()
        self.processor = self.answerer.processor
        self.processor.tokenizer.padding_side = "left"
        is_llava_video = self.answerer.backbone.model_type == "llava_video"
        if is_llava_video:
            self.processor.video_processor.add_time_instruction = add_time_instruction
        elif add_time_instruction:
            raise ValueError(f"add_time_instruction is LLaVA-Video's, not {self.answerer.backbone.title}'s")
        if prompt is None:
            is_authors_model = is_llava_video or self.answerer.backbone.model_type == "llava_onevision"
            prompt = "authors" if is_authors_model else "chat_template"
        num_frames = int(num_frames) if num_frames is not None else 64 if is_llava_video else 32
        self.processor.video_processor.num_frames = num_frames
        self.num_frames, self.prompt, self.batch_size = num_frames, prompt, int(batch_size)
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return self.answerer.model.device

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Overrides lmms.generate_until: an answer for every request, in their order."""
        collator = Collator([request.args for request in requests], lambda args: -len(args[0]), grouping=True)
        num_batches = -(-len(requests) // self.batch_size)
        progress = tqdm(total=num_batches, disable=self.rank != 0, desc="Model Responding")
        answers = []
        for chunk in collator.get_batched(n=self.batch_size):
            options = dict(chunk[0][1])
            inputs = self._inputs([self._request(args[0], *args[2:6]) for args in chunk])
            with torch.inference_mode():
                sequences = self.answerer.model.generate(
                    **inputs, vision_batch_size=32, **_generation_options(options)
                )
            texts = self.processor.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for args, text in zip(chunk, texts):
                answers.append(_until(text, options.get("until")))
                self.cache_hook.add_partial("generate_until", (args[0], options), answers[-1])
            progress.update(1)
        progress.close()
        return collator.get_original(answers)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """
        Overrides lmms.loglikelihood: as lmms-eval's LLaVA models do, the mean loss of the continuation's tokens (the
        smallest one wins), and whether each is the most likely one.
        """
        results = []
        for request in tqdm(requests, disable=self.rank != 0, desc="Model Responding"):
            context, target, *rest = request.args
            if callable(target):
                target = target(self._document(*rest[1:4]))
            inputs = self._inputs([self._request(context, *rest[:4])])
            prompt_length = inputs["input_ids"].shape[1]
            continuation = self.processor.tokenizer(str(target), add_special_tokens=False, return_tensors="pt")
            ids = continuation["input_ids"].to(self.device)
            inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            if "mm_token_type_ids" in inputs:
                inputs["mm_token_type_ids"] = F.pad(inputs["mm_token_type_ids"], (0, ids.shape[1]))  # text
            with torch.inference_mode():
                logits = self.answerer.model(**inputs, vision_batch_size=32, prompt_length=prompt_length).logits
            logits = logits[0, prompt_length - 1 : -1].float()
            loss = torch.nn.functional.cross_entropy(logits, ids[0])
            results.append((loss.item(), bool((logits.argmax(-1) == ids[0]).all())))
        return results

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Overrides lmms.generate_until_multi_round: not supported."""
        raise NotImplementedError("holitom answers one question at a time: multi-round tasks are not supported")

    def _document(self, number: int, task: str, split: str) -> dict:
        return self.task_dict[task][split][number]

    def _request(self, context: str, doc_to_visual: Callable, number: int, task: str, split: str) -> tuple[str, list]:
        visuals = doc_to_visual(self._document(number, task, split)) or []
        return context, visuals if isinstance(visuals, list) else [visuals]

    def _inputs(self, requests: list[tuple[str, list]]) -> dict[str, torch.Tensor]:
        """The model's inputs for contexts and what belongs to them: video files, a video's frames, or images."""
        texts, videos, images = [], [], []
        for context, visuals in requests:
            if visuals and isinstance(visuals[0], str):
                kind, own = "video", visuals
            elif len(visuals) > 4:  # the frames of a video, as MVBench has some
                chosen = np.linspace(0, len(visuals) - 1, min(self.num_frames, len(visuals)), dtype=int)
                kind, own = "video", [[visuals[index].convert("RGB") for index in chosen]]
            else:
                kind, own = "image", [image.convert("RGB") for image in visuals]
            (videos if kind == "video" else images).extend(own)
            texts.append(self._prompt(context, kind, len(own)))
        sampling = {} if not videos or any(isinstance(video, str) for video in videos) else {"do_sample_frames": False}
        features = self.processor(
            text=texts, videos=videos or None, images=images or None, padding=True, return_tensors="pt", **sampling
        )
        return dict(features.to(self.device, self.answerer.model.dtype))

    def _prompt(self, context: str, kind: str, number: int) -> str:
        token = self.processor.video_token if kind == "video" else self.processor.image_token
        if self.prompt == "authors":
            content = " ".join([token] * number) + "\n" + context if number else context
            return AUTHORS_PROMPT.format(content=content)
        content = [{"type": kind}] * number + [{"type": "text", "text": context}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def _generation_options(options: dict) -> dict:
    """What `generate` takes of a task's `generation_kwargs`."""
    chosen = {name: options[name] for name in GENERATION_OPTIONS if options.get(name) is not None}
    if not chosen.get("do_sample"):
        chosen = {name: value for name, value in chosen.items() if name not in ("temperature", "top_p", "top_k")}
    return {"max_new_tokens": 1024, "do_sample": False} | chosen


def _until(text: str, stops: str | list[str] | None) -> str:
    """The text before the first of some strings."""
    for stop in [stops] if isinstance(stops, str) else stops or []:
        if stop:
            text = text.split(stop)[0]
    return text.strip()


def manifest() -> ModelManifest:
    """What lmms-eval's registry takes."""
    return ModelManifest(model_id="holitom", simple_class_path=f"{HoliTomLmms.__module__}.{HoliTomLmms.__name__}")
