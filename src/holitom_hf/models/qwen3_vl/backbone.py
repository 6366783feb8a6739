"""The names of Qwen3-VL's classes."""

from ...checkpoints.backbone import Backbone


BACKBONE = Backbone(
    model_type="qwen3_vl",
    title="Qwen3-VL",
    config="HoliTomQwen3VLConfig",
    model="HoliTomQwen3VLModel",
    generation="HoliTomQwen3VLForConditionalGeneration",
    processor="HoliTomQwen3VLProcessor",
    video_processor="HoliTomQwen3VLVideoProcessor",
    upstream_processor="Qwen3VLProcessor",
    fixed_settings=("vision_method", "newline_position", "virtual_unmerging"),
    keeps_positions=True,
)
