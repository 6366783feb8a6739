"""The names of Qwen3.5-MoE's classes."""

from ...checkpoints.backbone import Backbone


BACKBONE = Backbone(
    model_type="qwen3_5_moe",
    title="Qwen3.5-MoE",
    config="HoliTomQwen3_5MoeConfig",
    model="HoliTomQwen3_5MoeModel",
    generation="HoliTomQwen3_5MoeForConditionalGeneration",
    processor="HoliTomQwen3_5MoeProcessor",
    video_processor="HoliTomQwen3_5MoeVideoProcessor",
    upstream_processor="Qwen3VLProcessor",
    fixed_settings=("vision_method", "newline_position", "virtual_unmerging"),
    keeps_positions=True,
)
