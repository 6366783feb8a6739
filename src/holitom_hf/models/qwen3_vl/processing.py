"""From video files and text to the model's inputs."""

import numpy as np
from transformers import Qwen3VLProcessor, Qwen3VLVideoProcessor
from transformers.video_utils import VideoMetadata

from ..processing import HoliTomProcessorMixin
from ..qwen_vl.processing import QwenVideoProcessorMixin
from .backbone import BACKBONE


class HoliTomQwen3VLVideosKwargs(Qwen3VLVideoProcessor.valid_kwargs, total=False):
    """
    min_pixels (`int`, *optional*):
        The fewest pixels of a video, all frames together.
    max_pixels (`int`, *optional*):
        The most pixels of a video, all frames together.
    """

    min_pixels: int
    max_pixels: int


class HoliTomQwen3VLVideoProcessor(QwenVideoProcessorMixin, Qwen3VLVideoProcessor):
    """
    `Qwen3VLVideoProcessor` that decodes with PyAV: as upstream `fps` frames per second, by default 2 of them, between
    `min_frames` and `max_frames`; or `num_frames`, which upstream takes beside `fps=None` only. `min_pixels` and
    `max_pixels`, upstream's `size`, bound frames times height times width of a video.
    """

    backbone = BACKBONE
    upstream_class = Qwen3VLVideoProcessor
    valid_kwargs = HoliTomQwen3VLVideosKwargs
    fewest_frames = Qwen3VLVideoProcessor.temporal_patch_size

    def sample_frames(
        self,
        metadata: VideoMetadata,
        num_frames: int | None = None,
        fps: float | None = None,
        min_frames: int | None = None,
        max_frames: int | None = None,
        **kwargs,
    ) -> np.ndarray:
        """
        Overrides Qwen3VLVideoProcessor.sample_frames: a number of frames may be asked for, whatever the class's rate,
        and a call's limits count.

        Args:
            metadata: Of the video.
            num_frames: How many frames; `None`: at most `self.num_frames`, or by rate.
            fps: How many per second of video; `None`: `self.fps`.
            min_frames, max_frames: By rate no fewer and no more; `None`: the processor's.

        Returns:
            Ascending indices, both ends among them.

        Raises:
            ValueError: If both are passed, one is not positive, or the video has fewer frames than asked.
        """
        num_frames = self.asked_frames(metadata, num_frames, fps)
        limited = self.within(min_frames, max_frames)
        return Qwen3VLVideoProcessor.sample_frames(limited, metadata, num_frames=num_frames, fps=fps)


class HoliTomQwen3VLProcessor(HoliTomProcessorMixin, Qwen3VLProcessor):
    """
    `Qwen3VLProcessor` whose videos may be files, bytes or URLs, decoded by [`HoliTomQwen3VLVideoProcessor`]: the times
    in the prompt are those of the frames that were taken.
    """

    backbone = BACKBONE
    own_video_processor = HoliTomQwen3VLVideoProcessor


__all__ = ["HoliTomQwen3VLProcessor", "HoliTomQwen3VLVideoProcessor"]
