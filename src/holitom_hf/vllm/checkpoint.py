"""A checkpoint of ours in vLLM: the settings it is served with."""

import os

from vllm.config import ModelConfig, VllmConfig
from vllm.distributed import model_parallel_is_initialized
from vllm.logger import init_logger
from vllm.model_executor.models.config import Qwen3_5ForConditionalGenerationConfig, VerifyAndUpdateConfig

from ..configuration import HoliTomConfig
from .settings import RATIO, checkpoint_settings, engine_settings, request_settings


# As vLLM's own, whose level and format are set for its name.
logger = init_logger(f"vllm.plugins.{__name__}")

# By name, as the engine's option takes it: the process that schedules imports it.
ENCODER_CACHE_MANAGER = f"{__package__}.encoder_budget.UncompressedBudgetManager"


class HoliTomModelConfig(VerifyAndUpdateConfig):
    """What vLLM asks about a checkpoint of ours before it loads anything but its `config.json`."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """
        Overrides VerifyAndUpdateConfig.verify_and_update_model_config: overrides lie over the settings of the file,
        and over both the rate in a server's `mm_processor_kwargs`, which transformers' processor would not know.

        Raises:
            OSError: If `config.json` can't be read.
            TypeError, ValueError: If settings are out of range, or the checkpoint holds nothing but them.
        """
        model, place = model_config.model, model_config.hf_config_path
        revision = model_config.revision if place in (None, model) else None
        settings = checkpoint_settings(model_config.hf_config, place or model, revision)
        multimodal_config = model_config.get_multimodal_config()
        kwargs = multimodal_config.mm_processor_kwargs or {}
        settings = request_settings(settings, kwargs)
        multimodal_config.mm_processor_kwargs = {name: kwargs[name] for name in kwargs if name != RATIO}
        model_config.hf_config.holitom_config = settings.to_dict()
        base = settings.base_model_name_or_path
        if base is None or base == model or place not in (None, model):
            return
        if not (os.path.isdir(base) and os.path.isdir(model) and os.path.samefile(base, model)):
            at_revision = f" --revision {settings.base_model_revision}" if settings.base_model_revision else ""
            raise ValueError(
                f"{model} holds settings alone, no weights or tokenizer; its base model is served with them by `vllm "
                f"serve {base}{at_revision} --hf-config-path {model}`"
            )

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """
        Overrides VerifyAndUpdateConfig.verify_and_update_config: a step encodes no more than it would uncompressed,
        unless the encoder's cache has a manager of the user's choice.
        """
        manager_config = vllm_config.ec_manager_config
        if manager_config.encoder_cache_manager_cls is None:
            manager_config.encoder_cache_manager_cls = ENCODER_CACHE_MANAGER


class PruningModelConfig(HoliTomModelConfig):
    """[`HoliTomModelConfig`] of a model whose encoder hands on kept positions where vLLM prunes."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """
        Overrides HoliTomModelConfig.verify_and_update_model_config: pruning is on. Its rate is not looked at.

        Raises:
            ValueError: If requests may bring videos that are encoded: nothing of them says what to merge, nor where.
        """
        HoliTomModelConfig.verify_and_update_model_config(model_config)
        if model_config.get_multimodal_config().enable_mm_embeds:
            raise ValueError(
                "encoded images and videos (--enable-mm-embeds) have no kept positions beside them: this model takes "
                "pixels alone"
            )
        settings = served_settings(model_config, keeps_positions=True)
        model_config.get_multimodal_config().video_pruning_rate = max(1 - settings.retention_ratio, 0.01)

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """
        Overrides HoliTomModelConfig.verify_and_update_config.

        Raises:
            ValueError: If a second model drafts answers: it would be handed embeddings with positions beside them.
        """
        HoliTomModelConfig.verify_and_update_config(vllm_config)
        drafting = vllm_config.speculative_config
        if drafting is not None and (drafting.use_eagle() or drafting.uses_draft_model()):
            raise ValueError(
                f"speculative decoding with method={drafting.method!r} hands a second model compressed videos, whose "
                'positions it does not know: take a method without one, as "ngram"'
            )


class HybridModelConfig(PruningModelConfig):
    """[`PruningModelConfig`] of a decoder with linear attention."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Overrides PruningModelConfig.verify_and_update_config: states are cached as upstream's."""
        PruningModelConfig.verify_and_update_config(vllm_config)
        Qwen3_5ForConditionalGenerationConfig.verify_and_update_config(vllm_config)


def served_settings(model_config: ModelConfig, keeps_positions: bool = False) -> HoliTomConfig:
    """
    The settings in force, and once in the log what of the checkpoint's the engine leaves out.

    Args:
        model_config: vLLM's, as [`HoliTomModelConfig`] leaves it.
        keeps_positions: As in [`engine_settings`].
    """
    asked = HoliTomConfig.coerce(model_config.hf_config.holitom_config)
    settings, left_out = engine_settings(asked, keeps_positions)
    # Several processes read them. The first one that runs the model says it.
    if left_out and model_parallel_is_initialized():
        logger.warning_once("HoliTom in vLLM runs stages 1 and 2; off are %s.", ", ".join(left_out), scope="global")
    return settings
