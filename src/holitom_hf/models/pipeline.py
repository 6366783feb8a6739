"""The "video-text-to-text" pipeline."""

import os
from types import GeneratorType
from typing import Any

import torch
from transformers import AnyToAnyPipeline
from transformers.pipelines.any_to_any import Chat

from ..checkpoints.remote_code import save_remote_code
from ..configuration import HoliTomConfig


class VideoTextToTextPipeline(AnyToAnyPipeline):
    """
    `AnyToAnyPipeline` for videos: chats whose messages hold `{"type": "video", "path" | "url" | "video": ...}`, or
    `text=` with `videos=`. Videos of a batch may differ in their number of frames.

    ```python
    from transformers import pipeline

    pipe = pipeline("video-text-to-text", model="user/repo", trust_remote_code=True)
    content = [{"type": "video", "path": "video.mp4"}, {"type": "text", "text": "What happens?"}]
    pipe([{"role": "user", "content": content}], max_new_tokens=64, holitom_config={"retention_ratio": 0.1})
    ```

    Beyond the arguments of `AnyToAnyPipeline`, at construction or in a call:

    Args:
        holitom_config: A [`HoliTomConfig`], a preset or a path in place of the model's settings, or a dictionary of
            those to change.
        vision_batch_size: Number of frames that go through the vision tower at once.
        num_frames: Number of frames to take of every video.
        fps: Frames to take for each second, in place of `num_frames`.
        streamer: Gets tokens as they come, as in `generate`.
    """

    def check_model_type(self, supported_models: Any) -> None:
        """Overrides Pipeline.check_model_type, whose list knows no model from outside transformers."""
        if not hasattr(self.model.config, "holitom_config"):
            super().check_model_type(supported_models)

    def _sanitize_parameters(
        self,
        generate_kwargs: dict | None = None,
        processor_kwargs: dict | None = None,
        holitom_config: HoliTomConfig | dict | str | None = None,
        vision_batch_size: int | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
        streamer=None,
        **kwargs,
    ):
        generate_kwargs = dict(generate_kwargs or {})
        if holitom_config is not None:
            own = getattr(self, "_forward_params", {}).get("generate_kwargs", {}).get("holitom_config")
            settings = HoliTomConfig.coerce(holitom_config, None if isinstance(own, dict) else own)
            if isinstance(holitom_config, dict) and (own is None or isinstance(own, dict)):
                settings = (own or {}) | holitom_config  # over the model's, as they are when it runs
            generate_kwargs["holitom_config"] = settings
        for name, value in (("vision_batch_size", vision_batch_size), ("streamer", streamer)):
            if value is not None:
                generate_kwargs[name] = value
        processor_kwargs = dict(processor_kwargs or {})
        for name, value in (("num_frames", num_frames), ("fps", fps)):
            if value is not None:
                processor_kwargs[name] = value
        if processor_kwargs:
            kwargs["processor_kwargs"] = processor_kwargs
        preprocess, forward, postprocess = super()._sanitize_parameters(generate_kwargs=generate_kwargs, **kwargs)
        # What the constructor was given holds where a call does not say otherwise, entry by entry.
        for params, own, name in (
            (forward, getattr(self, "_forward_params", {}), "generate_kwargs"),
            (preprocess, getattr(self, "_preprocess_params", {}), "processor_kwargs"),
        ):
            merged = own.get(name, {}) | params.get(name, {})
            if merged:
                params[name] = merged
        return preprocess, forward, postprocess

    def __call__(self, text=None, **kwargs):
        """Overrides AnyToAnyPipeline.__call__: a generator may yield chats, too."""
        if isinstance(text, GeneratorType):
            text = (Chat(item) if _is_chat(item) else item for item in text)
        return super().__call__(text, **kwargs)

    def preprocess(self, inputs=None, **kwargs):
        """Overrides AnyToAnyPipeline.preprocess: videos become a list, which a batch need not pad to one shape."""
        model_inputs = super().preprocess(inputs, **kwargs)
        videos = model_inputs.get("pixel_values_videos")
        if videos is not None:  # flat patches of several videos are one entry
            model_inputs["pixel_values_videos"] = [videos] if _is_flat(videos) else list(videos)
        return model_inputs

    def _forward(self, model_inputs, generate_kwargs=None):
        videos = model_inputs.get("pixel_values_videos")
        if videos and isinstance(videos[0], (list, tuple)):  # one list for each chat of a batch
            videos = [video for of_chat in videos for video in of_chat]
        if videos:
            model_inputs["pixel_values_videos"] = torch.cat(videos) if _is_flat(videos[0]) else videos
        return super()._forward(model_inputs, generate_kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """Overrides Pipeline.save_pretrained, which leaves the processor out, and as remote code the pipeline."""
        super().save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)
        save_remote_code(save_directory, self.model.config.backbone)


def _is_flat(videos: Any) -> bool:
    """Whether videos are patches (P, C) with their grids beside them."""
    return isinstance(videos, torch.Tensor) and videos.ndim == 2


def _is_chat(item: Any) -> bool:
    return isinstance(item, (list, tuple)) and bool(item) and isinstance(item[0], dict) and "role" in item[0]


__all__ = ["VideoTextToTextPipeline"]
