"""The names of Qwen3.5's classes."""

from ...checkpoints.backbone import Backbone


BACKBONE = Backbone(
    model_type="qwen3_5",
    title="Qwen3.5",
    config="HoliTomQwen3_5Config",
    model="HoliTomQwen3_5Model",
    generation="HoliTomQwen3_5ForConditionalGeneration",
    processor="HoliTomQwen3_5Processor",
    video_processor="HoliTomQwen3_5VideoProcessor",
    upstream_processor="Qwen3VLProcessor",
    fixed_settings=("vision_method", "newline_position", "virtual_unmerging"),
    keeps_positions=True,
)
