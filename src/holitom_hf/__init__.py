"""HoliTom, holistic token merging for video LLMs (NeurIPS 2025), as a native part of transformers."""

from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_holitom import HoliTomConfig, HoliTomLlavaOnevisionConfig
from .modeling_holitom import (
    HoliTomLlavaOnevisionForConditionalGeneration,
    HoliTomLlavaOnevisionModel,
    HoliTomQwen2Model,
)
from .pipeline_holitom import VideoTextToTextPipeline
from .processing_holitom import HoliTomProcessor, HoliTomVideoProcessor


__version__ = "0.1.0"
__all__ = [
    "HoliTomConfig",
    "HoliTomLlavaOnevisionConfig",
    "HoliTomLlavaOnevisionForConditionalGeneration",
    "HoliTomLlavaOnevisionModel",
    "HoliTomProcessor",
    "HoliTomQwen2Model",
    "HoliTomVideoProcessor",
    "VideoTextToTextPipeline",
]

PIPELINE_REGISTRY.register_pipeline(
    "video-text-to-text",
    pipeline_class=VideoTextToTextPipeline,
    pt_model=HoliTomLlavaOnevisionForConditionalGeneration,
    type="multimodal",
)
