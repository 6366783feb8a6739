"""Upstream's checks of processors and video processors."""

import unittest

from transformers import ProcessorMixin
from upstream_tests.test_processing_common import ProcessorTesterMixin
from upstream_tests.test_video_processing_common import VideoProcessingTestMixin, prepare_video_inputs

from holitom_hf import HoliTomProcessor, HoliTomVideoProcessor
from holitom_hf.bundled.tiny_model import tiny_processor


class TestProcessor(ProcessorTesterMixin, unittest.TestCase):
    processor_class = HoliTomProcessor
    images_unstructured_max_length = 400  # an image of the mixin's shape has more tokens than its default

    @staticmethod
    def does_processor_return_mm_offsets(processor_class, method_name):
        """Overrides ProcessorTesterMixin's, which looks for the method at the first base, a mixin of ours."""
        return getattr(processor_class, method_name) is not getattr(ProcessorMixin, method_name)

    @staticmethod
    def prepare_processor_dict():
        return {
            "num_image_tokens": 64,
            "vision_feature_select_strategy": "full",
            "chat_template": tiny_processor().chat_template,
        }

    @classmethod
    def _setup_from_components(cls):
        return tiny_processor(side=32, patch=4)


class VideoProcessorTester:
    """What upstream's mixin asks of its tester."""

    batch_size, num_frames, num_channels, min_resolution, max_resolution = 5, 8, 3, 30, 80

    def prepare_video_inputs(self, equal_resolution=False, return_tensors="pil"):
        return prepare_video_inputs(
            batch_size=self.batch_size,
            num_frames=self.num_frames,
            num_channels=self.num_channels,
            min_resolution=self.min_resolution,
            max_resolution=self.max_resolution,
            equal_resolution=equal_resolution,
            return_tensors=return_tensors,
        )

    def expected_output_video_shape(self, videos):
        return self.num_frames, self.num_channels, 20, 20


class TestVideoProcessor(VideoProcessingTestMixin, unittest.TestCase):
    fast_video_processing_class = HoliTomVideoProcessor

    def test_video_processor_from_dict_with_kwargs(self):
        """Overrides VideoProcessingTestMixin's, which is about crops, too; this model's videos are not cropped."""
        video_processor = HoliTomVideoProcessor.from_dict(self.video_processor_dict)
        assert dict(video_processor.size) == self.video_processor_dict["size"]
        video_processor = HoliTomVideoProcessor.from_dict(self.video_processor_dict, size={"height": 42, "width": 40})
        assert dict(video_processor.size) == {"height": 42, "width": 40}

    def setUp(self):
        super().setUp()
        self.video_processor_tester = VideoProcessorTester()
        self.video_processor_dict = {"size": {"height": 20, "width": 20}, "do_resize": True, "do_normalize": True}
