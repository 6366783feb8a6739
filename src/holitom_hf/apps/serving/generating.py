"""Generation that ends when nobody waits for it, on the one thread that upstream gives a model."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.cli.serving.utils import GenerateManager
from transformers.utils import logging

from ...answering.prompts import PIXELS, encode_videos
from ...answering.savings import row_savings
from ...models.upstream import cache_of
from .work import Work


logger = logging.get_logger(__name__)


class OverError(RuntimeError):
    """A request took too long, or its client left."""


class GenerationError(RuntimeError):
    """The model failed; the log says how."""


class OneAtATime(GenerateManager):
    """`GenerateManager` whose waiting requests may be cancelled."""

    def async_submit(self, fn: Callable, *args, **kwargs) -> asyncio.Future:
        """Overrides GenerateManager.async_submit, whose thread ends with an error when it answers a cancelled one."""
        return asyncio.shield(asyncio.wrap_future(self.submit(fn, *args, **kwargs)))


class Generation:
    """Stands for the model in upstream's handlers: generates for one request, and notes what it took."""

    def __init__(self, model, work: Work, seed: int | None):
        self.model, self.work, self.seed, self.config = model, work, seed, model.config
        self.submitted, self.finished = time.monotonic(), Future()

    async def wait(self) -> None:
        """Until the model is free again: a stream's last token comes a little earlier."""
        await asyncio.shield(asyncio.wrap_future(self.finished))

    @torch.inference_mode()
    def generate(self, **kwargs) -> torch.Tensor:
        """
        Overrides GenerationMixin.generate: stops when the request is over.

        Args:
            kwargs: As upstream, for one row.

        Returns:
            (1, L) the prompt and its answer.

        Raises:
            OverError: If it took too long, or the client left.
            GenerationError: If something failed; the log says what.
        """
        self.work.note("queue", self.submitted)
        try:
            check(self.work)
            return self._generate(**kwargs)
        except OverError:
            raise
        except Exception as error:
            if self.work.cancelled.is_set():
                raise
            logger.exception("%s failed while generating", self.work.request_id)
            raise GenerationError(f"the server failed on this request ({self.work.request_id})") from error
        finally:
            self.finished.set_result(None)

    def _generate(self, input_ids, attention_mask, generation_config, **kwargs) -> torch.Tensor:
        if self.seed is not None:
            torch.manual_seed(self.seed)
        start = time.monotonic()
        if kwargs.get(PIXELS) is not None and "pixel_values" not in kwargs:
            self.model.check_videos(input_ids, kwargs)
            kwargs["mm_encoder_outputs"] = {"video": encode_videos(self.model, kwargs)}
            del kwargs[PIXELS]
            self.work.note("encode", start)
        check(self.work)
        start, progress = time.monotonic(), _Progress(self.work)
        generation_config.return_dict_in_generate = True
        outputs = self.model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            stopping_criteria=StoppingCriteriaList([progress]),
            generation_config=generation_config,
            **kwargs,
        )
        self.work.seconds |= {
            "first_token": progress.first_token_at - start,
            "answer": time.monotonic() - progress.first_token_at,
        }
        num_visual = int((input_ids == self.config.video_token_id).sum())
        [savings] = row_savings(cache_of(outputs), attention_mask, [num_visual], self.config.text_config)
        self.work.tokens |= {
            "prompt": input_ids.shape[1],
            "before": num_visual,
            "outer": savings.visual_tokens_outer,
            "inner": savings.visual_tokens_inner,
            "answer": outputs.sequences.shape[1] - input_ids.shape[1],
        }
        return outputs.sequences


def check(work: Work) -> None:
    """Raises an `OverError` if nobody waits for a request any more."""
    if work.is_over:
        raise OverError(f"the request took more than {work.max_seconds:.0f} s")


class _Progress(StoppingCriteria):
    """Breaks off an answer that nobody waits for, and notes when its first token came."""

    def __init__(self, work: Work):
        self.work, self.first_token_at = work, None

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        """Overrides StoppingCriteria.__call__: (B,) bool."""
        if self.first_token_at is None:
            self.first_token_at = time.monotonic()
        check(self.work)  # an end would look like the answer's own
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
