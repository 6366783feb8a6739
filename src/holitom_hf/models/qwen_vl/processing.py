"""What the video processors of Qwen3-VL and of the families after it share."""

import numpy as np
from transformers import Qwen3VLVideoProcessor
from transformers.video_utils import VideoMetadata

from ..processing import HoliTomVideoProcessorMixin


class TimedVideosKwargs(Qwen3VLVideoProcessor.valid_kwargs, total=False):
    """
    min_pixels (`int`, *optional*):
        The fewest pixels of a video, all frames together.
    max_pixels (`int`, *optional*):
        The most pixels of a video, all frames together.
    """

    min_pixels: int
    max_pixels: int


class TimedVideoProcessorMixin(HoliTomVideoProcessorMixin):
    """
    For the video processor of a backbone whose prompts tell the times of frames, before `Qwen3VLVideoProcessor`, which
    takes `num_frames` beside `fps=None` only.
    """

    upstream_class = Qwen3VLVideoProcessor
    fewest_frames = Qwen3VLVideoProcessor.temporal_patch_size

    def sample_frames(
        self, metadata: VideoMetadata, num_frames: int | None = None, fps: float | None = None, **kwargs
    ) -> np.ndarray:
        """
        Overrides Qwen3VLVideoProcessor.sample_frames: a number of frames may be asked for, whatever the class's rate.

        Args:
            metadata: Of the video.
            num_frames: How many frames; `None`: at most `self.num_frames`, or by rate.
            fps: How many per second of video; `None`: `self.fps`.

        Returns:
            Ascending indices, both ends among them.

        Raises:
            ValueError: If both are passed, one is not positive, or the video has fewer frames than asked.
        """
        num_frames = self.asked_frames(metadata, num_frames, fps)
        return super().sample_frames(metadata, num_frames=num_frames, fps=fps)
