"""What the processors of all backbones have in common: files are decoded here, and saved files load as upstream's."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import BaseVideoProcessor
from transformers.audio_utils import AudioInput
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import ProcessingKwargs, Unpack
from transformers.tokenization_utils_base import PreTokenizedInput, TextInput
from transformers.video_utils import VideoInput, VideoMetadata, make_batched_videos

from ..checkpoints.backbone import Backbone
from ..checkpoints.checkpoint import base_model_of, load_as_it_is
from ..checkpoints.remote_code import save_remote_code
from ..checkpoints.writing import written_aside
from ..merging.package import of_package
from ..video.decoding import is_video_file, read_video
from ..video.frame_files import read_frames


check_processor = of_package("models.registry", "check_processor")


class HoliTomVideoProcessorMixin:
    """
    For the video processor of a backbone, before upstream's class, which samples by `num_frames` or by `fps`.

    Attributes:
        backbone: Whose it is.
        upstream_class: The class that saved files name.
        fewest_frames: How many the model needs; the last frame of a shorter video is repeated.
        sampling_names: What `sample_frames` takes.
    """

    backbone: ClassVar[Backbone]
    upstream_class: ClassVar[type[BaseVideoProcessor]]
    fewest_frames = 1
    sampling_names = ("num_frames", "fps")

    @classmethod
    def from_dict(cls, video_processor_dict: dict[str, Any], **kwargs):
        """
        Overrides VideoProcessorMixin.from_dict: of settings that upstream wrote, its defaults give way to ours. Its
        files spell out that nothing is sampled, though nobody may have asked for that.
        """
        settings = dict(video_processor_dict)
        if cls.backbone.video_processor not in str(settings.pop("auto_map", None)):
            settings = {
                name: value for name, value in settings.items() if value != getattr(cls.upstream_class, name, None)
            }
        return super().from_dict(settings, **kwargs)

    def preprocess(self, videos, **kwargs) -> BatchFeature:
        """
        Overrides VideoProcessorMixin.preprocess: files, bytes and URLs are decoded here.

        Args:
            videos: A video or a list: path, URL, bytes, binary file object; (F, C, H, W) or (F, H, W, C) array or
                tensor; list of PIL images. As upstream has it, `[[[file, ...]]]`, what a chat template makes of a
                list of files, is one video with an image file for each frame; in flatter lists each file is a video.
            kwargs: As upstream. A `num_frames` that is passed must not exceed what a video has; the processor's own
                is the most that is taken.

        Returns:
            As upstream.

        Raises:
            FileNotFoundError, OSError, ValueError: If a video can't be read, see [`read_video`], or has fewer frames
                than asked.
        """
        # Left to `sample_frames` when not passed: it tells what the caller asks for from what is merely usual.
        kwargs.setdefault("num_frames", None)
        kwargs.setdefault("fps", None)
        if has_video_file(videos):
            videos, metadata = self.decode(videos, **kwargs)
            kwargs.update(video_metadata=metadata, do_sample_frames=False)
        return super().preprocess(videos, **kwargs)

    def decode(self, videos, do_sample_frames: bool | None = None, **kwargs) -> tuple[list, list[VideoMetadata]]:
        """
        Reads the files among `videos`.

        Args:
            videos: A video or a (nested) list of them; frames pass as they are.
            do_sample_frames: `False` reads every frame.
            kwargs: What `sample_frames` takes; for images `fps` is the rate that they were taken at.

        Returns:
            A flat list of videos, (F, 3, H, W) uint8 where they were files, and their metadata.
        """
        do_sample_frames = self.do_sample_frames if do_sample_frames is None else do_sample_frames
        asked = {"do_sample_frames": do_sample_frames} | {name: kwargs.get(name) for name in self.sampling_names}
        decoded, metadata = [], []
        for video in _flat(videos):
            if _is_image_files(video):
                if do_sample_frames:
                    raise ValueError(
                        "Sampling frames from a list of images is not supported! Set `do_sample_frames=False`."
                    )
                frames, found = read_frames(video)
                found.fps = asked["fps"] or self.fps  # taken to be sampled already, since images say nothing of it
            elif is_video_file(video):
                frames, found = read_video(video, lambda metadata: self.frames_to_read(metadata, **asked))
            else:
                frames = video
                found = VideoMetadata(total_num_frames=len(video), frames_indices=list(range(len(video))))
            decoded.append(frames)
            metadata.append(found)
        return decoded, metadata

    def frames_to_read(
        self, metadata: VideoMetadata, do_sample_frames: bool | None = None, **sampling: float | None
    ) -> np.ndarray:
        """
        Ascending indices of a file's frames: those of `sample_frames`, at least as many as the model needs.

        Args:
            metadata: Of the file.
            do_sample_frames: `False` takes every frame.
            sampling: For `sample_frames`.
        """
        if do_sample_frames is False:
            taken = np.arange(metadata.total_num_frames)
        else:
            taken = self.sample_frames(metadata, **sampling)
        return np.pad(taken, (0, max(0, self.fewest_frames - len(taken))), mode="edge")

    def asked_frames(self, metadata: VideoMetadata, num_frames: int | None, fps: float | None) -> int | None:
        """
        How many frames `sample_frames` is to take, where that is a number.

        Args:
            metadata: Of the video.
            num_frames: As asked; `None`: at most `self.num_frames`, where the processor has such a number.
            fps: How many per second of video instead.

        Raises:
            ValueError: If both are passed, one is not positive, or the video has fewer frames than asked.
        """
        total = metadata.total_num_frames
        if num_frames is not None and fps is not None:
            raise ValueError("num_frames and fps exclude each other: pass one of them")
        if fps is not None:
            if not fps > 0:
                raise ValueError(f"fps must be positive, got {fps}")
            return None
        if num_frames is None:
            return min(self.num_frames, total) if self.num_frames else None
        if num_frames < 1:
            raise ValueError(f"num_frames must be at least 1, got {num_frames}")
        if num_frames > total:
            has = f"{total} frames" if total > 1 else "one frame"
            raise ValueError(f"the video has {has}, fewer than the {num_frames} asked for: lower num_frames")
        return num_frames

    def to_dict(self) -> dict:
        """Overrides BaseVideoProcessor.to_dict: without `trust_remote_code` the file loads as upstream's."""
        return super().to_dict() | {
            "video_processor_type": self.upstream_class.__name__,
            "auto_map": {"AutoVideoProcessor": self.backbone.auto_map()["AutoVideoProcessor"]},
        }

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> list[str]:
        """Overrides VideoProcessorMixin.save_pretrained: aside first, with the code beside the settings."""
        return _save_with_code(super().save_pretrained, self.backbone, save_directory, push_to_hub, **kwargs)


