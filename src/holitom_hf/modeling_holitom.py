"""LLaVA-OneVision with HoliTom: the three stages, placed into transformers' own forward passes."""

import torch
from torch import nn
from transformers import LlavaOnevisionForConditionalGeneration, LlavaOnevisionModel
from transformers.cache_utils import Cache
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.llava_onevision.modeling_llava_onevision import (
    LlavaOnevisionModelOutputWithPast,
    LlavaOnevisionPreTrainedModel,
)
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults

from .checkpoint_holitom import HoliTomCheckpointMixin
from .compaction import compact_prompt
from .compressed_sequence import CompressedSequence
from .configuration_holitom import HoliTomConfig, HoliTomLlavaOnevisionConfig
from .decoder_holitom import HoliTomQwen2Model
from .generation_holitom import HoliTomGenerationMixin
from .inner_merging import InnerStage
from .outputs_holitom import HoliTomCausalLMOutputWithPast, HoliTomModelOutputWithPast
from .packed_rows import take_rows
from .pipeline_holitom import VideoTextToTextPipeline  # noqa: F401 - as remote code, only imported files travel on
from .token_merging import merge_encoded_videos
from .video_placeholders import cached_length, check_mask, check_position_ids, last_real, token_positions
from .vision_holitom import HoliTomVisionMixin


