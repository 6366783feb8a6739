"""The names of Qwen2.5-VL's classes."""

from ...checkpoints.backbone import Backbone


BACKBONE = Backbone(
    model_type="qwen2_5_vl",
    title="Qwen2.5-VL",
    config="HoliTomQwen2_5_VLConfig",
    model="HoliTomQwen2_5_VLModel",
    generation="HoliTomQwen2_5_VLForConditionalGeneration",
    processor="HoliTomQwen2_5_VLProcessor",
    video_processor="HoliTomQwen2_5_VLVideoProcessor",
    upstream_processor="Qwen2_5_VLProcessor",
    fixed_settings=("vision_method", "newline_position", "virtual_unmerging"),
    keeps_positions=True,
)
