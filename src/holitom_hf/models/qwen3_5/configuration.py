"""`Qwen3_5Config` with compression settings."""

from transformers import Qwen3_5Config

from ...configuration import HoliTomConfig
from ..configuration import HoliTomConfigMixin
from .backbone import BACKBONE


class HoliTomQwen3_5Config(HoliTomConfigMixin, Qwen3_5Config):
    """
    `Qwen3_5Config` with the compression settings in `holitom_config`. `model_type` stays `"qwen3_5"`, so that the
    saved file also loads as upstream's.

    Args:
        holitom_config: A [`HoliTomConfig`], a dictionary of its fields, a preset's name or a path; `None` takes the
            defaults.
        kwargs: As in `Qwen3_5Config`.

    Raises:
        ValueError: If a setting is out of range, or not for this model.
    """

    backbone = BACKBONE

    holitom_config: HoliTomConfig | dict | str | None = None


__all__ = ["HoliTomConfig", "HoliTomQwen3_5Config"]
