"""Qwen3-VL-MoE with HoliTom: the three stages, placed into transformers' own forward passes."""

from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLMoeModel,
    Qwen3VLMoeTextModel,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoePreTrainedModel

from ...checkpoints.checkpoint import HoliTomCheckpointMixin
from ..pipeline import VideoTextToTextPipeline  # noqa: F401 - as remote code, only imported files travel on
from ..qwen_vl.forward import QwenModelMixin
from ..qwen_vl.moe import MoeDecoderMixin, QwenMoeHeadMixin, QwenMoeModelOutput
from ..qwen_vl.positions import QwenGenerationMixin
from .configuration import HoliTomQwen3VLMoeConfig


class HoliTomQwen3VLMoeTextModel(MoeDecoderMixin, Qwen3VLMoeTextModel):
    """`Qwen3VLMoeTextModel` with stage 3: from one layer on, videos and their DeepStack features have fewer tokens."""

    num_position_axes = 3


class HoliTomQwen3VLMoeModel(HoliTomCheckpointMixin, QwenModelMixin, Qwen3VLMoeModel):
    """`Qwen3VLMoeModel` whose videos are shortened before the decoder and inside it."""

    config: HoliTomQwen3VLMoeConfig
    output_class = QwenMoeModelOutput

    def __init__(self, config: HoliTomQwen3VLMoeConfig):
        config.holitom_config.check_decoder_depth(config.text_config.num_hidden_layers)
        super().__init__(config)
        # In place of the plain decoder that upstream's __init__ made. (Loading makes both without memory.)
        self.language_model = HoliTomQwen3VLMoeTextModel._from_config(config.text_config)


class HoliTomQwen3VLMoeForConditionalGeneration(
    HoliTomCheckpointMixin, QwenGenerationMixin, QwenMoeHeadMixin, Qwen3VLMoeForConditionalGeneration
):
    """
    `Qwen3VLMoeForConditionalGeneration` on a [`HoliTomQwen3VLMoeModel`].

    ```python
    import torch
    from holitom_hf import HoliTomQwen3VLMoeForConditionalGeneration, HoliTomQwen3VLMoeProcessor

    name = "Qwen/Qwen3-VL-30B-A3B-Instruct"
    model = HoliTomQwen3VLMoeForConditionalGeneration.from_pretrained(
        name, holitom_config={"retention_ratio": 0.25}, dtype="auto", device_map="auto"
    )
    processor = HoliTomQwen3VLMoeProcessor.from_pretrained(name)
    content = [{"type": "video"}, {"type": "text", "text": "What happens in the video?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=prompt, videos="video.mp4", num_frames=32, return_tensors="pt").to(model.device)
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=128, return_dict_in_generate=True)
    print(processor.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    print(output.merged_videos[0][0])
    ```
    """

    config: HoliTomQwen3VLMoeConfig

    def __init__(self, config: HoliTomQwen3VLMoeConfig):
        # Not the parent's __init__, which would first build a complete upstream model.
        Qwen3VLMoePreTrainedModel.__init__(self, config)
        self.model = HoliTomQwen3VLMoeModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()


# Checkpoints may hold experts in other layouts, which are converted on load by model type; for classes from outside
# transformers only if that is registered.
register_checkpoint_conversion_mapping(
    "qwen3_vl_moe", get_checkpoint_conversion_mapping("qwen3_vl_moe") or [], overwrite=True
)

# Its pipelines take a model to be supported if its class is registered for a configuration, here one of ours.
for _auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
    _auto.register(HoliTomQwen3VLMoeConfig, HoliTomQwen3VLMoeForConditionalGeneration, exist_ok=True)

__all__ = ["HoliTomQwen3VLMoeForConditionalGeneration", "HoliTomQwen3VLMoeModel", "HoliTomQwen3VLMoeTextModel"]
