"""`Qwen2_5_VLConfig` with compression settings."""

from transformers import Qwen2_5_VLConfig

from ...configuration import HoliTomConfig
from ..configuration import HoliTomConfigMixin
from .backbone import BACKBONE


class HoliTomQwen2_5_VLConfig(HoliTomConfigMixin, Qwen2_5_VLConfig):
    """
    `Qwen2_5_VLConfig` with the compression settings in `holitom_config`. `model_type` stays `"qwen2_5_vl"`, so that
    the saved file also loads as upstream's.

    Args:
        holitom_config: A [`HoliTomConfig`], a dictionary of its fields, a preset's name or a path; `None` takes the
            defaults.
        kwargs: As in `Qwen2_5_VLConfig`.

    Raises:
        ValueError: If a setting is out of range, or not for this model.
    """

    backbone = BACKBONE

    holitom_config: HoliTomConfig | dict | str | None = None


__all__ = ["HoliTomConfig", "HoliTomQwen2_5_VLConfig"]
