"""Models whose decoders have layers of linear attention, gated delta nets, between those of full attention."""

import copy
from dataclasses import replace

import torch
from torch import nn
from transformers.cache_utils import Cache

from ...configuration import HoliTomConfig
from ..decoder import HoliTomDecoderMixin
from ..masks import causal_mask
from ..upstream import CACHE_NAME, takes_cache
from .forward import QwenModelMixin
from .positions import QwenGenerationMixin


class HybridDecoderMixin(HoliTomDecoderMixin):
    """
    [`HoliTomDecoderMixin`] for Qwen3.5's decoders. A layer of linear attention carries a state from token to token
    and has no keys: behind stage 3 it sees the tokens that are left, in their order.
    """

    num_position_axes = 3
    needs_stage = True  # of both kinds of masks

    def layer_masks(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: Cache | None,
        layer_idx: int,
        sizes: torch.Tensor | None,
    ) -> dict[str, torch.Tensor | None]:
        """
        Overrides HoliTomDecoderMixin.layer_masks: padding is set to zero where attention is linear, and sizes count
        where it is full.

        Raises:
            ValueError: If padding follows what is cached: upstream's layers let their states fade over it.
        """
        num_new, is_real = hidden_states.shape[1], None
        if attention_mask is not None and num_new > 1:
            past, is_real = attention_mask.split([attention_mask.shape[1] - num_new, num_new], 1)
            if past.shape[1] and not is_real.all():
                raise ValueError(
                    "rows of a later turn would be padded behind what is cached, which linear attention can't leave "
                    "out: they must have as many tokens as each other, after compression, too; pass them one by one"
                )
        full, mask = first_full_layer(self.config, layer_idx), None
        if full is not None:
            mask = causal_mask(self.config, hidden_states, attention_mask, cache, full, sizes)
        return {"full_attention": mask, "linear_attention": is_real}

    def query_of(self, attention: nn.Module, normed: torch.Tensor) -> torch.Tensor:
        """Overrides HoliTomDecoderMixin.query_of: each head's projection is a query and a gate of the output."""
        heads = attention.q_proj(normed).unflatten(-1, (-1, 2, attention.head_dim))
        return attention.q_norm(heads[..., 0, :]).transpose(1, 2)

    def rotated(self, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Overrides HoliTomDecoderMixin.rotated: of a head's dimensions only the first ones turn."""
        turned = super().rotated(states[..., : cos.shape[-1]], cos, sin)
        return torch.cat([turned, states[..., cos.shape[-1] :]], -1)


class HybridModelMixin(QwenModelMixin):
    """[`QwenModelMixin`] on a decoder with [`HybridDecoderMixin`]."""

    def settings_for(self, holitom_config: HoliTomConfig | dict | str | None) -> HoliTomConfig:
        """
        Overrides CompressingModelMixin.settings_for: before anything is computed, a layer that stage 3 can't follow is
        refused.
        """
        settings = super().settings_for(holitom_config)
        if settings.has_inner_stage:
            self.language_model.check_layers(settings.inner_merge_layer)
        return settings


class HybridGenerationMixin(QwenGenerationMixin):
    """[`QwenGenerationMixin`] over a decoder with [`HybridDecoderMixin`]."""

    @staticmethod
    @takes_cache
    def create_masks_for_generate(config, inputs_embeds, attention_mask, cache, **kwargs):
        """
        Overrides HoliTomGenerationMixin.create_masks_for_generate: how many tokens there are behind stage 3 is asked
        of a layer of full attention, since the others do not know.
        """
        record = getattr(cache, "compressed_sequence", None)
        if record is not None and record.inner_layer is not None:
            cache = copy.copy(cache)  # of the same layers
            layer = first_full_layer(config.get_text_config(), record.inner_layer)
            cache.compressed_sequence = replace(record, inner_layer=layer)
        return QwenGenerationMixin.create_masks_for_generate(
            config, inputs_embeds, attention_mask, **{CACHE_NAME: cache}, **kwargs
        )


def first_full_layer(config, layer_idx: int) -> int | None:
    """The first of a decoder's layers from `layer_idx` on that has full attention; `None` if none has."""
    later = config.layer_types[layer_idx:]
    return layer_idx + later.index("full_attention") if "full_attention" in later else None
