"""
The one list of backbones. A new one is a folder beside this file, with `backbone.py`, `configuration.py`,
`modeling.py`, `processing.py` and `operations.py`, and its name here.
"""

import importlib
import os

from ..checkpoints.backbone import Backbone


FOLDERS = ("llava_onevision", "llava_video", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")


def backbones() -> dict[str, Backbone]:
    """The backbones by `model_type`; none of their classes is imported."""
    found = [importlib.import_module(f".{folder}.backbone", __package__).BACKBONE for folder in FOLDERS]
    return {backbone.model_type: backbone for backbone in found}


def public_names() -> dict[str, str]:
    """The classes of all backbones, and the modules of the package that they are in."""
    found = {}
    for backbone in backbones().values():
        folder = f"models.{backbone.model_type}"
        found[backbone.config] = f"{folder}.configuration"
        found |= dict.fromkeys((backbone.model, backbone.generation), f"{folder}.modeling")
        found |= dict.fromkeys((backbone.processor, backbone.video_processor), f"{folder}.processing")
    return found


def backbone_class(backbone: Backbone, role: str) -> type:
    """
    One of a backbone's classes, imported when asked for.

    Args:
        backbone: Which one.
        role: `"config"`, `"model"`, `"generation"`, `"processor"` or `"video_processor"`.
    """
    file = {"config": "configuration", "model": "modeling", "generation": "modeling"}.get(role, "processing")
    module = importlib.import_module(f".{backbone.model_type}.{file}", __package__)
    return getattr(module, getattr(backbone, role))


def encoder_operations(config, *args, **kwargs):
    """A backbone's own `encoder_operations`, by its configuration."""
    module = importlib.import_module(f".{config.model_type}.operations", __package__)
    return module.encoder_operations(config, *args, **kwargs)


def check_processor(processor: type, checkpoint: str | os.PathLike, kwargs: dict) -> None:
    """
    Raises a `ValueError` if a checkpoint is of another backbone of ours than a processor is.

    Args:
        processor: A class with a `backbone`.
        checkpoint: Folder or Hub repository.
        kwargs: Of `from_pretrained`: where and how to download.
    """
    from ..checkpoints.checkpoint import HUB_KWARGS

    place = {name: kwargs[name] for name in (*HUB_KWARGS, "revision", "subfolder") if name in kwargs}
    other = backbones().get(_model_type(checkpoint, place))
    # By name: as remote code a backbone exists once more.
    if other is not None and other.model_type != processor.backbone.model_type:
        raise ValueError(
            f"{processor.__name__} is for {processor.backbone.title}; {checkpoint} is a {other.model_type!r} "
            f"checkpoint ({other.title}): use {other.processor}"
        )


def backbone_of(checkpoint: str, **kwargs) -> Backbone:
    """
    The backbone of a checkpoint, ours, upstream's or as LLaVA's authors published it.

    Args:
        checkpoint: Folder or Hub repository.
        kwargs: Where and how to download, as in `from_pretrained`.

    Raises:
        OSError: If its configuration can't be read.
        ValueError: If it is none of ours.
    """
    model_type, known = _model_type(checkpoint, kwargs), backbones()
    if model_type not in known:
        ours = " or ".join(f"{backbone.model_type!r} checkpoint ({backbone.title})" for backbone in known.values())
        raise ValueError(f"HoliTom needs a {ours}; this one is {model_type!r}")
    return known[model_type]


def _model_type(checkpoint: str | os.PathLike, kwargs: dict) -> str | None:
    """What a checkpoint's configuration is of; of an original, what it becomes."""
    from ..checkpoints.checkpoint import config_values, is_original
    from .original.configuration import converted_config

    values = config_values(checkpoint, kwargs)
    return (converted_config(values, **kwargs) if is_original(values) else values).get("model_type")
