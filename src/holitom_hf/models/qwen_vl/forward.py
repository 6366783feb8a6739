"""The forward passes that Qwen-VL backbones share: flat patches with grids, three position axes, DeepStack."""

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults

from ...configuration import HoliTomConfig
from ..compression import CompressingModelMixin
from ..language_head import CompressedHeadMixin
from ..outputs import shared_fields
from ..upstream import CACHE_NAME, takes_cache
from .outputs import QwenCausalLMOutput, QwenModelOutput
from .positions import QwenPositionsMixin, position_inputs
from .vision import QwenVisionMixin


NO_TOKEN = -1  # an id that no token has


class QwenModelMixin(QwenVisionMixin, QwenPositionsMixin, CompressingModelMixin):
    """For the model of a Qwen-VL backbone, before upstream's class: its videos are shortened."""

    output_class = QwenModelOutput

    def decoder_inputs(
        self,
        maps: list[torch.Tensor],
        video_mask: torch.Tensor,
        image: BaseModelOutputWithPooling | None = None,
        image_mask: torch.Tensor | None = None,
    ) -> dict:
        """Overrides CompressingModelMixin.decoder_inputs: DeepStack's features, merged as the tokens are."""
        image_maps = [torch.cat(list(layer)) for layer in getattr(image, "deepstack_features", None) or ()]
        if not maps:
            maps, video_mask = image_maps, image_mask
        elif image_maps:
            maps, video_mask = joined_maps(maps, video_mask, image_maps, image_mask)
        return {"visual_pos_masks": video_mask, "deepstack_visual_embeds": maps} if maps else {}

    def placeholder_ids(self, input_ids: torch.Tensor | None, position_inputs: dict) -> torch.Tensor | None:
        """
        Overrides CompressingModelMixin.placeholder_ids: where `mm_token_type_ids` say that a token is text, it is:
        one that the model itself has written.
        """
        types = position_inputs.get("mm_token_type_ids")
        if input_ids is None or types is None or types.shape[1] < input_ids.shape[1]:
            return input_ids
        return input_ids.masked_fill(types[:, types.shape[1] - input_ids.shape[1] :] == 0, NO_TOKEN)

    @takes_cache
    @merge_with_config_defaults
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        video_grid_thw: torch.LongTensor | None = None,
        mm_token_type_ids: torch.IntTensor | None = None,
        second_per_grid_ts: torch.Tensor | list[float] | None = None,
        use_cache: bool | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        holitom_config: HoliTomConfig | dict | str | None = None,
        vision_batch_size: int | None = None,
        prompt_length: int | None = None,
        **kwargs,
    ) -> QwenModelOutput:
        """
        Overrides upstream's forward: the decoder runs on fewer video tokens than there are placeholders.

        Args:
            attention_mask: (B, P+L), P the positions passed before with this cache, dropped ones included.
            position_ids: (3, B, L), (4, B, L) or (B, L) as for the uncompressed sequence.
            pixel_values_videos, video_grid_thw: (P, C) patches and (V, 3) grids of the videos of this call.
            pixel_values, image_grid_thw: The same of its images.
            mm_token_type_ids: (B, L), what each token is; needed with images and videos.
            second_per_grid_ts: (V,), how long a temporal patch lasts, for Qwen2.5-VL's time axis; `None`: a second.
            holitom_config: Settings for this call in place of `config.holitom_config`.
            vision_batch_size: Number of temporal patches that go through the vision tower at once; `None`: what the
                device's memory allows.
            prompt_length: Number of leading positions (P included) that are the prompt. Stage 3 keeps what the last
                real token among them attends to; `None`: the last real token of the call.
            The rest: as upstream.

        Returns:
            [`QwenModelOutput`]; upstream's output where nothing is or was compressed.

        Raises:
            ValueError: If placeholders, patches and grids don't match, kinds of tokens are missing, a mask or position
                ids have a wrong shape, pixels are not finite, or the settings don't fit model or decoder.
        """
        settings = self.settings_for(holitom_config)

        def encode_videos():
            ids = self.placeholder_ids(input_ids, {"mm_token_type_ids": mm_token_type_ids})
            self.check_placeholders(ids, pixel_values_videos, video_grid_thw)
            return self.get_video_features(
                pixel_values_videos,
                video_grid_thw,
                vision_batch_size=vision_batch_size,
                holitom_config=settings,
                return_vision_states=False,
                return_dict=True,
                **kwargs,
            )

        def encode_images():
            return self.get_image_features(pixel_values, image_grid_thw, return_dict=True, **kwargs)

        encoders = {}
        if pixel_values_videos is not None:
            encoders["video"] = ("pixel_values_videos", encode_videos)
        if pixel_values is not None:
            encoders["image"] = ("pixel_values", encode_images)
        grids = position_inputs(mm_encoder_outputs, image_grid_thw=image_grid_thw, video_grid_thw=video_grid_thw)
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
            position_inputs=grids | {"mm_token_type_ids": mm_token_type_ids, "second_per_grid_ts": second_per_grid_ts},
            **kwargs,
        )