class HoliTomProcessorMixin:
    """
    For the processor of a backbone, before upstream's class: videos may be files, bytes or URLs.

    Attributes:
        backbone: Whose it is.
        own_video_processor: The backbone's.
    """

    backbone: ClassVar[Backbone]
    own_video_processor: ClassVar[type[HoliTomVideoProcessorMixin]]

    def __call__(
        self,
        images: ImageInput | None = None,
        text: TextInput | PreTokenizedInput | list[TextInput] | list[PreTokenizedInput] | None = None,
        videos: VideoInput | None = None,
        audio: AudioInput | None = None,
        **kwargs: Unpack[ProcessingKwargs],
    ) -> BatchFeature:
        """
        Overrides ProcessorMixin.__call__: video files are decoded first.

        Args:
            videos: As in [`HoliTomVideoProcessorMixin.preprocess`].
            The rest: as upstream.

        Returns:
            `input_ids`, `attention_mask`, `pixel_values_videos`, ..., with a placeholder for every token that the
            uncompressed videos have, newlines among them.

        Raises:
            FileNotFoundError, OSError, ValueError: As [`HoliTomVideoProcessorMixin.preprocess`], and if text and
                videos don't match in number.
        """
        if has_video_file(videos):
            names = (*self.video_processor.sampling_names, "do_sample_frames")
            asked = kwargs.get("videos_kwargs", {}) | kwargs
            videos, metadata = self.video_processor.decode(videos, **{name: asked.get(name) for name in names})
            kwargs = {name: value for name, value in kwargs.items() if name not in names}
            if "videos_kwargs" in kwargs:
                kept = {name: value for name, value in kwargs["videos_kwargs"].items() if name not in names}
                kwargs["videos_kwargs"] = kept
            kwargs |= {"do_sample_frames": False, "video_metadata": metadata}
        if text is not None and videos is not None:
            samples = [text] if isinstance(text, str) else text
            num_placeholders = sum(sample.count(self.video_token) for sample in samples)
            num_videos = len(make_batched_videos(videos))
            if num_placeholders != num_videos:
                raise ValueError(
                    f"the text has {num_placeholders} {self.video_token} for {num_videos} videos: put one into the "
                    "text for each video"
                )
        return super().__call__(images=images, text=text, videos=videos, audio=audio, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """
        Overrides ProcessorMixin.from_pretrained: also takes upstream checkpoints, and config-only ones, whose
        tokenizer comes from their base model.

        Args:
            pretrained_model_name_or_path: Folder or Hub repository, ours or upstream's.
            kwargs: As upstream.

        Raises:
            ValueError: If the checkpoint is of another backbone; the message names its processor.
        """
        with suppress(ImportError):  # a checkpoint's own code knows of no other backbone
            check_processor(cls, pretrained_model_name_or_path, kwargs)
        base, revision = base_model_of(pretrained_model_name_or_path, kwargs)
        if base is not None:
            kwargs |= {"trust_remote_code": False, "revision": revision or "main", "subfolder": ""}
            pretrained_model_name_or_path = base
        processor = load_as_it_is(super().from_pretrained, pretrained_model_name_or_path, **kwargs)
        if not isinstance(processor.video_processor, cls.own_video_processor):
            # From the file: upstream's class has filled in its defaults.
            processor.video_processor = cls.own_video_processor.from_pretrained(
                pretrained_model_name_or_path, **kwargs
            )
        return processor

    def to_dict(self) -> dict:
        """Overrides ProcessorMixin.to_dict: without `trust_remote_code` the files load as upstream's."""
        auto_map = {name: self.backbone.auto_map()[name] for name in ("AutoProcessor", "AutoVideoProcessor")}
        return super().to_dict() | {"processor_class": self.backbone.upstream_processor, "auto_map": auto_map}

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> list[str]:
        """Overrides ProcessorMixin.save_pretrained: aside first, with the code beside the settings."""
        return _save_with_code(super().save_pretrained, self.backbone, save_directory, push_to_hub, **kwargs)


def _save_with_code(save, backbone: Backbone, save_directory, push_to_hub: bool, **kwargs) -> list[str]:
    """Upstream's `save` into a folder of its own, and the code."""
    if push_to_hub:
        kwargs.setdefault("repo_id", Path(save_directory).name)
    with written_aside(save_directory) as folder:
        save_remote_code(folder, backbone)
        files = save(folder, push_to_hub=push_to_hub, **kwargs)
    return [os.path.join(save_directory, os.path.relpath(file, folder)) for file in files]


def has_video_file(videos) -> bool:
    """Whether anything in a (nested) list of videos has to be decoded."""
    return any(is_video_file(video) or _is_image_files(video) for video in _flat(videos))


def _flat(videos, depth: int = 0) -> list:
    """The videos of a nested list; a list of frames is one video, as one of image files is in a chat of a batch."""
    if videos is None:
        return []
    if not isinstance(videos, (list, tuple)):
        return [videos]
    if not videos or not (isinstance(videos[0], (list, tuple)) or is_video_file(videos[0]) or _is_frames(videos[0])):
        return [videos]  # a list of images: one video
    if depth == 2 and _is_image_files(videos):
        return [videos]
    return [flat for video in videos for flat in _flat(video, depth + 1)]


def _is_image_files(video) -> bool:
    return isinstance(video, (list, tuple)) and len(video) > 0 and all(map(is_video_file, video))


def _is_frames(video) -> bool:
    return isinstance(video, (np.ndarray, torch.Tensor)) and video.ndim >= 4
