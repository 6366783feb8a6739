"""Qwen3.5 with HoliTom: the three stages, placed into transformers' own forward passes."""

from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5Model,
    Qwen3_5TextModel,
)
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5PreTrainedModel

from ...checkpoints.checkpoint import HoliTomCheckpointMixin
from ..pipeline import VideoTextToTextPipeline  # noqa: F401 - as remote code, only imported files travel on
from ..qwen_vl.forward import QwenHeadMixin
from ..qwen_vl.hybrid import HybridDecoderMixin, HybridGenerationMixin, HybridModelMixin
from .configuration import HoliTomQwen3_5Config


class HoliTomQwen3_5TextModel(HybridDecoderMixin, Qwen3_5TextModel):
    """`Qwen3_5TextModel` with stage 3: behind one of its layers of full attention, videos have fewer tokens."""


class HoliTomQwen3_5Model(HoliTomCheckpointMixin, HybridModelMixin, Qwen3_5Model):
    """`Qwen3_5Model` whose videos are shortened before the decoder and inside it."""

    config: HoliTomQwen3_5Config

    def __init__(self, config: HoliTomQwen3_5Config):
        config.holitom_config.check_decoder_depth(config.text_config.num_hidden_layers)
        super().__init__(config)
        # In place of the plain decoder that upstream's __init__ made. (Loading makes both without memory.)
        self.language_model = HoliTomQwen3_5TextModel._from_config(config.text_config)
        self.settings_for(None)  # raises an error where stage 3 can't run


class HoliTomQwen3_5ForConditionalGeneration(
    HoliTomCheckpointMixin, HybridGenerationMixin, QwenHeadMixin, Qwen3_5ForConditionalGeneration
):
    """
    `Qwen3_5ForConditionalGeneration` on a [`HoliTomQwen3_5Model`].

    ```python
    import torch
    from holitom_hf import HoliTomQwen3_5ForConditionalGeneration, HoliTomQwen3_5Processor

    name = "Qwen/Qwen3.5-9B"
    model = HoliTomQwen3_5ForConditionalGeneration.from_pretrained(
        name, holitom_config="qwen3.5-9b-r25", dtype="auto", device_map="auto"
    )
    processor = HoliTomQwen3_5Processor.from_pretrained(name)
    content = [{"type": "video"}, {"type": "text", "text": "What happens in the video?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=prompt, videos="video.mp4", num_frames=32, return_tensors="pt").to(model.device)
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=128, return_dict_in_generate=True)
    print(processor.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    print(output.merged_videos[0][0])
    ```
    """

    config: HoliTomQwen3_5Config

    def __init__(self, config: HoliTomQwen3_5Config):
        # Not the parent's __init__, which would first build a complete upstream model.
        Qwen3_5PreTrainedModel.__init__(self, config)
        self.model = HoliTomQwen3_5Model(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()


# Its pipelines take a model to be supported if its class is registered for a configuration, here one of ours.
for _auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
    _auto.register(HoliTomQwen3_5Config, HoliTomQwen3_5ForConditionalGeneration, exist_ok=True)

__all__ = ["HoliTomQwen3_5ForConditionalGeneration", "HoliTomQwen3_5Model", "HoliTomQwen3_5TextModel"]