class QwenHeadMixin(CompressedHeadMixin):
    """For the model with a head of a Qwen-VL backbone, before upstream's class."""

    output_class = QwenCausalLMOutput

    def finished(
        self, output: QwenCausalLMOutput, inside: ModelOutput, attention_mask: torch.Tensor | None
    ) -> QwenCausalLMOutput:
        """Hook: an output with what else the head computes of `inside`, that of the model without a head."""
        return output

    @takes_cache
    @merge_with_config_defaults
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        video_grid_thw: torch.LongTensor | None = None,
        mm_token_type_ids: torch.IntTensor | None = None,
        second_per_grid_ts: torch.Tensor | list[float] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        holitom_config: HoliTomConfig | dict | str | None = None,
        vision_batch_size: int | None = None,
        prompt_length: int | None = None,
        **kwargs,
    ) -> QwenCausalLMOutput:
        """
        Overrides upstream's forward: `logits`, `labels` and `logits_to_keep` refer to the full length, whatever was
        dropped.

        Args:
            labels: (B, L), -100 where no loss is taken; the loss is over the same tokens as upstream's.
            The rest: as in [`QwenModelMixin.forward`].

        Returns:
            [`QwenCausalLMOutput`].

        Raises:
            ValueError: As [`QwenModelMixin.forward`], and if `labels` have a wrong shape.
        """
        self.check_labels(labels, input_ids if input_ids is not None else inputs_embeds)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            image_grid_thw=image_grid_thw,
            video_grid_thw=video_grid_thw,
            mm_token_type_ids=mm_token_type_ids,
            second_per_grid_ts=second_per_grid_ts,
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
        output = self.output_class(loss=loss, logits=logits, **shared_fields(outputs, self.output_class))
        return self.finished(output, outputs, attention_mask)

    def get_video_features(self, *args, **kwargs):
        """Overrides upstream's get_video_features: see [`QwenVisionMixin`]."""
        return self.model.get_video_features(*args, **kwargs)


def joined_maps(
    maps: list[torch.Tensor], mask: torch.Tensor, others: list[torch.Tensor], other_mask: torch.Tensor
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """
    Feature maps of two kinds of tokens as one of both.

    Args:
        maps, others: Each (N, E) and (I, E), in the order of the prompts.
        mask, other_mask: (B, L) bool, where these tokens stand.

    Returns:
        The maps, each (N+I, E), and where their tokens stand.
    """
    both = mask | other_mask
    is_first = mask[both]
    order = torch.cat([is_first.nonzero()[:, 0], (~is_first).nonzero()[:, 0]]).argsort()
    return [torch.cat([first, other.to(first)])[order] for first, other in zip(maps, others)], both
