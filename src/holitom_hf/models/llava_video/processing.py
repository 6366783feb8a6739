"""From video files and text to LLaVA-Video's inputs."""

import math

import numpy as np
from transformers.processing_utils import VideosKwargs
from transformers.video_utils import VideoMetadata

from ..llava_onevision.processing import HoliTomProcessor, HoliTomVideoProcessor
from .backbone import BACKBONE
from .configuration import HoliTomLlavaVideoConfig  # noqa: F401 - registered, which loading a tokenizer needs
from .layout import GRID, VideoLayout


class LlavaVideoVideosKwargs(VideosKwargs, total=False):
    """What a call may say of its videos."""

    add_time_instruction: bool


class HoliTomLlavaVideoVideoProcessor(HoliTomVideoProcessor):
    """
    `HoliTomVideoProcessor` that samples as LLaVA-Video's authors do: `fps` frames per second, by default one; where
    those would be more than `num_frames`, by default 64, as many uniformly from the first frame to the last. What a
    call asks for, `num_frames` or `fps`, is what it gets.

    Attributes:
        add_time_instruction: Whether [`HoliTomLlavaVideoProcessor`] tells of a video's length and of the times of its
            frames; an argument of a call, too.
    """

    backbone = BACKBONE
    valid_kwargs = LlavaVideoVideosKwargs
    image_mean = (0.5, 0.5, 0.5)
    image_std = (0.5, 0.5, 0.5)
    num_frames = 64
    fps = 1
    add_time_instruction = False
    return_metadata = True

    def sample_frames(
        self, metadata: VideoMetadata, num_frames: int | None = None, fps: float | None = None, **kwargs
    ) -> np.ndarray:
        """
        Overrides HoliTomVideoProcessor.sample_frames: every n-th frame, n being the video's rate by `fps`, rounded.

        Args:
            metadata: Of the video.
            num_frames: How many frames, uniformly with both ends.
            fps: How many per second of video; `None`: `self.fps`, but no more than `self.num_frames` of them.

        Returns:
            Ascending indices.

        Raises:
            ValueError: If both are passed, one is not positive, or the video has fewer frames than asked.
        """
        self.asked_frames(metadata, num_frames, fps)
        rate = fps or self.fps
        if num_frames is not None or not rate or (metadata.fps is None and fps is None):
            return super().sample_frames(metadata, num_frames=num_frames)
        if metadata.fps is None:
            raise ValueError("sampling by fps needs the video's own frame rate: pass video_metadata with fps")
        indices = np.arange(0, metadata.total_num_frames, max(1, round(metadata.fps / rate)))
        if fps is None and self.num_frames and len(indices) > self.num_frames:
            return super().sample_frames(metadata)
        return indices


class HoliTomLlavaVideoProcessor(HoliTomProcessor):
    """
    `HoliTomProcessor` with as many placeholders as LLaVA-Video has tokens.

    `add_time_instruction=True` puts a sentence behind each video, which says how long it is and when the frames that
    were taken stand in it. The checkpoint's default is that of the video processor.

    Args:
        spatial_pool_mode, spatial_pool_stride, newline_layout: As in [`HoliTomLlavaVideoConfig`], and as the model has
            them.
        The rest: as in `LlavaOnevisionProcessor`.
    """

    backbone = BACKBONE
    own_video_processor = HoliTomLlavaVideoVideoProcessor

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        video_processor=None,
        num_image_tokens=None,
        vision_feature_select_strategy=None,
        chat_template=None,
        image_token="<image>",
        video_token="<video>",
        vision_aspect_ratio="anyres_max_9",
        spatial_pool_mode="average",
        spatial_pool_stride=2,
        newline_layout=GRID,
        **kwargs,
    ):
        super().__init__(
            image_processor,
            tokenizer,
            video_processor,
            num_image_tokens=num_image_tokens,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            video_token=video_token,
            vision_aspect_ratio=vision_aspect_ratio,
            **kwargs,
        )
        self.spatial_pool_mode = spatial_pool_mode
        self.spatial_pool_stride = spatial_pool_stride
        self.newline_layout = newline_layout

    @property
    def layout(self) -> VideoLayout:
        """From a frame's patches to its tokens."""
        side = math.isqrt(self.num_image_tokens)
        return VideoLayout(side, self.spatial_pool_mode, self.spatial_pool_stride, self.newline_layout)

    def replace_video_token(self, video_inputs: dict, video_idx: int, **kwargs) -> str:
        """Overrides LlavaOnevisionProcessor.replace_video_token: as the layout has it, and the time instruction."""
        num_frames = len(video_inputs["pixel_values_videos"][video_idx])
        placeholders = self.video_token * self.layout.num_tokens(num_frames)
        if not kwargs.get("add_time_instruction", self.video_processor.add_time_instruction):
            return placeholders
        if "video_metadata" not in video_inputs:
            raise ValueError("the time instruction needs the videos' metadata: leave out return_metadata=False")
        return f"{placeholders}\n{time_instruction(video_inputs['video_metadata'][video_idx], num_frames)}"

    def _get_num_multimodal_tokens(self, image_sizes=None, video_sizes=None, **kwargs):
        """Overrides LlavaOnevisionProcessor._get_num_multimodal_tokens: as the layout has it."""
        counts = super()._get_num_multimodal_tokens(image_sizes=image_sizes, **kwargs)
        if video_sizes is not None:
            counts.num_video_tokens = [self.layout.num_tokens(num_frames) for num_frames, _, _ in video_sizes]
        return counts


def time_instruction(metadata: VideoMetadata, num_frames: int) -> str:
    """
    What LLaVA-Video was trained to be told of a video, letter by letter.

    Args:
        metadata: With the video's rate, and the frames that were taken where these are not all.
        num_frames: How many were taken.

    Raises:
        ValueError: If it does not know the rate or which frames were taken, or knows another number of them.
    """
    taken = metadata.frames_indices
    if taken is None and metadata.total_num_frames == num_frames:
        taken = range(num_frames)
    if metadata.fps is None or taken is None:
        raise ValueError(
            "add_time_instruction=True needs to know when frames were taken: pass a file, or video_metadata with fps, "
            "and with frames_indices where the frames are not all of the video's"
        )
    if len(taken) != num_frames:
        raise ValueError(f"video_metadata has {len(taken)} frames_indices for a video of {num_frames} frames")
    times = ",".join(f"{index / metadata.fps:.2f}s" for index in taken)
    return (
        f"The video lasts for {metadata.total_num_frames / metadata.fps:.2f} seconds, and "
        f"{num_frames} frames are uniformly sampled from it. These frames are located at {times}."
        "Please answer the following questions related to this video."
    )


__all__ = ["HoliTomLlavaVideoProcessor", "HoliTomLlavaVideoVideoProcessor"]
