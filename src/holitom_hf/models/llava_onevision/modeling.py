"""LLaVA-OneVision with HoliTom: the three stages, placed into transformers' own forward passes."""

import torch
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionModel,
    Qwen2Model,
    SiglipVisionConfig,
)
from transformers.cache_utils import Cache
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava_onevision.modeling_llava_onevision import (
    LlavaOnevisionModelOutputWithPast,
    LlavaOnevisionPreTrainedModel,
)
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults

from ...checkpoints.checkpoint import HoliTomCheckpointMixin
from ...configuration import HoliTomConfig
from ..compression import CompressingModelMixin
from ..decoder import HoliTomDecoderMixin
from ..generation import HoliTomGenerationMixin
from ..language_head import CompressedHeadMixin
from ..outputs import shared_fields
from ..pipeline import VideoTextToTextPipeline  # noqa: F401 - as remote code, only imported files travel on
from ..siglip import HoliTomSiglipVisionModel
from ..upstream import CACHE_NAME, HAS_ENCODER_OUTPUTS, takes_cache
from .configuration import HoliTomLlavaOnevisionConfig
from .outputs import HoliTomCausalLMOutputWithPast, HoliTomModelOutputWithPast
from .vision import LlavaOnevisionVisionMixin


class HoliTomQwen2Model(HoliTomDecoderMixin, Qwen2Model):
    """`Qwen2Model` with stage 3: from one layer on, videos have fewer tokens (section 3.3)."""


class HoliTomLlavaOnevisionModel(
    HoliTomCheckpointMixin, LlavaOnevisionVisionMixin, CompressingModelMixin, LlavaOnevisionModel
):
    """`LlavaOnevisionModel` whose videos are shortened before the decoder and inside it."""

    config: HoliTomLlavaOnevisionConfig
    output_class = HoliTomModelOutputWithPast

    def __init__(self, config: HoliTomLlavaOnevisionConfig):
        config.holitom_config.check_decoder_depth(config.text_config.num_hidden_layers)
        super().__init__(config)
        # In place of the plain decoder and tower that upstream's __init__ made. (Loading makes both without memory.)
        self.language_model = HoliTomQwen2Model._from_config(config.text_config)
        if isinstance(config.vision_config, SiglipVisionConfig):
            self.vision_tower = HoliTomSiglipVisionModel._from_config(config.vision_config)

    @takes_cache
    @merge_with_config_defaults
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        pixel_values_videos: torch.Tensor | list[torch.Tensor] | None = None,
        image_sizes_videos: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        vision_aspect_ratio: str | None = None,
        batch_num_images: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        holitom_config: HoliTomConfig | dict | str | None = None,
        vision_batch_size: int | None = None,
        prompt_length: int | None = None,
        **kwargs,
    ) -> HoliTomModelOutputWithPast | LlavaOnevisionModelOutputWithPast:
        """
        Overrides LlavaOnevisionModel.forward: the decoder runs on fewer video tokens than there are placeholders.

        Args:
            pixel_values_videos: (V, F, C, H, W), or a list of V tensors (F_v, C, H, W).
            attention_mask: (B, P+L), P the positions passed before with this cache, dropped ones included.
            position_ids: (B, L) as for the uncompressed sequence; what was dropped before a token is subtracted.
            holitom_config: Settings for this call in place of `config.holitom_config`.
            vision_batch_size: Number of frames that go through the vision tower at once; `None`: what the device's
                memory allows.
            prompt_length: Number of leading positions (P included) that are the prompt. Stage 3 keeps what the last
                real token among them attends to; `None`: the last real token of the call.
            The rest: as in `LlavaOnevisionModel.forward`.

        Returns:
            [`HoliTomModelOutputWithPast`]; upstream's output where nothing is or was compressed.

        Raises:
            ValueError: If placeholders and videos don't match, a mask or position ids have a wrong shape, pixels are
                not finite, or the settings don't fit the decoder.
        """
        settings = self.settings_for(holitom_config)
        vision_kwargs = {
            "vision_feature_layer": vision_feature_layer,
            "vision_feature_select_strategy": vision_feature_select_strategy,
            "return_dict": True,
        }

        def encode_videos():
            self.check_placeholders(input_ids, pixel_values_videos)
            return self.get_video_features(
                pixel_values_videos,
                vision_batch_size=vision_batch_size,
                holitom_config=settings,
                return_vision_states=False,
                **vision_kwargs,
            )

        def encode_images():
            return self.get_image_features(
                pixel_values, image_sizes, batch_num_images=batch_num_images, **vision_kwargs
            )

        encoders = {}
        if pixel_values_videos is not None:
            encoders["video"] = ("pixel_values_videos", encode_videos)
        if pixel_values is not None:
            encoders["image"] = ("pixel_values", encode_images)
        return self.compressing_forward(
            input_ids,
            inputs_embeds,
            attention_mask,
            position_ids,
            cache,
            use_cache,
            mm_encoder_outputs,
            encoders,
            settings,
            prompt_length,
            **kwargs,
        )

    def upstream_video(self, video: BaseModelOutputWithPooling) -> BaseModelOutputWithPooling:
        """Overrides CompressingModelMixin.upstream_video: videos of different length become one row of features."""
        if isinstance(video.pooler_output, torch.Tensor):
            return video
        return BaseModelOutputWithPooling(pooler_output=torch.cat(video.pooler_output)[None])

    def media_fields(self, image_features, encoded) -> dict:
        """Overrides CompressingModelMixin.media_fields: before transformers 5.24 outputs have the features alone."""
        if HAS_ENCODER_OUTPUTS:
            return super().media_fields(image_features, encoded)
        video = encoded.get("video")
        video_features = torch.cat(list(video.pooler_output)) if video is not None else None
        return {"image_hidden_states": image_features, "video_hidden_states": video_features}


