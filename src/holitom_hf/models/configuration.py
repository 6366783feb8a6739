"""What the configurations of all backbones have: compression settings, and the code that runs them."""

import os
from typing import Any, ClassVar

from ..checkpoints.backbone import Backbone
from ..checkpoints.remote_code import save_remote_code
from ..configuration import HoliTomConfig


class HoliTomConfigMixin:
    """
    For the configuration of a backbone, before upstream's class. `holitom_config` in it is a [`HoliTomConfig`], saved
    with the rest, and the code that a checkpoint runs is saved beside it. A dictionary assigned to it overlays it.
    `model_type` stays upstream's, so that the saved file also loads as upstream's.

    The class declares the field, `holitom_config: HoliTomConfig | dict | str | None = None`.
    """

    backbone: ClassVar[Backbone]

    def __post_init__(self, **kwargs):
        """Overrides PreTrainedConfig.__post_init__: the classes of a checkpoint are named in it."""
        super().__post_init__(**kwargs)
        # transformers writes only the entry of the class that is being saved; a checkpoint needs all of them.
        self.auto_map = self.backbone.auto_map()
        self.custom_pipelines = self.backbone.custom_pipelines()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """Overrides PreTrainedConfig.from_dict: another architecture is an error, not a warning."""
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(
                f"HoliTom needs a {cls.model_type!r} checkpoint ({cls.backbone.title}); this one is {model_type!r}"
            )
        return super().from_dict(config_dict, **kwargs)

    def __setattr__(self, key: str, value: Any) -> None:
        if key == "holitom_config":
            value = HoliTomConfig.coerce(value, vars(self).get(key))
            self.check_settings(value)
        super().__setattr__(key, value)

    def check_settings(self, settings: HoliTomConfig) -> None:
        """Raises a `ValueError` if settings ask for what this backbone has not, whatever its sizes."""
        for name in self.backbone.fixed_settings:
            value, only, title = getattr(settings, name), getattr(HoliTomConfig, name), self.backbone.title
            if value != only:
                raise ValueError(f"{name} {value!r} is for LLaVA alone: with {title} choose {only!r}")

    def to_dict(self) -> dict[str, Any]:
        """Overrides PreTrainedConfig.to_dict: the settings become a dictionary, too."""
        values = super().to_dict()
        values["holitom_config"] = self.holitom_config.to_dict()
        values["custom_pipelines"] = self.backbone.custom_pipelines()  # pipeline() puts classes where names were
        return values

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        """Overrides PreTrainedConfig.save_pretrained: the code that the checkpoint runs is written beside it."""
        os.makedirs(save_directory, exist_ok=True)
        save_remote_code(save_directory, self.backbone)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @property
    def tokens_per_frame(self) -> int | None:
        """Video tokens of a frame; `None` where that follows from the video."""
        return None
