"""From a request to the model's inputs, within limits."""

import threading
import time
from dataclasses import replace
from typing import BinaryIO

import torch
from jinja2 import TemplateError
from PIL import Image
from transformers import BatchFeature

from ...answering.answerer import Answerer
from ...video.decoding import read_video
from ...video.limits import PICTURES
from .generating import check
from .limits import ServingLimits
from .requests import ChatRequest, ImagePart, TextPart, VideoPart
from .work import Work


LETTERS_PER_TOKEN = 16  # more than any language has: what is longer is not even cut into tokens


class Preparer:
    """Decodes and tokenizes, for several requests at once."""

    def __init__(self, answerer: Answerer, limits: ServingLimits, num_frames: int | None = None):
        """
        Args:
            answerer: With its weights loaded.
            limits: Of each request.
            num_frames: Frames to take of each video where a request does not say; `None`: at most the processor's.
        """
        self.processor, self.device, self.limits = answerer.processor, answerer.model.device, limits
        self.num_frames = num_frames
        # Fast tokenizers can't be used by two threads at a time.
        self.lock = threading.Lock()

    def check(self, asked: ChatRequest) -> None:
        """Raises a `ValueError` for what can be told before anything is fetched."""
        num_media = len(asked.of_kind(VideoPart)) + len(asked.of_kind(ImagePart))
        if num_media > self.limits.max_videos:
            raise ValueError(f"the request has {num_media} videos and pictures, {self.limits.max_videos} are allowed")
        if (num_frames := asked.chat_template_kwargs.num_frames or 1) > self.limits.max_frames:
            raise ValueError(f"num_frames is {num_frames}, {self.limits.max_frames} are allowed")
        if (asked.num_new_tokens or 1) > self.limits.max_new_tokens:
            raise ValueError(f"max_tokens is {asked.num_new_tokens}, {self.limits.max_new_tokens} are allowed")
        texts = [part.text for part in asked.of_kind(TextPart)]
        if sum(map(len, texts)) > LETTERS_PER_TOKEN * self.limits.max_prompt_tokens:
            raise ValueError(f"the text is too long: {self.limits.max_prompt_tokens} tokens are allowed")
        for name in ("video_token", "image_token"):
            token = getattr(self.processor, name)
            if any(token in text for text in texts):
                raise ValueError(f"the text holds {token}, which stands for a video or picture: pass those as parts")
        vocabulary = len(self.processor.tokenizer)
        if any(not 0 <= token < vocabulary for token in asked.logit_bias or ()):
            raise ValueError(f"logit_bias names a token that is not there: they are 0 to {vocabulary - 1}")

    def prepare(self, asked: ChatRequest, media: list[BinaryIO], work: Work) -> BatchFeature:
        """
        The model's inputs.

        Args:
            asked: The request.
            media: What its videos and pictures hold, in order.
            work: The request's account.

        Raises:
            OverError: If the request is over.
            ValueError: If a video or picture can't be read, or there is more than the limits allow.
        """
        start, videos, found, pictures = time.monotonic(), [], [], []
        parts = [part for message in asked.messages for part in message.content if not isinstance(part, TextPart)]
        num_videos = len(asked.of_kind(VideoPart))
        for part, file in zip(parts, media):
            check(work)
            if isinstance(part, ImagePart):
                pictures.append(self._picture(file))
                continue
            limits = self.limits.of_video(num_videos)
            limits = replace(limits, max_seconds=max(0.0, min(limits.max_seconds, work.seconds_left)))
            frames, metadata = read_video(file, lambda video: self._sample(video, asked), limits)
            videos.append(frames)
            found.append(metadata)
        work.note("decode", start)
        start = time.monotonic()
        inputs = self._tokenized(asked, videos, found, pictures)
        if (length := inputs["input_ids"].shape[1]) > self.limits.max_prompt_tokens:
            raise ValueError(f"the prompt has {length} tokens, {self.limits.max_prompt_tokens} are allowed")
        pixels = inputs.pop("pixel_values_videos", None)
        inputs = inputs.to(self.device)
        if pixels is not None:
            inputs["pixel_values_videos"] = pixels
        work.note("prepare", start)
        return inputs

    def _sample(self, video, asked: ChatRequest):
        num_frames = asked.chat_template_kwargs.num_frames or self.num_frames
        return self.processor.video_processor.frames_to_read(video, num_frames=num_frames)

    def _picture(self, file: BinaryIO) -> Image.Image:
        try:
            picture = Image.open(file, formats=PICTURES)
            if picture.width * picture.height > self.limits.max_pixels:
                raise ValueError(f"it has {picture.width} x {picture.height} pixels")
            return picture.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            text = f"it is no {', '.join(PICTURES)} file, or damaged"
            if isinstance(error, (ValueError, Image.DecompressionBombError)):
                text = f"{error}, and {self.limits.max_pixels} pixels are allowed"
            raise ValueError(f"a picture of the request can't be read: {text}") from error

    def _tokenized(self, asked: ChatRequest, videos: list[torch.Tensor], found: list, pictures: list) -> BatchFeature:
        names = {TextPart: "text", VideoPart: "video", ImagePart: "image"}
        messages = [
            {
                "role": message.role,
                "content": [
                    {"type": names[type(part)]} | part.model_dump(include={"text"}) for part in message.content
                ],
            }
            for message in asked.messages
        ]
        media = {"images": pictures} if pictures else {}
        if videos:
            media |= {"videos": videos, "do_sample_frames": False, "video_metadata": found}
        if self.device.type == "cuda" and media:
            media["device"] = str(self.device)
        with self.lock:
            try:
                text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
            except TemplateError as error:
                raise ValueError(f"the model's chat template takes no such messages: {error}") from error
            return self.processor(text=text, return_tensors="pt", **media)
