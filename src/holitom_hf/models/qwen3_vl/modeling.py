"""Qwen3-VL with HoliTom: the three stages, placed into transformers' own forward passes."""

from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
    Qwen3VLTextModel,
)
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLPreTrainedModel

from ...checkpoints.checkpoint import HoliTomCheckpointMixin
from ..decoder import HoliTomDecoderMixin
from ..pipeline import VideoTextToTextPipeline  # noqa: F401 - as remote code, only imported files travel on
from ..qwen_vl.forward import QwenHeadMixin, QwenModelMixin
from ..qwen_vl.positions import QwenGenerationMixin
from .configuration import HoliTomQwen3VLConfig


class HoliTomQwen3VLTextModel(HoliTomDecoderMixin, Qwen3VLTextModel):
    """`Qwen3VLTextModel` with stage 3: from one layer on, videos and their DeepStack features have fewer tokens."""

    num_position_axes = 3


class HoliTomQwen3VLModel(HoliTomCheckpointMixin, QwenModelMixin, Qwen3VLModel):
    """`Qwen3VLModel` whose videos are shortened before the decoder and inside it."""

    config: HoliTomQwen3VLConfig

    def __init__(self, config: HoliTomQwen3VLConfig):
        config.holitom_config.check_decoder_depth(config.text_config.num_hidden_layers)
        super().__init__(config)
        # In place of the plain decoder that upstream's __init__ made. (Loading makes both without memory.)
        self.language_model = HoliTomQwen3VLTextModel._from_config(config.text_config)


class HoliTomQwen3VLForConditionalGeneration(
    HoliTomCheckpointMixin, QwenGenerationMixin, QwenHeadMixin, Qwen3VLForConditionalGeneration
):
    """
    `Qwen3VLForConditionalGeneration` on a [`HoliTomQwen3VLModel`].

    ```python
    import torch
    from holitom_hf import HoliTomQwen3VLForConditionalGeneration, HoliTomQwen3VLProcessor

    name = "Qwen/Qwen3-VL-8B-Instruct"
    model = HoliTomQwen3VLForConditionalGeneration.from_pretrained(
        name, holitom_config={"retention_ratio": 0.25}, dtype="auto", device_map="auto"
    )
    processor = HoliTomQwen3VLProcessor.from_pretrained(name)
    content = [{"type": "video"}, {"type": "text", "text": "What happens in the video?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=prompt, videos="video.mp4", num_frames=32, return_tensors="pt").to(model.device)
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=128, return_dict_in_generate=True)
    print(processor.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    print(output.merged_videos[0][0])
    ```
    """

    config: HoliTomQwen3VLConfig

    def __init__(self, config: HoliTomQwen3VLConfig):
        # Not the parent's __init__, which would first build a complete upstream model.
        Qwen3VLPreTrainedModel.__init__(self, config)
        self.model = HoliTomQwen3VLModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()


# Its pipelines take a model to be supported if its class is registered for a configuration, here one of ours.
for _auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
    _auto.register(HoliTomQwen3VLConfig, HoliTomQwen3VLForConditionalGeneration, exist_ok=True)

__all__ = ["HoliTomQwen3VLForConditionalGeneration", "HoliTomQwen3VLModel", "HoliTomQwen3VLTextModel"]
