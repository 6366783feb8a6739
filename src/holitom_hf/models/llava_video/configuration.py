"""LLaVA-OneVision's configuration, with what is LLaVA-Video's own."""

from typing import Any

from transformers import AutoConfig

from ...configuration import HoliTomConfig
from ..llava_onevision.configuration import HoliTomLlavaOnevisionConfig
from .backbone import BACKBONE
from .layout import GRID, VideoLayout


class HoliTomLlavaVideoConfig(HoliTomLlavaOnevisionConfig):
    """
    `HoliTomLlavaOnevisionConfig` with the pooling and the newlines of LLaVA-Video, which transformers has no class of.

    With `"grid"`, what compression leaves of a video has its newlines after rows, too: `newline_position` of
    `holitom_config` is `"row"` then, whatever is assigned.

    Args:
        spatial_pool_mode: How patches become tokens: `"bilinear"` (as many along a side as begin there: 14 of 27 with
            stride 2), `"average"` or `"max"` (as many as fit: 13 of 27).
        spatial_pool_stride: Patches of a token along a side.
        newline_layout: `"grid"`: a newline after every row of every frame; `"one_token"`: one after the video.
        kwargs: As in [`HoliTomLlavaOnevisionConfig`].

    Raises:
        ValueError: As [`HoliTomLlavaOnevisionConfig`], or if one of these is none of those that there are.
    """

    model_type = "llava_video"
    backbone = BACKBONE

    spatial_pool_mode: str = "average"
    spatial_pool_stride: int = 2
    newline_layout: str = GRID

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.holitom_config = self.in_layout(self.holitom_config)

    def __setattr__(self, key: str, value: Any) -> None:
        super().__setattr__(key, value)
        if key == "holitom_config" and "vision_config" in vars(self) and "newline_layout" in vars(self):
            super().__setattr__(key, self.in_layout(vars(self)[key]))

    def in_layout(self, settings: HoliTomConfig) -> HoliTomConfig:
        """Settings with newlines where this model has them."""
        if self.layout.newline_layout != GRID or settings.newline_position == "row":
            return settings
        return settings.overlaid({"newline_position": "row"})

    @property
    def layout(self) -> VideoLayout:
        """From a frame's patches to its tokens."""
        side = self.vision_config.image_size // self.vision_config.patch_size
        return VideoLayout(side, self.spatial_pool_mode, self.spatial_pool_stride, self.newline_layout)

    @property
    def tokens_per_frame(self) -> int:
        """Overrides HoliTomLlavaOnevisionConfig.tokens_per_frame: T, without newlines."""
        return self.layout.tokens_per_frame


# Else transformers, which reads a configuration to find a tokenizer, asks whether the checkpoint's code may be run.
AutoConfig.register(HoliTomLlavaVideoConfig.model_type, HoliTomLlavaVideoConfig, exist_ok=True)

__all__ = ["HoliTomConfig", "HoliTomLlavaVideoConfig"]
