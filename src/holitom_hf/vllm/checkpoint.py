"""A checkpoint of ours in vLLM: the settings it is served with, and the weights of one that holds none."""

import copy
import os
from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedConfig
from vllm.config import ModelConfig, VllmConfig
from vllm.distributed import model_parallel_is_initialized
from vllm.logger import init_logger
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from ..configuration import HoliTomConfig
from .settings import checkpoint_settings, engine_settings


# As vLLM's own, whose level and format are set for its name.
logger = init_logger(f"vllm.plugins.{__name__}")


def served_settings(model_config: ModelConfig, keeps_positions: bool = False) -> HoliTomConfig:
    """
    The settings in force, and once in the log what of the checkpoint's the engine leaves out.

    Args:
        model_config: vLLM's.
        keeps_positions: As in [`engine_settings`].
    """
    place = model_config.hf_config_path or model_config.model
    asked = checkpoint_settings(model_config.hf_config, place, model_config.revision)
    settings, left_out = engine_settings(asked, keeps_positions)
    # Several processes read them. The first one that runs the model says it.
    if left_out and model_parallel_is_initialized():
        logger.warning_once("HoliTom in vLLM runs stages 1 and 2; off are %s.", ", ".join(left_out), scope="global")
    return settings


def base_weights(
    vllm_config: VllmConfig, model: nn.Module, settings: HoliTomConfig
) -> Iterable[tuple[str, torch.Tensor]] | None:
    """
    The weights of the base model that a config-only checkpoint names; `None` for a checkpoint that holds its own.

    Args:
        vllm_config: How to download and read them.
        model: That will take them.
        settings: The checkpoint's.

    Raises:
        OSError: If the base model can't be read.
        ValueError: If it is of another architecture.
    """
    model_config, base = vllm_config.model_config, settings.base_model_name_or_path
    is_here = base is not None and os.path.isdir(base) and os.path.isdir(model_config.model)
    if base is None or (is_here and os.path.samefile(base, model_config.model)):
        return None
    revision = settings.base_model_revision
    found = PreTrainedConfig.get_config_dict(base, revision=revision)[0].get("model_type")
    if found != model_config.hf_config.model_type:
        raise ValueError(
            f"{model_config.model} takes its weights from {base!r}, which is a {found!r} model, not "
            f"{model_config.hf_config.model_type!r}"
        )
    base_config = copy.copy(model_config)
    base_config.model, base_config.revision = base, revision
    return DefaultModelLoader(vllm_config.load_config).get_all_weights(base_config, model)