class HoliTomLlavaOnevisionModel(HoliTomCheckpointMixin, HoliTomVisionMixin, LlavaOnevisionModel):
    """`LlavaOnevisionModel` whose videos are shortened before the decoder and inside it."""

    config: HoliTomLlavaOnevisionConfig

    def __init__(self, config: HoliTomLlavaOnevisionConfig):
        config.holitom_config.check_decoder_depth(config.text_config.num_hidden_layers)
        super().__init__(config)
        # In place of the plain decoder that upstream's __init__ made. (Loading makes both without memory.)
        self.language_model = HoliTomQwen2Model._from_config(config.text_config)

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
        past_key_values: Cache | None = None,
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
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        settings = self.config.holitom_config if holitom_config is None else HoliTomConfig.coerce(holitom_config)
        settings.check_decoder_depth(self.config.text_config.num_hidden_layers)
        batch_size, num_new = (input_ids if input_ids is not None else inputs_embeds).shape[:2]
        past = CompressedSequence.of(past_key_values, num_new)
        if past is not None:
            past = past.for_batch(batch_size)
        mm_encoder_outputs = dict(mm_encoder_outputs) if mm_encoder_outputs else {}
        has_video = pixel_values_videos is not None or mm_encoder_outputs.get("video") is not None
        is_plain = past is None and (settings.is_identity or not has_video)
        if isinstance(attention_mask, torch.Tensor) and not is_plain:
            seen = past.seen_length(past_key_values) if past is not None else cached_length(past_key_values)
            check_mask(attention_mask, (batch_size, seen + num_new))

        if pixel_values_videos is not None:
            if mm_encoder_outputs.get("video") is not None:
                raise ValueError("pass either pixel_values_videos or mm_encoder_outputs['video'], not both")
            self.check_placeholders(input_ids, pixel_values_videos)
            mm_encoder_outputs["video"] = self.get_video_features(
                pixel_values_videos,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                vision_batch_size=vision_batch_size,
                holitom_config=settings,
                return_dict=True,
            )
        if pixel_values is not None:
            if mm_encoder_outputs.get("image") is not None:
                raise ValueError("pass either pixel_values or mm_encoder_outputs['image'], not both")
            mm_encoder_outputs["image"] = self.get_image_features(
                pixel_values,
                image_sizes,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                batch_num_images=batch_num_images,
                return_dict=True,
            )

        video, image = mm_encoder_outputs.get("video"), mm_encoder_outputs.get("image")
        decoder_kwargs = {"past_key_values": past_key_values, "use_cache": use_cache, **kwargs}
        if is_plain:
            if video is not None and not isinstance(video.pooler_output, torch.Tensor):
                mm_encoder_outputs["video"] = BaseModelOutputWithPooling(
                    pooler_output=torch.cat(video.pooler_output)[None]
                )
            return super().forward(
                input_ids=input_ids,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                mm_encoder_outputs=mm_encoder_outputs,
                return_dict=True,
                **decoder_kwargs,
            )

        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        image_mask, video_mask = self.get_placeholder_mask(input_ids, inputs_embeds)
        image_features = None
        if image is not None:
            image_features = torch.cat(image.pooler_output, dim=0).to(inputs_embeds)
            self.get_placeholder_mask(input_ids, inputs_embeds, image_features=image_features)
            inputs_embeds = inputs_embeds.masked_scatter(image_mask, image_features)
        if video is None:
            outputs = self._continue(inputs_embeds, attention_mask, position_ids, past, decoder_kwargs)
        else:
            outputs = self._compress(
                inputs_embeds,
                video_mask[..., 0],
                video,
                attention_mask,
                position_ids,
                past,
                settings,
                prompt_length,
                decoder_kwargs,
            )
        outputs.image_hidden_states = image_features
        return outputs

    def _continue(self, inputs_embeds, attention_mask, position_ids, past: CompressedSequence, decoder_kwargs):
        """A call without a new video on a cache that was compressed: only masks and positions change."""
        num_new = inputs_embeds.shape[1]
        outer_mask = inner_mask = None
        if isinstance(attention_mask, dict):
            outer_mask = attention_mask
        elif past.is_padded or attention_mask is not None or position_ids is None:
            num_after = past.seen_length(decoder_kwargs["past_key_values"]) - past.full_length + num_new
            total = past.including(num_after, attention_mask)
            if total.is_padded:
                outer_mask, inner_mask = total.outer_mask, total.inner_mask
        if position_ids is not None:
            position_ids = position_ids - past.num_dropped[:, None]
        else:
            position_ids = (total.outer_mask.cumsum(1) - 1)[:, -num_new:].clamp_min(0)
        if past.inner_layer is not None:
            decoder_kwargs = decoder_kwargs | {"inner_stage": InnerStage(layer=past.inner_layer)}
            if inner_mask is not None:
                decoder_kwargs["inner_stage"] = InnerStage(
                    layer=past.inner_layer,
                    past_mask=inner_mask[:, :-num_new],
                    mask=inner_mask[:, -num_new:],
                    is_padded=True,
                )
        outputs = self.language_model(
            inputs_embeds=inputs_embeds, attention_mask=outer_mask, position_ids=position_ids, **decoder_kwargs
        )
        return HoliTomModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _compress(
        self,
        inputs_embeds: torch.Tensor,
        video_mask: torch.Tensor,
        video: BaseModelOutputWithPooling,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        past: CompressedSequence | None,
        settings: HoliTomConfig,
        prompt_length: int | None,
        decoder_kwargs: dict,
    ) -> HoliTomModelOutputWithPast:
        """A call with videos: merge them, drop the placeholders they no longer need, run the decoder on the rest."""
        batch_size, num_new = inputs_embeds.shape[:2]
        device = inputs_embeds.device
        num_cached = cached_length(decoder_kwargs["past_key_values"])
        if past is None:
            past = CompressedSequence.uncompressed(num_cached, attention_mask, batch_size, device)
        past = past.including(num_cached - past.outer_mask.shape[1], attention_mask)
        is_real = torch.ones_like(video_mask)
        if attention_mask is not None:
            is_real = attention_mask[:, past.full_length :].to(is_real)

        # Stages 1 and 2.
        merged, embeddings = merge_encoded_videos(
            list(video.pooler_output),
            getattr(video, "importance", None),
            getattr(video, "keys", None),
            self._tokens_per_frame(),
            settings,
        )
        prompt = compact_prompt(
            inputs_embeds, video_mask, is_real, embeddings, [len(tokens) for tokens in video.pooler_output]
        )
        packed, videos_of_row = prompt.packed, prompt.videos_of_row

        outer_mask = torch.cat([past.outer_mask, packed.mask], dim=1)
        is_padded = past.is_padded or packed.is_padded
        dropped_before = prompt.is_dropped.cumsum(1)  # (B, L)
        if position_ids is None:
            packed_positions = outer_mask.cumsum(1)[:, num_cached:] - 1
        else:
            check_position_ids(position_ids, num_new)
            packed_positions = position_ids - dropped_before - past.num_dropped[:, None]
            packed_positions = packed_positions.gather(1, packed.index)
        packed_positions = packed_positions.masked_fill(~packed.mask, 0)

        # Stage 3 runs inside the decoder.
        layer = past.inner_layer_with(settings.inner_merge_layer if settings.has_inner_stage else None)
        if layer is not None:
            stage = InnerStage(layer, past.inner_mask, packed.mask, is_padded, num_past=num_cached)
            if settings.has_inner_stage:
                num_tokens = [len(tokens) for tokens in embeddings]
                stage.videos = token_positions(prompt.video_mask, videos_of_row, num_tokens)
                stage.merge_ratio, stage.fold = settings.inner_merge_ratio, settings.inner_method == "merge"
                stage.num_real, stage.padding_side = packed.num_kept, packed.padding_side
                num_prompt = num_new if prompt_length is None else prompt_length - past.full_length
                stage.query = packed.last_kept.gather(1, last_real(is_real, num_prompt))[:, 0]
            decoder_kwargs = decoder_kwargs | {"inner_stage": stage}
        outputs = self.language_model(
            inputs_embeds=prompt.embeds,
            attention_mask=outer_mask if is_padded else None,
            position_ids=packed_positions,
            **decoder_kwargs,
        )

        survivors = getattr(outputs, "survivors", None)
        output_index, inner_mask, inner_keep = packed.last_kept, packed.mask, None
        if survivors is not None:
            survivors = survivors.to(device)
            output_index = survivors.last_kept.gather(1, output_index)
            inner_mask = survivors.mask
            inner_keep = [
                survivors.row(row) - packed.row_start(row) if videos else None
                for row, videos in enumerate(videos_of_row)
            ]
        merged_videos = [[merged[v] for v in videos] for videos in videos_of_row]
        if outputs.past_key_values is not None:
            CompressedSequence(
                full_length=past.full_length + num_new,
                outer_mask=outer_mask,
                inner_mask=torch.cat([past.inner_mask, inner_mask], dim=1),
                inner_layer=layer,
                num_dropped=past.num_dropped + dropped_before[:, -1],
                is_padded=is_padded or (survivors is not None and survivors.is_padded),
                merged_videos=merged_videos,
                inner_keep=inner_keep if inner_keep is not None else [None] * batch_size,
            ).attach(outputs.past_key_values)
        return HoliTomModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            video_hidden_states=torch.cat(list(video.pooler_output)),
            merged_videos=merged_videos,
            inner_keep=inner_keep,
            output_index=output_index,
        )


