"""Qwen3-VL-MoE in vLLM with stages 1 and 2: as Qwen3-VL there."""

from collections.abc import Iterable

import torch
from vllm.model_executor.models.qwen3_vl import Qwen3VLDummyInputsBuilder
from vllm.model_executor.models.qwen3_vl_moe import Qwen3VLMoeForConditionalGeneration, Qwen3VLMoeProcessingInfo
from vllm.multimodal import MULTIMODAL_REGISTRY

from .expert_weights import published_experts
from .qwen3_vl import HoliTomQwen3VLMixin, HoliTomQwen3VLMultiModalProcessor, HoliTomQwen3VLProcessingInfo


class HoliTomQwen3VLMoeProcessingInfo(HoliTomQwen3VLProcessingInfo, Qwen3VLMoeProcessingInfo):
    """`Qwen3VLMoeProcessingInfo` with settings."""


@MULTIMODAL_REGISTRY.register_processor(
    HoliTomQwen3VLMultiModalProcessor,
    info=HoliTomQwen3VLMoeProcessingInfo,
    dummy_inputs=Qwen3VLDummyInputsBuilder,
)
class HoliTomQwen3VLMoeForConditionalGeneration(HoliTomQwen3VLMixin, Qwen3VLMoeForConditionalGeneration):
    """vLLM's `Qwen3VLMoeForConditionalGeneration` whose encoder shortens videos."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Overrides Qwen3VLForConditionalGeneration.load_weights: experts lie either way in a checkpoint."""
        size = self.config.text_config.hidden_size
        return super().load_weights((name, published_experts(name, weight, size)) for name, weight in weights)
