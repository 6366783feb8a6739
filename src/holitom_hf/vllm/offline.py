"""Questions about videos through vLLM's offline engine, many at once."""

from dataclasses import dataclass

import numpy as np
from vllm import LLM, SamplingParams
from vllm.v1.engine.exceptions import EngineDeadError

from ..answering.answerer import Answerer
from ..checkpoints.checkpoint import base_model_of, config_values, is_original
from ..models.registry import backbones
from . import ARCHITECTURES
from .settings import EngineEndedError, engine_settings


@dataclass
class EngineAnswer:
    """
    What the engine says of one prompt.

    Attributes:
        text: The answer.
        num_video_tokens: What the decoder got of the video, a newline included.
    """

    text: str
    num_video_tokens: int


class OfflineAnswerer(Answerer):
    """
    An `Answerer` whose model runs in vLLM: configuration and processor are ours, so that videos are read and counted
    as anywhere else, and weights the engine's. It has `answer` in place of `prepare`, `encode` and `generate`.
    """

    def __init__(
        self,
        model: str,
        settings=None,
        retention_ratio: float | None = None,
        dtype: str = "auto",
        hub: dict | None = None,
        options: dict | None = None,
    ):
        """
        Args:
            model, settings, retention_ratio, dtype, hub: As in [`Answerer`].
            options: For `vllm.LLM`, whatever it takes.

        Raises:
            OSError, ValueError: As [`Answerer`], and if the model is none that is answered with in vLLM.
        """
        super().__init__(model, settings, retention_ratio, dtype=dtype, hub=hub)
        if self.backbone.generation not in ARCHITECTURES:
            titles = [known.title for known in backbones().values() if known.generation in ARCHITECTURES]
            raise ValueError(
                f"vLLM answers a batch with {' or '.join(titles)} alone; {model} is a {self.backbone.title}"
            )
        if is_original(config_values(model, dict(self.hub_options))):
            raise ValueError(
                f"{model} is as LLaVA's authors published it: vLLM takes what holitom-hf convert writes of it"
            )
        in_force, _ = engine_settings(self.config.holitom_config, self.backbone.keeps_positions)
        self.config.holitom_config = in_force
        self.options, self.engine = options or {}, None

    def load_model(self) -> None:
        """
        Overrides Answerer.load_model: starts the engine.

        Raises:
            OSError, RuntimeError, ValueError: What the engine has against the checkpoint or the options.
        """
        base, revision = base_model_of(self.name, dict(self.hub_options))
        # Of a checkpoint's own type, as transformers has it; the engine's "auto" is never float32.
        dtype = self.dtype if self.dtype != "auto" else str(self.config.dtype or "auto").removeprefix("torch.")
        # The settings lie in the overrides; weights and tokenizer are those of the base, if there is one.
        settings = self.config.holitom_config.to_dict() | {
            "base_model_name_or_path": None,
            "base_model_revision": None,
        }
        self.engine = LLM(
            **{
                "model": base or self.name,
                "revision": revision,
                "dtype": dtype,
                "hf_overrides": {"architectures": [self.backbone.generation], "holitom_config": settings},
                "limit_mm_per_prompt": {"video": 1, "image": 0},
            }
            | self.options
        )

    def answer(
        self, prompts: list[str], videos: list[np.ndarray | tuple[np.ndarray, dict]], max_new_tokens: int
    ) -> list[EngineAnswer]:
        """
        Answers prompts in continuous batches, greedily.

        Args:
            prompts: As the chat template writes them, each with one video.
            videos: For each (F, H, W, 3) uint8, in the size of the tower; for a model that is told their times beside
                what transformers' `VideoMetadata` holds.
            max_new_tokens: Longest answer.

        Raises:
            EngineEndedError: If the engine's process is gone.
            ValueError: If one of the prompts is longer than the engine takes.
        """
        requests = [
            {
                "prompt": prompt,
                "multi_modal_data": {"video": [video]},
                "mm_processor_kwargs": {"do_resize": False},
            }
            for prompt, video in zip(prompts, videos)
        ]
        sampling = SamplingParams(temperature=0, max_tokens=max_new_tokens, detokenize=False)
        try:
            outputs = self.engine.generate(requests, sampling, use_tqdm=False)
        except EngineDeadError as error:
            raise EngineEndedError(
                f"vLLM's engine ended, its log says why; started again, the run goes on ({error})"
            ) from error
        placeholder = self.processor.video_token_id
        # As everywhere else: the engine leaves out the beginning of a character that an answer is cut off in.
        texts = self.processor.batch_decode(
            [output.outputs[0].token_ids for output in outputs], skip_special_tokens=True
        )
        return [
            EngineAnswer(text, list(output.prompt_token_ids).count(placeholder))
            for text, output in zip(texts, outputs)
        ]
