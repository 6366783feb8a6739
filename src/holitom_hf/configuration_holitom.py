"""Settings of the compression (`HoliTomConfig`) and of the model that carries them (`HoliTomLlavaOnevisionConfig`)."""

import importlib.util
import json
import math
import os
import shutil
from copy import deepcopy
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from transformers import LlavaOnevisionConfig, Qwen2Config
from transformers.utils import PushToHubMixin, logging
from transformers.utils.hub import cached_file


logger = logging.get_logger(__name__)

# What shortens a video before the decoder; token_merging.py has the functions.
OUTER_METHODS = (
    "holitom",
    "fixed_windows",
    "visionzip",
    "frame_subsampling",
    "random_tokens",
    "average_pooling",
)

HOLITOM_CONFIG_NAME = "holitom_config.json"

# Every file a checkpoint carries, and the classes in them that transformers' Auto classes pick up.
REMOTE_CODE_FILES = (
    "configuration_holitom.py",
    "host_numbers.py",
    "temporal_segmentation.py",
    "spatial_merging.py",
    "merged_video.py",
    "holitom_merging.py",
    "fixed_windows.py",
    "visionzip_merging.py",
    "frame_subsampling.py",
    "random_tokens.py",
    "average_pooling.py",
    "token_merging.py",
    "packed_rows.py",
    "inner_merging.py",
    "compressed_sequence.py",
    "video_placeholders.py",
    "vision_importance.py",
    "compaction.py",
    "vision_holitom.py",
    "outputs_holitom.py",
    "decoder_holitom.py",
    "generation_holitom.py",
    "flops.py",
    "model_card_holitom.py",
    "checkpoint_holitom.py",
    "pipeline_holitom.py",
    "modeling_holitom.py",
    "video_decoding.py",
    "processing_holitom.py",
)
AUTO_MAP = {
    "AutoConfig": "configuration_holitom.HoliTomLlavaOnevisionConfig",
    "AutoModel": "modeling_holitom.HoliTomLlavaOnevisionModel",
    "AutoModelForImageTextToText": "modeling_holitom.HoliTomLlavaOnevisionForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_holitom.HoliTomLlavaOnevisionForConditionalGeneration",
    "AutoProcessor": "processing_holitom.HoliTomProcessor",
    "AutoVideoProcessor": "processing_holitom.HoliTomVideoProcessor",
}

CUSTOM_PIPELINES = {
    "video-text-to-text": {
        "impl": "pipeline_holitom.VideoTextToTextPipeline",
        "pt": ["AutoModelForMultimodalLM"],
        "type": "multimodal",
    }
}


def save_remote_code(save_directory: str | os.PathLike) -> None:
    """Copies the files that a checkpoint needs to run without holitom-hf installed into `save_directory`."""
    source = Path(__file__).parent
    for name in REMOTE_CODE_FILES:
        destination = Path(save_directory) / name
        # As remote code, only the files imported so far lie beside this one: importing the model does not
        # bring the processor's. They are then left to the class that does bring them.
        if (source / name).is_file() and (source / name).resolve() != destination.resolve():
            shutil.copyfile(source / name, destination)


def _check_number(name: str, value: Any, allowed: str, is_allowed) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"HoliTomConfig.{name} must be a number {allowed}, got {value!r} of type {_type_name(value)}")
    if not math.isfinite(value) or not is_allowed(value):
        raise ValueError(f"HoliTomConfig.{name} must be a number {allowed}, got {value!r}")


def _check_integer(name: str, value: Any, minimum: int, is_optional: bool) -> None:
    allowed = f"an integer >= {minimum}" + (" or None" if is_optional else "")
    if value is None and is_optional:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"HoliTomConfig.{name} must be {allowed}, got {value!r} of type {_type_name(value)}")
    if value < minimum:
        raise ValueError(f"HoliTomConfig.{name} must be {allowed}, got {value!r}")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"HoliTomConfig.{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _check_string(name: str, value: Any) -> None:
    if value is not None and not (isinstance(value, str) and value):
        raise TypeError(f"HoliTomConfig.{name} must be a non-empty string or None, got {value!r}")


def _type_name(value: Any) -> str:
    return type(value).__name__


