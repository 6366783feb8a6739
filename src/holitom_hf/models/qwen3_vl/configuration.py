"""`Qwen3VLConfig` with compression settings."""

from transformers import Qwen3VLConfig

from ...configuration import HoliTomConfig
from ..configuration import HoliTomConfigMixin
from .backbone import BACKBONE


class HoliTomQwen3VLConfig(HoliTomConfigMixin, Qwen3VLConfig):
    """
    `Qwen3VLConfig` with the compression settings in `holitom_config`. `model_type` stays `"qwen3_vl"`, so that the
    saved file also loads as upstream's.

    Args:
        holitom_config: A [`HoliTomConfig`], a dictionary of its fields, a preset's name or a path; `None` takes the
            defaults.
        kwargs: As in `Qwen3VLConfig`.

    Raises:
        ValueError: If a setting is out of range, or not for this model.
    """

    backbone = BACKBONE

    holitom_config: HoliTomConfig | dict | str | None = None


__all__ = ["HoliTomConfig", "HoliTomQwen3VLConfig"]
