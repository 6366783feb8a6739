"""What the processors of all models do alike: a rate for each request, and caches that know it."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property

import torch
from transformers import BatchFeature
from vllm.config.multimodal import MultiModalDummyOptions
from vllm.inputs import MultiModalHashes
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import MultiModalDataItems
from vllm.multimodal.processing import ProcessorInputs

from ..configuration import HoliTomConfig
from .checkpoint import served_settings
from .settings import RATIO, request_settings


class HoliTomProcessingInfoMixin:
    """For a model's `ProcessingInfo`, before upstream's class: the settings videos are compressed with."""

    keeps_positions = False

    @cached_property
    def settings(self) -> HoliTomConfig:
        """Those that a request changes the rate of."""
        return served_settings(self.ctx.model_config, self.keeps_positions)

    def request_settings(self, mm_processor_kwargs: Mapping[str, object]) -> HoliTomConfig:
        """Those of one request."""
        return request_settings(self.settings, mm_processor_kwargs)


class HoliTomMultiModalProcessorMixin:
    """For a model's `MultiModalProcessor`, before upstream's class: each video's rate travels beside its pixels."""

    # Of what upstream's processor returns: holds one entry for each video.
    per_video: str

    def get_dummy_inputs(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: MultiModalDummyOptions
    ) -> ProcessorInputs:
        """
        Overrides BaseMultiModalProcessor.get_dummy_inputs: profiling tries an uncompressed video, whose pixels the
        encoder needs memory for whatever is left of it, and which a request may ask for.
        """
        inputs = super().get_dummy_inputs(seq_len, mm_counts, mm_options)
        return replace(inputs, hf_processor_mm_kwargs={**inputs.hf_processor_mm_kwargs, RATIO: 1.0})

    def _get_mm_hashes(self, inputs: ProcessorInputs) -> MultiModalHashes:
        """Overrides BaseMultiModalProcessor._get_mm_hashes: all caches tell videos of other settings apart."""
        settings = {"holitom_config": self.info.settings.to_dict()}
        kwargs = {**inputs.hf_processor_mm_kwargs, **settings}
        return super()._get_mm_hashes(replace(inputs, hf_processor_mm_kwargs=kwargs))

    def _apply_hf_processor_main(self, mm_items: MultiModalDataItems, hf_kwargs: Mapping[str, object]) -> BatchFeature:
        """Overrides BaseMultiModalProcessor._apply_hf_processor_main: the rate is not transformers' business."""
        settings = self.info.request_settings(hf_kwargs)
        upstream_kwargs = {name: value for name, value in hf_kwargs.items() if name != RATIO}
        outputs = super()._apply_hf_processor_main(mm_items, upstream_kwargs)
        if self.per_video in outputs:
            num_videos = len(outputs[self.per_video])
            outputs[RATIO] = torch.full((num_videos,), settings.retention_ratio, dtype=torch.float64)
        return outputs

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        """Overrides BaseMultiModalProcessor._get_mm_fields_config: with the rate."""
        fields = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)
        return {**fields, RATIO: MultiModalFieldConfig.batched("video", keep_on_cpu=True)}
