"""From an upstream checkpoint to one that loads compressed."""

from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import logging

from ..checkpoints.checkpoint import base_model_of
from ..checkpoints.reading import load_whole
from ..configuration import HoliTomConfig
from ..models.original.configuration import converted_config
from ..models.original.processing import original_processor
from ..models.original.weights import load_original
from ..models.registry import ORIGINAL_TYPE, backbone_class, backbone_of, backbones


logger = logging.get_logger(__name__)


def write_checkpoint(
    base: str,
    folder: Path,
    settings: HoliTomConfig | None,
    retention_ratio: float | None,
    config_only: bool,
    hub: dict,
) -> None:
    """
    Writes a checkpoint of ours from any checkpoint of a backbone that is here, or one that LLaVA's authors published.

    Args:
        base: Folder or Hub repository.
        folder: Where to write.
        settings: Compression settings; `None` keeps the base's, or takes the defaults.
        retention_ratio: Replaces that of the settings.
        config_only: Write no weights; they stay in `base`, and are not even read.
        hub: What [`hub_options`] said of `base`.

    Raises:
        OSError, ValueError: If `base` can't be read, lacks weights, or is of another architecture.
    """
    kwargs = {} if settings is None else {"holitom_config": settings}
    values = PreTrainedConfig.get_config_dict(base, **hub)[0]
    if values.get("model_type") == ORIGINAL_TYPE:
        if config_only:
            raise ValueError(f"{base} is not in transformers' format, and what has no weights can't take them from it")
        _convert_original(values, base, folder, retention_ratio, kwargs, hub)
        return
    backbone = backbone_of(base, **hub)
    model_class = backbone_class(backbone, "generation")
    config = backbone_class(backbone, "config").from_pretrained(base, **kwargs, **hub)
    if retention_ratio is not None:
        config.holitom_config = {"retention_ratio": retention_ratio}
    if config_only:
        source, revision = base_model_of(base, hub)  # what has no weights itself names who has
        config.holitom_config = {"base_model_name_or_path": source or base, "base_model_revision": revision}
        with torch.device("meta"):
            model = model_class._from_config(config, dtype=config.dtype)
        model.generation_config = GenerationConfig.from_model_config(config)
        try:
            model.generation_config = GenerationConfig.from_pretrained(base, **hub)
        except OSError:
            logger.info(f"{base} has no generation_config.json; one is made from its config.")
        model.save_pretrained(folder, config_only=True)
        return
    processor = backbone_class(backbone, "processor").from_pretrained(base, **hub)
    model = load_whole(model_class, base, config=config, dtype="auto", **hub)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _convert_original(
    values: dict, base: str, folder: Path, retention_ratio: float | None, kwargs: dict, hub: dict
) -> None:
    """The same for a checkpoint of LLaVA's authors, whose `config.json` holds `values`."""
    converted = converted_config(values, **hub) | kwargs
    backbone = backbones()[converted["model_type"]]
    config = backbone_class(backbone, "config").from_dict(converted)
    if retention_ratio is not None:
        config.holitom_config = {"retention_ratio": retention_ratio}
    processor = original_processor(backbone_class(backbone, "processor"), base, config, **hub)
    model_class = backbone_class(backbone, "generation")
    model = load_original(model_class, base, config, values.get("mm_vision_tower"), dtype="auto", **hub)
    model.save_pretrained(folder, save_original_format=False)  # the names of our modules, not those of `base`
    processor.save_pretrained(folder)
