"""Qwen3.5 and Qwen3.5-MoE in vLLM with stages 1 and 2: the encoder is Qwen3-VL's without DeepStack."""

from vllm.model_executor.models.qwen3_5 import (
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeProcessingInfo,
    Qwen3_5ProcessingInfo,
)
from vllm.model_executor.models.qwen3_vl import Qwen3VLDummyInputsBuilder
from vllm.multimodal import MULTIMODAL_REGISTRY

from .qwen3_vl import HoliTomQwen3VLMixin, HoliTomQwen3VLMultiModalProcessor, HoliTomQwen3VLProcessingInfo


class HoliTomQwen3_5ProcessingInfo(HoliTomQwen3VLProcessingInfo, Qwen3_5ProcessingInfo):
    """`Qwen3_5ProcessingInfo` with settings."""


class HoliTomQwen3_5MoeProcessingInfo(HoliTomQwen3VLProcessingInfo, Qwen3_5MoeProcessingInfo):
    """`Qwen3_5MoeProcessingInfo` with settings."""


@MULTIMODAL_REGISTRY.register_processor(
    HoliTomQwen3VLMultiModalProcessor,
    info=HoliTomQwen3_5ProcessingInfo,
    dummy_inputs=Qwen3VLDummyInputsBuilder,
)
class HoliTomQwen3_5ForConditionalGeneration(HoliTomQwen3VLMixin, Qwen3_5ForConditionalGeneration):
    """vLLM's `Qwen3_5ForConditionalGeneration` whose encoder shortens videos."""


@MULTIMODAL_REGISTRY.register_processor(
    HoliTomQwen3VLMultiModalProcessor,
    info=HoliTomQwen3_5MoeProcessingInfo,
    dummy_inputs=Qwen3VLDummyInputsBuilder,
)
class HoliTomQwen3_5MoeForConditionalGeneration(HoliTomQwen3VLMixin, Qwen3_5MoeForConditionalGeneration):
    """vLLM's `Qwen3_5MoeForConditionalGeneration` whose encoder shortens videos."""
