"""The names of LLaVA-Video's classes."""

from ...checkpoints.backbone import Backbone


BACKBONE = Backbone(
    model_type="llava_video",
    title="LLaVA-Video",
    config="HoliTomLlavaVideoConfig",
    model="HoliTomLlavaVideoModel",
    generation="HoliTomLlavaVideoForConditionalGeneration",
    processor="HoliTomLlavaVideoProcessor",
    video_processor="HoliTomLlavaVideoVideoProcessor",
    upstream_processor="LlavaOnevisionProcessor",
    has_upstream=False,
)
