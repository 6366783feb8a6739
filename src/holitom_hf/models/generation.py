"""`generate` on videos whose cache is shorter than what the caller counts."""

import copy
import os

import torch
import torch.nn.functional as F
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput, logging

from ..sequence.compressed_sequence import CompressedSequence
from ..sequence.placeholders import cached_length
from .masks import causal_mask
from .upstream import CACHE_NAME, cache_of, takes_cache


logger = logging.get_logger(__name__)

# Of `forward`, besides upstream's.
OWN_ARGUMENTS = ("holitom_config", "vision_batch_size", "prompt_length")


class EncodedMedia(dict):
    """
    `mm_encoder_outputs` of a turn.

    Attributes:
        num_old: How many of the tokens that `generate` was given belong to earlier turns, whose media are not in it.
    """

    num_old = 0


class HoliTomGenerationMixin:
    """The overrides of `GenerationMixin` that compressed videos need."""

    def generate(self, *args, **kwargs):
        """
        Overrides GenerationMixin.generate: with `return_dict_in_generate=True` the result also has `merged_videos` and
        `inner_keep` (as in [`CompressedOutput`]), an entry per returned sequence: what was done to the last videos
        that its cache has seen. `None` where nothing was compressed or there is no cache.
        """
        if "cache" in kwargs:  # which callers may say with every release of transformers
            kwargs[CACHE_NAME] = kwargs.pop("cache")
        outputs = super().generate(*args, **kwargs)
        if isinstance(outputs, ModelOutput):
            record = getattr(cache_of(outputs), "compressed_sequence", None)
            num_sequences = len(outputs.sequences)
            for name in ("merged_videos", "inner_keep"):
                setattr(outputs, name, None)
                if record is not None and record.merged_videos:
                    of_row = getattr(record, name)  # of every beam, more of them than are returned
                    outputs[name] = [of_row[i * len(of_row) // num_sequences] for i in range(num_sequences)]
        return outputs

    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs_tensor, model_kwargs, model_input_name, generation_config
    ):
        """
        Overrides GenerationMixin: checks the placeholders before videos are encoded, keeps the settings for `forward`
        that encoding takes too, and notes where the prompt ends, so that stage 3 asks its last token also where the
        first forward pass holds more than the prompt (assisted decoding) or every one does (`use_cache=False`).
        """
        if isinstance(model_kwargs.get("holitom_config"), (str, os.PathLike)):
            # Once, not in every step. A dictionary stays one: an assistant's own settings may be others.
            model_kwargs["holitom_config"] = self.model.settings_for(model_kwargs["holitom_config"])
        tokens = model_kwargs.get("input_ids", inputs_tensor)
        mask, cache = model_kwargs.get("attention_mask"), model_kwargs.get(CACHE_NAME)
        # A later turn passes the whole conversation, or its new tokens and a mask of the whole.
        total = (
            mask.shape[1] if mask is not None else getattr(generation_config, "_mask_length", inputs_tensor.shape[1])
        )
        past = CompressedSequence.of(cache, num_new_tokens=2)
        seen = past.seen_length(cache) if past is not None else cached_length(cache)
        num_old = seen if inputs_tensor.shape[1] == total else 0
        if model_kwargs.get("pixel_values_videos") is not None:
            is_ids = tokens.ndim == 2 and tokens.shape[1] > 0
            self.check_videos(tokens[:, num_old:] if is_ids else None, model_kwargs)
        kept = {"prompt_length": total} | {
            name: model_kwargs[name]
            for name in ("holitom_config", "prompt_length")
            if model_kwargs.get(name) is not None
        }
        model_kwargs = super()._maybe_prepare_encoder_kwargs_for_generation(
            inputs_tensor, model_kwargs | {"return_vision_states": False}, model_input_name, generation_config
        )
        model_kwargs.pop("return_vision_states", None)
        encoded = EncodedMedia(model_kwargs.get("mm_encoder_outputs") or {})
        encoded.num_old = num_old
        return model_kwargs | kept | {"mm_encoder_outputs": encoded}

    def check_videos(self, input_ids: torch.Tensor | None, model_kwargs: dict) -> None:
        """Hook: raises a `ValueError` if a turn's new tokens (B, L) don't fit the videos that it brings."""
        self.model.check_placeholders(input_ids, model_kwargs["pixel_values_videos"])

    def _get_candidate_generator(self, *args, model_kwargs, assistant_model=None, **kwargs):
        """Overrides GenerationMixin: an assistant of another kind is spared the arguments that only we take."""
        if assistant_model is not None and not isinstance(assistant_model, HoliTomGenerationMixin):
            model_kwargs = {name: value for name, value in model_kwargs.items() if name not in OWN_ARGUMENTS}
        return super()._get_candidate_generator(
            *args, model_kwargs=model_kwargs, assistant_model=assistant_model, **kwargs
        )

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        """Overrides GenerationMixin: a prompt with videos is not cut into chunks, since merging needs them whole."""
        encoded = model_kwargs.get("mm_encoder_outputs") or {}
        if generation_config.prefill_chunk_size is not None and encoded.get("video") is not None:
            logger.warning_once("prefill_chunk_size is ignored for prompts with videos: merging needs them whole.")
            generation_config = copy.copy(generation_config)
            generation_config.prefill_chunk_size = None
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def _expand_multimodal_outputs(self, input_ids, mm_encoder_output, expand_size=1, inputs_embeds=None):
        """
        Overrides GenerationMixin: what travels with a video's features is repeated for every beam as they are, and
        placeholders of earlier turns are not counted.
        """
        num_old = getattr(mm_encoder_output, "num_old", 0)
        input_ids, inputs_embeds = (
            tokens[:, num_old:] if tokens is not None else None for tokens in (input_ids, inputs_embeds)
        )
        video = mm_encoder_output.get("video")
        if any(getattr(video, name) is not None for name in getattr(video, "per_video", ())):
            indices = [torch.full((len(features),), v) for v, features in enumerate(video.pooler_output)]
            repeated = (
                super()
                ._expand_multimodal_outputs(
                    input_ids, {"video": BaseModelOutputWithPooling(pooler_output=indices)}, expand_size, inputs_embeds
                )["video"]
                .pooler_output
            )
            order = [int(index[0]) for index in repeated]
            for name in video.per_video:
                if getattr(video, name) is not None:
                    setattr(video, name, [getattr(video, name)[v] for v in order])
        return super()._expand_multimodal_outputs(input_ids, mm_encoder_output, expand_size, inputs_embeds)

    @takes_cache
    def prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=None,
        cache=None,
        inputs_embeds=None,
        is_first_iteration=False,
        **kwargs,
    ):
        """
        Overrides GenerationMixin.prepare_inputs_for_generation: what a compressed cache has seen is more than what it
        holds, so that a later turn is cut by the former.
        """
        if is_first_iteration and next_sequence_length is not None:
            past = CompressedSequence.of(cache, num_new_tokens=2)
            if past is not None:
                sequence = inputs_embeds if inputs_embeds is not None else input_ids
                next_sequence_length = sequence.shape[1] - past.seen_length(cache)
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **{CACHE_NAME: cache},
            **kwargs,
        )

    @staticmethod
    @takes_cache
    def create_masks_for_generate(config, inputs_embeds, attention_mask, cache, is_first_iteration=False, **kwargs):
        """
        Overrides transformers.masking_utils.create_masks_for_generate, for caches that compile: a prompt keeps its 2D
        mask, since what it drops is not known yet; later steps get masks of what the layers hold.
        """
        past = CompressedSequence.of(cache, num_new_tokens=2 if is_first_iteration else 1)
        if is_first_iteration:
            return attention_mask
        if past is None:
            return create_masks_for_generate(config, inputs_embeds, attention_mask, cache, **kwargs)
        past = past.for_batch(inputs_embeds.shape[0])
        layers = {"full_attention": (0, past.outer_mask, past.outer_sizes)}
        if past.inner_layer is not None:
            layers["inner_attention"] = (past.inner_layer, past.inner_mask, past.inner_sizes)
        masks = {"linear_attention": None}  # a step's tokens are real
        for name, (layer_idx, mask, sizes) in layers.items():
            if past.is_padded or attention_mask is not None:
                # Places after the compressed ones are real where the caller's mask says so or does not reach yet:
                # causality leaves out those that are not taken.
                if attention_mask is not None:
                    mask = torch.cat([mask, attention_mask[:, past.full_length :].to(mask)], dim=1)
                num_places, _ = cache.get_mask_sizes(inputs_embeds.shape[1], layer_idx)
                mask = F.pad(mask, (0, num_places - mask.shape[1]), value=True)
            else:
                mask = None
            masks[name] = causal_mask(config.get_text_config(), inputs_embeds, mask, cache, layer_idx, sizes)
        return masks
