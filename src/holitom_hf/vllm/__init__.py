"""
Compressed videos in vLLM: a plugin that registers this package's models there.

vLLM finds [`register`] by the entry point `vllm.general_plugins` in every process that it starts. Nothing outside this
room imports vLLM, and importing the room doesn't either.
"""

import importlib.util


# By architecture, as `config.json` names it: where vLLM finds the class when it needs it.
ARCHITECTURES = {
    "HoliTomLlavaOnevisionForConditionalGeneration": (
        "holitom_hf.vllm.llava_onevision:HoliTomLlavaOnevisionForConditionalGeneration"
    ),
}


def register() -> None:
    """Tells vLLM of [`ARCHITECTURES`]; once or more often, and without vLLM not at all."""
    if importlib.util.find_spec("vllm") is None:
        return
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from .checkpoint import HoliTomModelConfig

    known = ModelRegistry.get_supported_archs()
    for architecture, place in ARCHITECTURES.items():
        if architecture not in known:
            ModelRegistry.register_model(architecture, place)
        MODELS_CONFIG_MAP.setdefault(architecture, HoliTomModelConfig)
