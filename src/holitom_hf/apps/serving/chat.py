"""`POST /v1/chat/completions`."""

import asyncio
import contextlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

from pydantic import ValidationError
from starlette.responses import Response
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.utils import GenerationState

from ...answering.answerer import Answerer
from ...video.sources import MediaSources
from .generating import Generation, GenerationError, OneAtATime, OverError
from .guard import error_response
from .limits import ServingLimits
from .preparing import Preparer
from .requests import ChatRequest, TextPart, VideoPart, in_words
from .work import Work


NUM_THREADS = min(4, os.cpu_count() or 1)  # that decode
NUM_DOWNLOADS = 32  # at once, each of which may be slow
NUM_AHEAD = 8  # requests that are prepared or answered at once: the others hold no frames yet
USUAL_NEW_TOKENS = 1024  # upstream's


class ChatHandler(ChatCompletionHandler):
    """
    `ChatCompletionHandler` for one model: checks what a client may ask, and fetches, decodes and tokenizes away from
    the event loop.
    """

    def __init__(
        self,
        answerer: Answerer,
        name: str,
        sources: MediaSources,
        limits: ServingLimits,
        num_frames: int | None = None,
    ):
        """
        Args:
            answerer: With its weights loaded.
            name: What requests call the model.
            sources: Opens what videos and pictures are named by.
            limits: Of each request.
            num_frames: Frames to take of each video where a request does not say.
        """
        super().__init__(model_manager=None, generation_state=GenerationState())
        self.model, self.tokenizer = answerer.model, answerer.processor.tokenizer
        self.name, self.sources, self.limits = name, sources, limits
        self.preparer = Preparer(answerer, limits, num_frames)
        self.manager = OneAtATime()
        self.reading = ThreadPoolExecutor(1, thread_name_prefix="read")
        self.preparing = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="prepare")
        self.downloads, self.ahead = asyncio.Semaphore(NUM_DOWNLOADS), asyncio.Semaphore(NUM_AHEAD)

    async def handle_request(self, body: bytes, work: Work) -> Response:
        """
        Overrides ChatCompletionHandler.handle_request, which trusts its clients and prepares on the event loop.

        Args:
            body: As it came.
            work: The request's account.

        Returns:
            The answer, whole or as a stream of events, or an error with a 4xx code.
        """
        try:
            loop = asyncio.get_running_loop()
            asked = await loop.run_in_executor(self.reading, self._parse, body)
            start = time.monotonic()
            media = [await self._open(part, work) for part in _media_of(asked)]
            work.note("fetch", start)
            await work.held.enter_async_context(self.ahead)
            inputs = await loop.run_in_executor(self.preparing, self.preparer.prepare, asked, media, work)
            # Older servers of upstream's don't know `max_completion_tokens`; the seed is set where tokens are drawn.
            names = {"temperature", "top_p", "frequency_penalty", "stop", "logit_bias"}
            usual = min(USUAL_NEW_TOKENS, self.limits.max_new_tokens)
            settings = asked.model_dump(include=names) | {"max_tokens": asked.num_new_tokens or usual}
            config = self._build_generation_config(settings, self.model.generation_config)
            generation = Generation(self.model, work, asked.seed)
            arguments = (work.request_id, generation, self.tokenizer, self.name, inputs, config, self.manager)
            if asked.stream:
                response = self._streaming(*arguments)
                work.held.push_async_callback(generation.wait)
                return response
            work.held.push_async_callback(generation.wait)
            return await self._non_streaming(*arguments)
        except OverError as error:
            return error_response(408, str(error))
        except GenerationError as error:
            return error_response(500, str(error))
        except RecursionError:
            return error_response(400, "the request is nested too deeply")
        except ValidationError as error:
            return error_response(400, in_words(error))
        except ValueError as error:
            return error_response(400, " ".join(str(error).split()))

    def _parse(self, body: bytes) -> ChatRequest:
        try:
            content = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the request's body is no JSON: {error}") from error
        asked = ChatRequest.model_validate(content)
        if asked.model not in (None, self.name):
            raise ValueError(f"this server has the model {self.name!r} and no other")
        self.preparer.check(asked)
        return asked

    async def _open(self, part, work: Work) -> BinaryIO:
        address = part.video_url if isinstance(part, VideoPart) else part.image_url
        async with contextlib.nullcontext() if address.url.startswith("data:") else self.downloads:
            file = await self.sources.open(address.url)
        work.held.callback(file.close)
        return file


def _media_of(asked: ChatRequest) -> list:
    return [part for message in asked.messages for part in message.content if not isinstance(part, TextPart)]
