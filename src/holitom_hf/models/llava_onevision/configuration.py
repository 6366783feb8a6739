"""`LlavaOnevisionConfig` with compression settings."""

from transformers import LlavaOnevisionConfig, Qwen2Config

from ...checkpoints.checkpoint import READS, is_original
from ...configuration import HoliTomConfig
from ...merging.package import of_package
from ..configuration import HoliTomConfigMixin
from .backbone import BACKBONE


converted_config = of_package("models.original.configuration", "converted_config", READS)


class HoliTomLlavaOnevisionConfig(HoliTomConfigMixin, LlavaOnevisionConfig):
    """
    `LlavaOnevisionConfig` with the compression settings in `holitom_config`. `model_type` stays `"llava_onevision"`,
    so that the saved file also loads as upstream's.

    Args:
        holitom_config: A [`HoliTomConfig`], a dictionary of its fields, a preset's name or a path; `None` takes the
            defaults.
        kwargs: As in `LlavaOnevisionConfig`.

    Raises:
        ValueError: If the text model is not Qwen2, or a setting is out of range.
    """

    backbone = BACKBONE

    holitom_config: HoliTomConfig | dict | str | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.text_config.model_type != Qwen2Config.model_type:
            raise ValueError(
                "HoliTom merges inside a Qwen2 decoder; this checkpoint's text model is "
                f"{self.text_config.model_type!r}"
            )

    @classmethod
    def get_config_dict(cls, *args, **kwargs):
        """Overrides PreTrainedConfig.get_config_dict: what LLaVA's authors wrote, in transformers' words."""
        values, unused = super().get_config_dict(*args, **kwargs)
        return converted_config(values, **kwargs) if is_original(values) else values, unused

    @property
    def tokens_per_frame(self) -> int:
        """T: a frame's patches, pooled by two along both sides."""
        side = self.vision_config.image_size // self.vision_config.patch_size
        return (-(-side // 2)) ** 2


__all__ = ["HoliTomConfig", "HoliTomLlavaOnevisionConfig"]