class HoliTomLlavaOnevisionForConditionalGeneration(
    HoliTomCheckpointMixin, HoliTomGenerationMixin, LlavaOnevisionForConditionalGeneration
):
    """`LlavaOnevisionForConditionalGeneration` on a [`HoliTomLlavaOnevisionModel`]."""

    config: HoliTomLlavaOnevisionConfig

    def __init__(self, config: HoliTomLlavaOnevisionConfig):
        # Not the parent's __init__, which would first build a complete upstream model.
        LlavaOnevisionPreTrainedModel.__init__(self, config)
        self.model = HoliTomLlavaOnevisionModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

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
        past_key_values: Cache | None = None,
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
        tokens = input_ids if input_ids is not None else inputs_embeds
        if labels is not None and tokens is not None and labels.shape != tokens.shape[:2]:
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}; they must have the full length of the input, "
                f"{tuple(tokens.shape[:2])}, with -100 where no loss is taken"
            )
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
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            mm_encoder_outputs=mm_encoder_outputs,
            holitom_config=holitom_config,
            vision_batch_size=vision_batch_size,
            prompt_length=prompt_length,
            return_dict=True,
            **kwargs,
        )
        logits = self._full_length_logits(outputs, logits_to_keep)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return HoliTomCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            video_hidden_states=outputs.video_hidden_states,
            merged_videos=outputs.get("merged_videos"),
            inner_keep=outputs.get("inner_keep"),
        )

    def _full_length_logits(self, outputs: HoliTomModelOutputWithPast, logits_to_keep: int | torch.Tensor):
        """Logits at the requested positions of the full length; the vocabulary is computed once per distinct token."""
        hidden_states, index = outputs.last_hidden_state, outputs.get("output_index")
        if index is None:
            return self.lm_head(slice_logits_to_keep(hidden_states, logits_to_keep))
        is_whole = isinstance(logits_to_keep, int) and not 0 < logits_to_keep < hidden_states.shape[1]
        wanted = slice_logits_to_keep(index[..., None], logits_to_keep)[..., 0].to(hidden_states.device)
        if is_whole:
            logits = self.lm_head(hidden_states)
            return take_rows(logits, wanted.to(logits.device))
        if wanted.ndim == 1:  # a boolean selection, which is flat
            raise ValueError("a boolean logits_to_keep is not supported with compressed videos: pass positions")
        return self.lm_head(take_rows(hidden_states, wanted))

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

__all__ = [
    "HoliTomLlavaOnevisionForConditionalGeneration",
    "HoliTomLlavaOnevisionModel",
    "HoliTomQwen2Model",
]
