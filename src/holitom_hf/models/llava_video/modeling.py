"""LLaVA-Video with HoliTom: LLaVA-OneVision's model with other pooling and newlines."""

from torch import nn
from transformers import AutoModelForImageTextToText, AutoModelForMultimodalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionPreTrainedModel

from ...configuration import HoliTomConfig
from ..llava_onevision.modeling import (
    HoliTomLlavaOnevisionForConditionalGeneration,
    HoliTomLlavaOnevisionModel,
)
from .configuration import HoliTomLlavaVideoConfig
from .vision import LlavaVideoVisionMixin


class HoliTomLlavaVideoModel(LlavaVideoVisionMixin, HoliTomLlavaOnevisionModel):
    """LLaVA-Video without a head; its videos are shortened before the decoder and inside it."""

    config: HoliTomLlavaVideoConfig

    def settings_for(self, holitom_config: HoliTomConfig | dict | str | None) -> HoliTomConfig:
        """Overrides CompressingModelMixin.settings_for: with newlines where this model has them."""
        return self.config.in_layout(super().settings_for(holitom_config))


class HoliTomLlavaVideoForConditionalGeneration(HoliTomLlavaOnevisionForConditionalGeneration):
    """
    LLaVA-Video, as [`HoliTomLlavaOnevisionForConditionalGeneration`] is LLaVA-OneVision. With settings that change
    nothing it is the model as its authors run it.
    """

    config: HoliTomLlavaVideoConfig

    def __init__(self, config: HoliTomLlavaVideoConfig):
        # Not the parent's __init__, which would build a LLaVA-OneVision.
        LlavaOnevisionPreTrainedModel.__init__(self, config)
        self.model = HoliTomLlavaVideoModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()


# Weights are named as in files of LLaVA-OneVision.
for _class, _parent in (
    (HoliTomLlavaVideoForConditionalGeneration, HoliTomLlavaOnevisionForConditionalGeneration),
    (HoliTomLlavaVideoModel, HoliTomLlavaOnevisionModel),
):
    register_checkpoint_conversion_mapping(
        _class.__name__, get_checkpoint_conversion_mapping(_parent.__name__) or [], overwrite=True
    )

for _auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
    _auto.register(HoliTomLlavaVideoConfig, HoliTomLlavaVideoForConditionalGeneration, exist_ok=True)

__all__ = ["HoliTomLlavaVideoForConditionalGeneration", "HoliTomLlavaVideoModel"]
