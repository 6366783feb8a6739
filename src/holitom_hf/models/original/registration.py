"""
`AutoConfig`, and with it the other Auto classes, for checkpoints of type "llava_qwen".

What LLaVA's authors published says "llava", which is another model of transformers: there Auto classes give that one.
"""

from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig

from ..registry import backbone_class, backbones


class LlavaQwenConfig(PreTrainedConfig):
    """Stands for such a `config.json` alone: what is made of one is a configuration of ours."""

    model_type = "llava_qwen"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """
        Overrides PreTrainedConfig.from_dict: a configuration of LLaVA-OneVision or of LLaVA-Video. Auto classes know
        their models and processors from then on.

        Raises:
            ValueError: If fields are not supported.
        """
        from transformers import AutoModel, AutoProcessor

        from .configuration import converted_config

        values = converted_config(config_dict, **kwargs)
        backbone = backbones()[values["model_type"]]
        config_class = backbone_class(backbone, "config")
        backbone_class(backbone, "generation")  # which registers itself
        AutoModel.register(config_class, backbone_class(backbone, "model"), exist_ok=True)
        AutoProcessor.register(config_class, backbone_class(backbone, "processor"), exist_ok=True)
        result = config_class.from_dict(values, **kwargs)
        config = result[0] if isinstance(result, tuple) else result
        config.custom_pipelines = {}  # whose code is not in the checkpoint
        return result


AutoConfig.register(LlavaQwenConfig.model_type, LlavaQwenConfig, exist_ok=True)