class HoliTomLlavaOnevisionForConditionalGeneration(
    HoliTomCheckpointMixin, HoliTomGenerationMixin, CompressedHeadMixin, LlavaOnevisionForConditionalGeneration
):
    """
    `LlavaOnevisionForConditionalGeneration` on a [`HoliTomLlavaOnevisionModel`].

    ```python
    import torch
    from holitom_hf import HoliTomLlavaOnevisionForConditionalGeneration, HoliTomProcessor

    name = "llava-hf/llava-onevision-qwen2-7b-ov-hf"
    model = HoliTomLlavaOnevisionForConditionalGeneration.from_pretrained(
        name, holitom_config={"retention_ratio": 0.1}, dtype="auto", device_map="auto"
    )
    processor = HoliTomProcessor.from_pretrained(name)
    content = [{"type": "video"}, {"type": "text", "text": "What happens in the video?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=prompt, videos="video.mp4", return_tensors="pt").to(model.device, model.dtype)
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=128, return_dict_in_generate=True)
    print(processor.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    print(output.merged_videos[0][0])
    ```
    """

    config: HoliTomLlavaOnevisionConfig

    def __init__(self, config: HoliTomLlavaOnevisionConfig):
        # Not the parent's __init__, which would first build a complete upstream model.
        LlavaOnevisionPreTrainedModel.__init__(self, config)
        self.model = HoliTomLlavaOnevisionModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @takes_cache
    @merge_with_config_defaults
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        pixel_values_videos: torch.Tensor | list[torch.Tensor] | None = None,
        image_sizes_videos: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        vision_aspect_ratio: str | None = None,
        batch_num_images: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        holitom_config: HoliTomConfig | dict | str | None = None,
        vision_batch_size: int | None = None,
        prompt_length: int | None = None,
        **kwargs,
    ) -> HoliTomCausalLMOutputWithPast:
        """
        Overrides LlavaOnevisionForConditionalGeneration.forward: `logits`, `labels` and `logits_to_keep` refer to the
        full length, whatever was dropped.

        Args:
            labels: (B, L), -100 where no loss is taken; the loss is over the same tokens as upstream's.
            holitom_config, vision_batch_size, prompt_length: As in [`HoliTomLlavaOnevisionModel.forward`].
            The rest: as upstream.

        Returns:
            [`HoliTomCausalLMOutputWithPast`].

        Raises:
            ValueError: As [`HoliTomLlavaOnevisionModel.forward`], and if `labels` have a wrong shape.
        """
        self.check_labels(labels, input_ids if input_ids is not None else inputs_embeds)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            image_sizes=image_sizes,
            image_sizes_videos=image_sizes_videos,
            vision_aspect_ratio=vision_aspect_ratio,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            batch_num_images=batch_num_images,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            mm_encoder_outputs=mm_encoder_outputs,
            holitom_config=holitom_config,
            vision_batch_size=vision_batch_size,
            prompt_length=prompt_length,
            return_dict=True,
            **{CACHE_NAME: cache},
            **kwargs,
        )
        logits = self.full_length_logits(outputs, logits_to_keep)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return HoliTomCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **shared_fields(outputs, HoliTomCausalLMOutputWithPast),
        )

    def get_video_features(self, *args, **kwargs):
        """Overrides LlavaOnevisionForConditionalGeneration.get_video_features: see [`HoliTomLlavaOnevisionModel`]."""
        return self.model.get_video_features(*args, **kwargs)


# Checkpoints of llava-onevision name their weights as transformers 4 did and are renamed on load, by class name or
# model type; for classes from outside transformers only if they are registered.
for _class, _upstream in (
    (HoliTomLlavaOnevisionForConditionalGeneration, "llava_onevision"),
    (HoliTomLlavaOnevisionModel, "LlavaOnevisionModel"),
):
    register_checkpoint_conversion_mapping(
        _class.__name__, get_checkpoint_conversion_mapping(_upstream) or [], overwrite=True
    )

# Its pipelines take a model to be supported if its class is registered for a configuration, here one of ours.
for _auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
    _auto.register(HoliTomLlavaOnevisionConfig, HoliTomLlavaOnevisionForConditionalGeneration, exist_ok=True)

__all__ = [
    "HoliTomLlavaOnevisionForConditionalGeneration",
    "HoliTomLlavaOnevisionModel",
    "HoliTomQwen2Model",
]
