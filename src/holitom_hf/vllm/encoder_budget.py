"""How many videos the engine encodes in one step: no more than it would uncompressed."""

from vllm.config import VllmConfig
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
from vllm.v1.request import Request

from ..configuration import HoliTomConfig
from .settings import RATIO


class UncompressedBudgetManager(EncoderCacheManager):
    """
    vLLM's `EncoderCacheManager`, which weighs what a step encodes by its uncompressed size.

    The scheduler counts the encoder's work in tokens that are left. By that count several times as many videos enter a
    step as uncompressed, and the first tokens of all wait for the encoding of the last. What is larger than a step's
    budget is encoded alone. The size of the cache, and all that lies in it, are counted as vLLM does.
    """

    def __init__(self, cache_size: int) -> None:
        super().__init__(cache_size)
        self.settings, self.step_budget = HoliTomConfig(), cache_size
        self.num_scheduled = 0

    @classmethod
    def create_manager(cls, *, cache_size: int, vllm_config: VllmConfig) -> "UncompressedBudgetManager":
        """Overrides EncoderCacheManager.create_manager: a step's budget is what vLLM gives an uncompressed model."""
        manager = super().create_manager(cache_size=cache_size, vllm_config=vllm_config)
        manager.settings = HoliTomConfig.coerce(vllm_config.model_config.hf_config.holitom_config)
        manager.step_budget = vllm_config.scheduler_config.max_num_encoder_input_tokens
        return manager

    def can_allocate(
        self, request: Request, input_id: int, encoder_compute_budget: int, num_embeds_to_schedule: int
    ) -> bool:
        """Overrides EncoderCacheManager.can_allocate: and not if this step encodes something, and this is too much."""
        cost = self.num_uncompressed(request.mm_features[input_id])
        if self.num_scheduled and self.num_scheduled + cost > self.step_budget:
            return False
        if not super().can_allocate(request, input_id, encoder_compute_budget, num_embeds_to_schedule):
            return False
        self.num_scheduled += cost
        return True

    def get_manager_metadata(self):
        """Overrides EncoderCacheManager.get_manager_metadata, which is asked for at the end of a step: one begins."""
        self.num_scheduled = 0
        return super().get_manager_metadata()

    def num_uncompressed(self, feature: MultiModalFeatureSpec) -> int:
        """
        Tokens of an input before it is compressed. A video's rate is the model's where the input comes without its
        own, as with vLLM's caches in shared memory.
        """
        num_embeds = feature.mm_position.get_num_embeds()
        if feature.modality != "video" or self.settings.outer_method == "none":
            return num_embeds
        has_rate = feature.data is not None and RATIO in feature.data
        return round(num_embeds / (feature.data[RATIO].data.item() if has_rate else self.settings.retention_ratio))
