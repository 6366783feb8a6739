"""Qwen3.5-MoE with HoliTom: the three stages, placed into transformers' own forward passes."""

from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeModel,
    Qwen3_5MoeTextModel,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoePreTrainedModel

from ...checkpoints.checkpoint import HoliTomCheckpointMixin
from ..pipeline import VideoTextToTextPipeline  # noqa: F401 - as remote code, only imported files travel on
from ..qwen_vl.hybrid import HybridDecoderMixin, HybridGenerationMixin, HybridModelMixin
from ..qwen_vl.moe import MoeDecoderMixin, QwenMoeHeadMixin, QwenMoeModelOutput
from .configuration import HoliTomQwen3_5MoeConfig


class HoliTomQwen3_5MoeTextModel(MoeDecoderMixin, HybridDecoderMixin, Qwen3_5MoeTextModel):
    """`Qwen3_5MoeTextModel` with stage 3: behind one of its layers of full attention, videos have fewer tokens."""


class HoliTomQwen3_5MoeModel(HoliTomCheckpointMixin, HybridModelMixin, Qwen3_5MoeModel):
    """`Qwen3_5MoeModel` whose videos are shortened before the decoder and inside it."""

    config: HoliTomQwen3_5MoeConfig
    output_class = QwenMoeModelOutput

    def __init__(self, config: HoliTomQwen3_5MoeConfig):
        config.holitom_config.check_decoder_depth(config.text_config.num_hidden_layers)
        super().__init__(config)
        # In place of the plain decoder that upstream's __init__ made. (Loading makes both without memory.)
        self.language_model = HoliTomQwen3_5MoeTextModel._from_config(config.text_config)
        self.settings_for(None)  # raises an error where stage 3 can't run


class HoliTomQwen3_5MoeForConditionalGeneration(
    HoliTomCheckpointMixin, HybridGenerationMixin, QwenMoeHeadMixin, Qwen3_5MoeForConditionalGeneration
):
    """
    `Qwen3_5MoeForConditionalGeneration` on a [`HoliTomQwen3_5MoeModel`].

    ```python
    import torch
    from holitom_hf import HoliTomQwen3_5MoeForConditionalGeneration, HoliTomQwen3_5MoeProcessor

    name = "Qwen/Qwen3.5-35B-A3B"
    model = HoliTomQwen3_5MoeForConditionalGeneration.from_pretrained(
        name, holitom_config={"retention_ratio": 0.25, "inner_merge_layer": 24}, dtype="auto", device_map="auto"
    )
    processor = HoliTomQwen3_5MoeProcessor.from_pretrained(name)
    content = [{"type": "video"}, {"type": "text", "text": "What happens in the video?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=prompt, videos="video.mp4", num_frames=32, return_tensors="pt").to(model.device)
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=128, return_dict_in_generate=True)
    print(processor.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    print(output.merged_videos[0][0])
    ```
    """

    config: HoliTomQwen3_5MoeConfig

    def __init__(self, config: HoliTomQwen3_5MoeConfig):
        # Not the parent's __init__, which would first build a complete upstream model.
        Qwen3_5MoePreTrainedModel.__init__(self, config)
        self.model = HoliTomQwen3_5MoeModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()


# Checkpoints may hold experts in other layouts, which are converted on load by model type; for classes from outside
# transformers only if that is registered.
register_checkpoint_conversion_mapping(
    "qwen3_5_moe_text", get_checkpoint_conversion_mapping("qwen3_5_moe_text") or [], overwrite=True
)

# Its pipelines take a model to be supported if its class is registered for a configuration, here one of ours.
for _auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
    _auto.register(HoliTomQwen3_5MoeConfig, HoliTomQwen3_5MoeForConditionalGeneration, exist_ok=True)

__all__ = ["HoliTomQwen3_5MoeForConditionalGeneration", "HoliTomQwen3_5MoeModel", "HoliTomQwen3_5MoeTextModel"]