_CHECKS = {
    "retention_ratio": lambda name, value: _check_number(name, value, "with 0 < R <= 1", lambda v: 0 < v <= 1),
    "similarity_threshold": lambda name, value: _check_number(name, value, "in [-1, 1]", lambda v: -1 <= v <= 1),
    "max_segment_frames": lambda name, value: _check_integer(name, value, minimum=1, is_optional=True),
    "cluster_neighbors": lambda name, value: _check_integer(name, value, minimum=1, is_optional=False),
    "cluster_center_weight": lambda name, value: _check_number(name, value, "in [0, 1]", lambda v: 0 <= v <= 1),
    "contextual_ratio": lambda name, value: _check_number(name, value, "in [0, 1]", lambda v: 0 <= v <= 1),
    "inner_merge_layer": lambda name, value: _check_integer(name, value, minimum=1, is_optional=True),
    "inner_merge_ratio": lambda name, value: _check_number(name, value, "with 0 <= r < 1", lambda v: 0 <= v < 1),
    "outer_method": lambda name, value: _check_choice(name, value, (*OUTER_METHODS, "none")),
    "inner_method": lambda name, value: _check_choice(name, value, ("merge", "prune", "none")),
    "newline_position": lambda name, value: _check_choice(name, value, ("end", "row")),
    "base_model_name_or_path": _check_string,
    "base_model_revision": _check_string,
}


