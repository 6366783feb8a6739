"""From video files and text to the model's inputs."""

import numpy as np
from transformers import Qwen3VLProcessor, Qwen3VLVideoProcessor
from transformers.video_utils import VideoMetadata

from ..processing import HoliTomProcessorMixin, HoliTomVideoProcessorMixin
from .backbone import BACKBONE


class HoliTomQwen3VLVideoProcessor(HoliTomVideoProcessorMixin, Qwen3VLVideoProcessor):
    """
    `Qwen3VLVideoProcessor` that decodes with PyAV: as upstream `fps` frames per second, by default 2 of them, between
    `min_frames` and `max_frames`; or `num_frames`, which upstream takes beside `fps=None` only. `size` bounds frames
    times height times width of a video.
    """

    backbone = BACKBONE
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


class HoliTomQwen3VLProcessor(HoliTomProcessorMixin, Qwen3VLProcessor):
    """
    `Qwen3VLProcessor` whose videos may be files, bytes or URLs, decoded by [`HoliTomQwen3VLVideoProcessor`]: the times
    in the prompt are those of the frames that were taken.
    """

    backbone = BACKBONE
    own_video_processor = HoliTomQwen3VLVideoProcessor


__all__ = ["HoliTomQwen3VLProcessor", "HoliTomQwen3VLVideoProcessor"]
