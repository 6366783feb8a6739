"""
Compressed videos in vLLM: a plugin that registers this package's models there.

vLLM finds [`register`] by the entry point `vllm.general_plugins` in every process that it starts. Nothing outside this
room imports vLLM, and importing the room doesn't either.
"""

import importlib
import importlib.util


# By architecture, as `config.json` names it: the file of this room that has the class, and what it asks of the
# configuration.
ARCHITECTURES = {
    "HoliTomLlavaOnevisionForConditionalGeneration": ("llava_onevision", "checkpoint:HoliTomModelConfig"),
    "HoliTomQwen2_5_VLForConditionalGeneration": ("qwen2_5_vl", "checkpoint:PruningModelConfig"),
    "HoliTomQwen3VLForConditionalGeneration": ("qwen3_vl", "checkpoint:PruningModelConfig"),
    "HoliTomQwen3VLMoeForConditionalGeneration": ("qwen3_vl_moe", "checkpoint:PruningModelConfig"),
    "HoliTomQwen3_5ForConditionalGeneration": ("qwen3_5", "checkpoint:HybridModelConfig"),
    "HoliTomQwen3_5MoeForConditionalGeneration": ("qwen3_5", "checkpoint:HybridModelConfig"),
}


def check_installed() -> None:
    """Raises an `ImportError` that says how vLLM is installed if it isn't."""
    if importlib.util.find_spec("vllm") is None:
        raise ImportError(
            "vLLM is not installed here: in an environment that has it (pip install vllm), run pip install "
            "./distributions/vllm from a checkout of holitom-hf, see docs/vllm.md"
        )


def register() -> None:
    """Tells vLLM of [`ARCHITECTURES`]; once or more often, and without vLLM not at all."""
    if importlib.util.find_spec("vllm") is None:
        return
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    known = ModelRegistry.get_supported_archs()
    for architecture, (model, config) in ARCHITECTURES.items():
        if architecture not in known:
            ModelRegistry.register_model(architecture, f"{__name__}.{model}:{architecture}")
        if architecture not in MODELS_CONFIG_MAP:
            file, name = config.split(":")
            MODELS_CONFIG_MAP[architecture] = getattr(importlib.import_module(f".{file}", __name__), name)
