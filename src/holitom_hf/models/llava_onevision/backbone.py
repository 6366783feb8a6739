"""The names of LLaVA-OneVision's classes."""

from ...checkpoints.backbone import Backbone


BACKBONE = Backbone(
    model_type="llava_onevision",
    title="LLaVA-OneVision",
    config="HoliTomLlavaOnevisionConfig",
    model="HoliTomLlavaOnevisionModel",
    generation="HoliTomLlavaOnevisionForConditionalGeneration",
    processor="HoliTomProcessor",
    video_processor="HoliTomVideoProcessor",
    upstream_processor="LlavaOnevisionProcessor",
)