@dataclass
class HoliTomConfig(PushToHubMixin):
    """
    Settings of HoliTom's token compression (arXiv 2505.21334), serialized in a model's `config.json` under
    `"holitom_config"`, or on their own as `holitom_config.json`.

    Args:
        retention_ratio: Share of a video's visual tokens that stages 1 and 2 keep, 0 < R <= 1 (R, section 3.2).
            At 1.0 these stages do nothing.
        similarity_threshold: Cosine similarity above which a token repeats the next frame's (tau, section 3.1).
        max_segment_frames: Longest segment in frames; `None` sets no limit.
        cluster_neighbors: Number of nearest neighbours in the density of DPC-KNN.
        cluster_center_weight: Weight of a cluster's centre against the mean of its members (beta).
        contextual_ratio: Share of a frame's kept dynamic tokens that is clustered instead of selected.
        inner_merge_layer: Decoder layer before which stage 3 runs (k, section 3.3); `None` leaves stage 3 out.
        inner_merge_ratio: Share of the visual tokens that stage 3 merges away, 0 <= r < 1.
        outer_method: What shortens the video before the decoder: `"holitom"`, its ablation
            `"fixed_windows"`, a baseline (`"visionzip"`, `"frame_subsampling"`, `"random_tokens"`,
            `"average_pooling"`) or `"none"`.
        inner_method: What stage 3 does with the tokens it removes: `"merge"` (HoliTom), `"prune"` (FastV), `"none"`.
        newline_position: `"end"`: one newline token after the video (LLaVA-OneVision); `"row"`: one after every
            row of the grid that kept a token (LLaVA-Video).
        base_model_name_or_path: Where a config-only checkpoint takes its weights from.
        base_model_revision: Revision of that repository.

    Raises:
        TypeError, ValueError: When made or changed, naming the field, the value and what is allowed.
    """

    retention_ratio: float = 0.15
    similarity_threshold: float = 0.80
    max_segment_frames: int | None = None
    cluster_neighbors: int = 7
    cluster_center_weight: float = 0.6
    contextual_ratio: float = 0.0
    inner_merge_layer: int | None = 18
    inner_merge_ratio: float = 0.5
    outer_method: str = "holitom"
    inner_method: str = "merge"
    newline_position: str = "end"
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _CHECKS:
            raise AttributeError(f"HoliTomConfig has no field {name!r}; its fields are {', '.join(_CHECKS)}")
        _CHECKS[name](name, value)
        super().__setattr__(name, value)

    @property
    def has_outer_stage(self) -> bool:
        """Whether the video is shortened before the decoder (stages 1 and 2)."""
        return self.outer_method != "none" and self.retention_ratio < 1

    @property
    def has_inner_stage(self) -> bool:
        """Whether the video is shortened inside the decoder (stage 3)."""
        return self.inner_method != "none" and self.inner_merge_layer is not None and self.inner_merge_ratio > 0

    @property
    def is_identity(self) -> bool:
        """Whether nothing is shortened at all, so that the model is upstream's to the bit."""
        return not (self.has_outer_stage or self.has_inner_stage)

    def check_decoder_depth(self, num_hidden_layers: int) -> None:
        """Raises a `ValueError` if stage 3 is to run at a layer that a decoder of this depth does not have."""
        if self.has_inner_stage and self.inner_merge_layer >= num_hidden_layers:
            raise ValueError(
                f"HoliTomConfig.inner_merge_layer is {self.inner_merge_layer}, but the decoder has "
                f"{num_hidden_layers} layers: choose 1 to {num_hidden_layers - 1}, or None to leave stage 3 out"
            )

    def to_dict(self) -> dict[str, Any]:
        """All fields as a dictionary of JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "HoliTomConfig":
        """Makes a config from a dictionary; a key that is no field raises a `ValueError` naming it."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            names = ", ".join(map(repr, unknown))
            raise ValueError(f"HoliTomConfig has no field {names}; its fields are {', '.join(sorted(known))}")
        return cls(**values)

    @classmethod
    def coerce(cls, value: "HoliTomConfig | dict | str | os.PathLike | None") -> "HoliTomConfig":
        """Takes what a caller may pass for `holitom_config`: a config, a dictionary, a preset's name or a path."""
        if value is None:
            return cls()
        # By name and not by type: as remote code this class exists once per checkpoint folder.
        if type(value).__name__ == cls.__name__:
            return value if isinstance(value, cls) else cls.from_dict(value.to_dict())
        if isinstance(value, dict):
            return cls.from_dict(value)
        if isinstance(value, (str, os.PathLike)):
            return cls.from_pretrained(value) if os.path.exists(value) else cls.from_preset(str(value))
        raise TypeError(
            f"holitom_config must be a HoliTomConfig, a dict, a preset name or a path, got {_type_name(value)}"
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
        (folder / HOLITOM_CONFIG_NAME).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
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
            raise ValueError(f"{path} must hold one JSON object with HoliTomConfig's fields, got {_type_name(values)}")
        return cls.from_dict(values)

    @classmethod
    def from_preset(cls, name: str) -> "HoliTomConfig":
        """
        Reads one of the settings that come with the package, such as `"llava-onevision-7b-r15"`.

        Raises:
            ValueError: If there is no preset of that name; the message lists them.
        """
        presets = cls.presets()
        if name not in presets:
            raise ValueError(f"There is no HoliTom preset or file {name!r}; presets: {', '.join(presets) or 'none'}")
        return cls.from_pretrained(presets[name])

    @staticmethod
    def presets() -> dict[str, Path]:
        """Names of the settings that come with the installed package, and their files."""
        package = importlib.util.find_spec("holitom_hf")
        if package is None:
            return {}
        package_folder = Path(package.origin).parent
        # Inside the package in a wheel, at the top of the repository in an editable install.
        folders = (package_folder / "configs", package_folder.parents[1] / "configs")
        files = [file for folder in folders if folder.is_dir() for file in sorted(folder.glob("*.json"))]
        return {file.stem: file for file in reversed(files)}


class HoliTomLlavaOnevisionConfig(LlavaOnevisionConfig):
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

    holitom_config: HoliTomConfig | dict | str | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.text_config.model_type != Qwen2Config.model_type:
            raise ValueError(
                "HoliTom merges inside a Qwen2 decoder; this checkpoint's text model is "
                f"{self.text_config.model_type!r}"
            )
        # transformers writes only the entry of the class that is being saved; a checkpoint needs all of them.
        self.auto_map = dict(AUTO_MAP)
        self.custom_pipelines = deepcopy(CUSTOM_PIPELINES)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """Overrides PreTrainedConfig.from_dict: another architecture is an error, not a warning."""
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(
                f"HoliTom needs a {cls.model_type!r} checkpoint (LLaVA-OneVision); this one is {model_type!r}"
            )
        return super().from_dict(config_dict, **kwargs)

    def __setattr__(self, key: str, value: Any) -> None:
        super().__setattr__(key, HoliTomConfig.coerce(value) if key == "holitom_config" else value)

    def to_dict(self) -> dict[str, Any]:
        """Overrides `PreTrainedConfig.to_dict`: the settings become a dictionary, too."""
        values = super().to_dict()
        values["holitom_config"] = self.holitom_config.to_dict()
        values["custom_pipelines"] = deepcopy(CUSTOM_PIPELINES)  # pipeline() puts classes where names were
        return values

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        """Overrides `PreTrainedConfig.save_pretrained`: the code that the checkpoint runs is written beside it."""
        os.makedirs(save_directory, exist_ok=True)
        save_remote_code(save_directory)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


__all__ = ["HoliTomConfig", "HoliTomLlavaOnevisionConfig"]
