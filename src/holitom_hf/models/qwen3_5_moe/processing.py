"""From video files and text to the model's inputs."""

from transformers import Qwen3VLProcessor, Qwen3VLVideoProcessor

from ..processing import HoliTomProcessorMixin
from ..qwen_vl.limits import QwenVideoProcessorMixin
from ..qwen_vl.processing import TimedVideoProcessorMixin, TimedVideosKwargs
from .backbone import BACKBONE


class HoliTomQwen3_5MoeVideoProcessor(QwenVideoProcessorMixin, TimedVideoProcessorMixin, Qwen3VLVideoProcessor):
    """
    `Qwen3VLVideoProcessor` that decodes with PyAV: as upstream `fps` frames per second, by default 2 of them, between
    `min_frames` and `max_frames`; or `num_frames`, which upstream takes beside `fps=None` only. `min_pixels` and
    `max_pixels`, upstream's `size`, bound frames times height times width of a video.
    """

    backbone = BACKBONE
    valid_kwargs = TimedVideosKwargs


class HoliTomQwen3_5MoeProcessor(HoliTomProcessorMixin, Qwen3VLProcessor):
    """
    `Qwen3VLProcessor` whose videos may be files, bytes or URLs, decoded by
    [`HoliTomQwen3_5MoeVideoProcessor`]: the times in the prompt are those of the frames that were taken.
    """

    backbone = BACKBONE
    own_video_processor = HoliTomQwen3_5MoeVideoProcessor


__all__ = ["HoliTomQwen3_5MoeProcessor", "HoliTomQwen3_5MoeVideoProcessor"]
