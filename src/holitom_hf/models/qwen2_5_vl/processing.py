"""From video files and text to the model's inputs."""

import math
from functools import partial

import numpy as np
from transformers import Qwen2_5_VLProcessor, Qwen2VLVideoProcessor
from transformers.video_utils import VideoMetadata

from ..processing import HoliTomProcessorMixin
from ..qwen_vl.limits import QwenVideoProcessorMixin
from .backbone import BACKBONE


class HoliTomQwen2_5_VLVideoProcessor(QwenVideoProcessorMixin, Qwen2VLVideoProcessor):
    """
    `Qwen2VLVideoProcessor` that decodes with PyAV. Files are sampled as Qwen's own tools do, `fps` frames per second
    (by default 2), between `min_frames` and `max_frames` and in pairs; or `num_frames` are taken, as many as it says.

    Arrays, tensors and lists of images are taken as upstream takes them: whole, unless `do_sample_frames=True`, which
    rounds `num_frames` to pairs. `min_pixels` and `max_pixels`, upstream's `size`, bound height times width of a
    frame.
    """

    backbone = BACKBONE
    upstream_class = Qwen2VLVideoProcessor
    fewest_frames = Qwen2VLVideoProcessor.temporal_patch_size
    do_sample_frames = None
    fps = 2

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
        Overrides Qwen2VLVideoProcessor.sample_frames, which spaces frames differently from Qwen's tools, takes one too
        many where that spacing is no whole number, and rounds what is asked to pairs.

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
        total = metadata.total_num_frames
        num_frames = self.asked_frames(metadata, num_frames, fps)
        if num_frames is None:
            if metadata.fps is None:
                raise ValueError("sampling by fps needs the video's own frame rate: pass video_metadata with fps")
            pair, limits = self.temporal_patch_size, self.within(min_frames, max_frames)
            fewest = math.ceil(limits.min_frames / pair) * pair
            at_rate = total / metadata.fps * (fps or self.fps)
            num_frames = max(1, int(min(max(at_rate, fewest), limits.max_frames, total)) // pair * pair)
        return np.linspace(0, total - 1, num_frames).round().astype(int)

    def _decode_and_sample_videos(self, videos, video_metadata, do_sample_frames=None, sample_indices_fn=None):
        """Overrides BaseVideoProcessor._decode_and_sample_videos: what is in memory is sampled by upstream."""
        if sample_indices_fn is not None:
            sample_indices_fn = partial(super().sample_frames, **sample_indices_fn.keywords)
        return super()._decode_and_sample_videos(videos, video_metadata, do_sample_frames, sample_indices_fn)


class HoliTomQwen2_5_VLProcessor(HoliTomProcessorMixin, Qwen2_5_VLProcessor):
    """
    `Qwen2_5_VLProcessor` whose videos may be files, bytes or URLs, decoded by [`HoliTomQwen2_5_VLVideoProcessor`]:
    `second_per_grid_ts`, how long a temporal patch lasts, is that of the frames that were taken.
    """

    backbone = BACKBONE
    own_video_processor = HoliTomQwen2_5_VLVideoProcessor


__all__ = ["HoliTomQwen2_5_VLProcessor", "HoliTomQwen2_5_VLVideoProcessor"]
