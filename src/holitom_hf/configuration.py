"""Settings of the compression as they are saved and shared: `HoliTomConfig` and its presets."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from transformers.utils import PushToHubMixin, logging
from transformers.utils.hub import cached_file

from .merging.package import of_package
from .merging.settings import MergingSettings


HOLITOM_CONFIG_NAME = "holitom_config.json"
preset_files = of_package("presets", "preset_files")


def check_string(owner: str, name: str, value: Any) -> None:
    """Raises a `TypeError` unless `value` is a string with something in it, or `None`."""
    if value is not None and not (isinstance(value, str) and value):
        raise TypeError(f"{owner}.{name} must be a non-empty string or None, got {value!r}")


@dataclass
class HoliTomConfig(MergingSettings, PushToHubMixin):
    """
    Settings of HoliTom's token compression (arXiv 2505.21334), serialized in a model's `config.json` under
    `"holitom_config"`, or on their own as `holitom_config.json`.

    Args:
        retention_ratio ... vision_drift_guard: As in [`MergingSettings`].
        base_model_name_or_path: Where a config-only checkpoint takes its weights from.
        base_model_revision: Revision of that repository.

    Raises:
        TypeError, ValueError: When made or changed, naming the field, the value and what is allowed.
    """

    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None

    checks: ClassVar[dict[str, Any]] = MergingSettings.checks | {
        "base_model_name_or_path": check_string,
        "base_model_revision": check_string,
    }

    def __post_init__(self):
        """Says where a setting has no effect."""
        if self.vision_method != type(self).vision_method and not self.has_vision_stage:
            logging.get_logger(__name__).warning_once("vision_method does nothing without vision_reuse_layer")

    @classmethod
    def coerce(
        cls, value: "HoliTomConfig | dict | str | os.PathLike | None", own: "HoliTomConfig | None" = None
    ) -> "HoliTomConfig":
        """
        Takes what a caller may pass for `holitom_config`.

        Args:
            value: A config, a preset's name or a path, which replace `own`; a dictionary, which overlays it; `None`.
            own: The settings so far; `None`: the defaults.
        """
        if value is None:
            return cls() if own is None else own
        # By name and not by type: as remote code this class exists once per checkpoint folder.
        if type(value).__name__ == cls.__name__:
            return value if isinstance(value, cls) else cls.from_dict(value.to_dict())
        if isinstance(value, dict):
            return (cls() if own is None else own).overlaid(value)
        if isinstance(value, (str, os.PathLike)):
            return cls.from_pretrained(value) if os.path.exists(value) else cls.from_preset(str(value))
        raise TypeError(
            f"holitom_config must be a HoliTomConfig, a dict, a preset name or a path, got {type(value).__name__}"
        )

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """
        Writes the settings to `save_directory/holitom_config.json`.

        Args:
            save_directory: Folder to write to, made if missing.
            push_to_hub: Also upload them, with `kwargs` (`repo_id`, `token`, ...) as in
                [`~utils.PushToHubMixin.push_to_hub`].

        Raises:
            ValueError: If `save_directory` is a file.
        """
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"{folder} is a file; HoliTomConfig.save_pretrained needs a folder")
        folder.mkdir(parents=True, exist_ok=True)
        # Written beside, then renamed: what stands under the name is never half a file.
        beside = folder / f".{HOLITOM_CONFIG_NAME}.{os.getpid()}"
        beside.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        os.replace(beside, folder / HOLITOM_CONFIG_NAME)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "HoliTomConfig":
        """
        Reads settings from a JSON file, a folder or a Hub repository that holds a `holitom_config.json`.

        Args:
            pretrained_model_name_or_path: File, folder or repository id.
            kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, ... as in `from_pretrained` elsewhere.

        Raises:
            OSError: If there is no such file, folder or repository.
            ValueError: If the file is not JSON, or a field is unknown or out of range.
        """
        path = Path(pretrained_model_name_or_path)
        if not path.is_file():
            path = Path(cached_file(str(pretrained_model_name_or_path), HOLITOM_CONFIG_NAME, **kwargs))
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a JSON file: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(
                f"{path} must hold one JSON object with HoliTomConfig's fields, got {type(values).__name__}"
            )
        return cls.from_dict(values)

    @classmethod
    def from_preset(cls, name: str) -> "HoliTomConfig":
        """
        Reads one of the settings that come with the package, such as `"llava-onevision-7b-r15"`.

        Raises:
            ValueError: If there is no preset of that name; the message lists them.
        """
        presets = cls.presets()
        if not presets:
            raise ValueError(
                f"There is no file {name!r}, and presets are part of the package holitom-hf, not of a checkpoint's "
                "code: install it, or pass a dictionary of fields"
            )
        if name not in presets:
            raise ValueError(f"There is no HoliTom preset or file {name!r}; presets: {', '.join(sorted(presets))}")
        return cls.from_pretrained(presets[name])

    @staticmethod
    def presets() -> dict[str, Path]:
        """Names of the settings that come with the installed package, and their files; none where it is not."""
        try:
            return preset_files()
        except ImportError:
            return {}


__all__ = ["HoliTomConfig"]
