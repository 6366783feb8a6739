"""Qwen2.5-VL with HoliTom: the three stages, placed into transformers' own forward passes."""

from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLModel,
    Qwen2_5_VLTextModel,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLPreTrainedModel

from ...checkpoints.checkpoint import HoliTomCheckpointMixin
from ..decoder import HoliTomDecoderMixin
from ..pipeline import VideoTextToTextPipeline  # noqa: F401 - as remote code, only imported files travel on
from ..qwen_vl.forward import QwenHeadMixin, QwenModelMixin
from ..qwen_vl.positions import QwenGenerationMixin
from .configuration import HoliTomQwen2_5_VLConfig


class HoliTomQwen2_5_VLTextModel(HoliTomDecoderMixin, Qwen2_5_VLTextModel):
    """`Qwen2_5_VLTextModel` with stage 3: from one layer on, videos have fewer tokens."""

    num_position_axes = 3


class HoliTomQwen2_5_VLModel(HoliTomCheckpointMixin, QwenModelMixin, Qwen2_5_VLModel):
    """`Qwen2_5_VLModel` whose videos are shortened before the decoder and inside it."""

    config: HoliTomQwen2_5_VLConfig

    def __init__(self, config: HoliTomQwen2_5_VLConfig):
        config.holitom_config.check_decoder_depth(config.text_config.num_hidden_layers)
        super().__init__(config)
        # In place of the plain decoder that upstream's __init__ made. (Loading makes both without memory.)
        self.language_model = HoliTomQwen2_5_VLTextModel._from_config(config.text_config)


class HoliTomQwen2_5_VLForConditionalGeneration(
    HoliTomCheckpointMixin, QwenGenerationMixin, QwenHeadMixin, Qwen2_5_VLForConditionalGeneration
):
    """
    `Qwen2_5_VLForConditionalGeneration` on a [`HoliTomQwen2_5_VLModel`].

    ```python
    import torch
    from holitom_hf import HoliTomQwen2_5_VLForConditionalGeneration, HoliTomQwen2_5_VLProcessor

    name = "Qwen/Qwen2.5-VL-7B-Instruct"
    model = HoliTomQwen2_5_VLForConditionalGeneration.from_pretrained(
        name, holitom_config={"retention_ratio": 0.25}, dtype="auto", device_map="auto"
    )
    processor = HoliTomQwen2_5_VLProcessor.from_pretrained(name)
    content = [{"type": "video"}, {"type": "text", "text": "What happens in the video?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=prompt, videos="video.mp4", num_frames=32, return_tensors="pt").to(model.device)
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=128, return_dict_in_generate=True)
    print(processor.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    print(output.merged_videos[0][0])
    ```
    """

    config: HoliTomQwen2_5_VLConfig

    def __init__(self, config: HoliTomQwen2_5_VLConfig):
        # Not the parent's __init__, which would first build a complete upstream model.
        Qwen2_5_VLPreTrainedModel.__init__(self, config)
        self.model = HoliTomQwen2_5_VLModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()


# Published checkpoints name their weights as transformers 4 did and are renamed on load, by class name; for classes
# from outside transformers only if they are registered.
for _class, _upstream in (
    (HoliTomQwen2_5_VLForConditionalGeneration, Qwen2_5_VLForConditionalGeneration),
    (HoliTomQwen2_5_VLModel, Qwen2_5_VLModel),
):
    register_checkpoint_conversion_mapping(
        _class.__name__, get_checkpoint_conversion_mapping(_upstream.__name__) or [], overwrite=True
    )

# Its pipelines take a model to be supported if its class is registered for a configuration, here one of ours.
for _auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
    _auto.register(HoliTomQwen2_5_VLConfig, HoliTomQwen2_5_VLForConditionalGeneration, exist_ok=True)

__all__ = ["HoliTomQwen2_5_VLForConditionalGeneration", "HoliTomQwen2_5_VLModel", "HoliTomQwen2_5_VLTextModel"]
