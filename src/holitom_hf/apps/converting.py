"""From an upstream checkpoint to one that loads compressed."""

from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.utils import logging

from ..checkpoints.checkpoint import base_model_of, config_values, is_original
from ..checkpoints.reading import load_whole
from ..configuration import HoliTomConfig
from ..models.original.converting import convert_weights
from ..models.registry import backbone_class, backbone_of


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
    backbone = backbone_of(base, **hub)
    model_class = backbone_class(backbone, "generation")
    config = backbone_class(backbone, "config").from_pretrained(base, **kwargs, **hub)
    if retention_ratio is not None:
        config.holitom_config = {"retention_ratio": retention_ratio}
    if config_only:
        source, revision = base_model_of(base, hub)  # what has no weights itself names who has
        config.holitom_config = {"base_model_name_or_path": source or base, "base_model_revision": revision}
        model = _without_memory(model_class, config, base, hub)
        model.save_pretrained(folder, config_only=True)
        return
    processor = backbone_class(backbone, "processor").from_pretrained(base, **hub)
    if is_original(config_values(base, hub)):
        convert_weights(_without_memory(model_class, config, base, hub), base, folder, **hub)
        if config.model_type not in CONFIG_MAPPING_NAMES:
            logger.warning(
                f"This is a {backbone.title}, which transformers has no class of: without this package it needs "
                "trust_remote_code=True."
            )
    else:
        load_whole(model_class, base, config=config, dtype="auto", **hub).save_pretrained(folder)
    processor.save_pretrained(folder)


def _without_memory(model_class: type[PreTrainedModel], config, base: str, hub: dict) -> PreTrainedModel:
    """A model that holds nothing but shapes, with the generation settings of `base`."""
    with torch.device("meta"):
        model = model_class._from_config(config, dtype=config.dtype)
    model.generation_config = GenerationConfig.from_model_config(config)
    try:
        model.generation_config = GenerationConfig.from_pretrained(base, **hub)
    except OSError:
        logger.info(f"{base} has no generation_config.json; one is made from its config.")
    return model
