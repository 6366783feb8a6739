"""From video files and text to the model's inputs."""

import numpy as np
from transformers import LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor
from transformers.image_processing_utils import BatchFeature
from transformers.video_utils import VideoMetadata

from ..processing import HoliTomProcessorMixin, HoliTomVideoProcessorMixin
from .backbone import BACKBONE


class HoliTomVideoProcessor(HoliTomVideoProcessorMixin, LlavaOnevisionVideoProcessor):
    """
    `LlavaOnevisionVideoProcessor` that decodes with PyAV and samples as LLaVA-OneVision's authors do. It takes videos
    of different numbers of frames in one call: then `pixel_values_videos` is a list.

    Files are sampled: `num_frames` uniformly from the first frame to the last, or `fps` of them per second. Arrays,
    tensors and lists of images are taken as they are unless `do_sample_frames=True`.
    """

    backbone = BACKBONE
    upstream_class = LlavaOnevisionVideoProcessor
    num_frames = 32
    do_sample_frames = None

    def sample_frames(
        self, metadata: VideoMetadata, num_frames: int | None = None, fps: float | None = None, **kwargs
    ) -> np.ndarray:
        """
        Overrides BaseVideoProcessor.sample_frames: uniformly with both ends, `linspace(0, n - 1)`, as the authors do.

        Args:
            metadata: Of the video.
            num_frames: How many frames; `None`: at most `self.num_frames`.
            fps: How many per second of video instead.

        Returns:
            Ascending indices.

        Raises:
            ValueError: If both are passed, one is not positive, or the video has fewer frames than asked.
        """
        total = metadata.total_num_frames
        num_frames = self.asked_frames(metadata, num_frames, fps)
        if fps is not None:
            if metadata.fps is None:
                raise ValueError("sampling by fps needs the video's own frame rate: pass video_metadata with fps")
            num_frames = max(1, min(total, int(total / metadata.fps * fps)))
            return np.arange(num_frames) * total // num_frames
        return np.linspace(0, total - 1, total if num_frames is None else num_frames, dtype=int)

    def _preprocess(self, videos, *args, return_tensors=None, **kwargs) -> BatchFeature:
        """Overrides BaseVideoProcessor._preprocess: videos of different numbers of frames stay a list."""
        features = super()._preprocess(videos, *args, return_tensors=None, **kwargs)
        # Decoded frames have their colours last in memory; what callers `view` has them first.
        videos = [video.contiguous() for video in features["pixel_values_videos"]]
        if len({video.shape for video in videos}) > 1:
            videos = [BatchFeature({"video": video}, tensor_type=return_tensors)["video"] for video in videos]
            return_tensors = None
        features["pixel_values_videos"] = videos
        return features.convert_to_tensors(return_tensors)


class HoliTomProcessor(HoliTomProcessorMixin, LlavaOnevisionProcessor):
    """`LlavaOnevisionProcessor` whose videos may be files, bytes or URLs, decoded by [`HoliTomVideoProcessor`]."""

    backbone = BACKBONE
    own_video_processor = HoliTomVideoProcessor
    # Already tensors, or a list of them where videos differ in length.
    skip_tensor_conversion = (*LlavaOnevisionProcessor.skip_tensor_conversion, "pixel_values_videos")


__all__ = ["HoliTomProcessor", "HoliTomVideoProcessor"]
