"""The names of Qwen3-VL-MoE's classes."""

from ...checkpoints.backbone import Backbone


BACKBONE = Backbone(
    model_type="qwen3_vl_moe",
    title="Qwen3-VL-MoE",
    config="HoliTomQwen3VLMoeConfig",
    model="HoliTomQwen3VLMoeModel",
    generation="HoliTomQwen3VLMoeForConditionalGeneration",
    processor="HoliTomQwen3VLMoeProcessor",
    video_processor="HoliTomQwen3VLMoeVideoProcessor",
    upstream_processor="Qwen3VLProcessor",
    fixed_settings=("vision_method", "newline_position", "virtual_unmerging"),
    keeps_positions=True,
)
