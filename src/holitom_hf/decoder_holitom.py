"""The Qwen2 decoder with stage 3: from one layer on, videos have fewer tokens."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Qwen2Model
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .inner_merging import InnerStage, merge_videos
from .packed_rows import PackedRows, take_rows


@dataclass
class HoliTomDecoderOutput(BaseModelOutputWithPast):
    """
    `BaseModelOutputWithPast` of a decoder in which stage 3 ran.

    Attributes:
        survivors: The M of the N positions that came in that the last layers hold; `None` where nothing was merged.
    """

    survivors: PackedRows | None = None


class _KeyRecorder:
    """Stands in for the cache in one layer and remembers the keys that its attention sees, past ones included."""

    def __init__(self, cache: Cache):
        self.cache = cache
        self.keys: torch.Tensor | None = None  # (B, H_kv, S, d)

    def update(self, *args, **kwargs):
        self.keys, values = self.cache.update(*args, **kwargs)
        return self.keys, values


class HoliTomQwen2Model(Qwen2Model):
    """`Qwen2Model` with stage 3: from one layer on, videos have fewer tokens (section 3.3)."""

    def forward(self, *args, inner_stage: InnerStage | None = None, **kwargs) -> BaseModelOutputWithPast:
        """
        Overrides Qwen2Model.forward: with `inner_stage` the layers from `inner_stage.layer` on hold fewer tokens.

        Args:
            inner_stage: What to merge; `None` runs upstream's forward.
            args, kwargs: As in `Qwen2Model.forward`. With `inner_stage`, `attention_mask` is a (B, P+N) mask of the
                positions of the first layers or `None`, or a dictionary of ready 4D masks: `"full_attention"` for
                them and `"inner_attention"` for the layers from `inner_stage.layer` on.

        Returns:
            A `BaseModelOutputWithPast`, or with `inner_stage` a [`HoliTomDecoderOutput`].
        """
        if inner_stage is None:
            return super().forward(*args, **kwargs)
        return self._forward_inner(*args, inner_stage=inner_stage, **kwargs)

    @merge_with_config_defaults
    @capture_outputs
    def _forward_inner(
        self,
        inputs_embeds: torch.Tensor,
        inner_stage: InnerStage,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> HoliTomDecoderOutput:
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if self.has_sliding_layers:
            raise ValueError(
                "stage 3 needs full attention, this decoder has sliding windows: set inner_merge_layer=None"
            )
        first_inner, merges = inner_stage.layer, inner_stage.videos is not None

        hidden_states = inputs_embeds
        causal_mask = self._causal_mask(hidden_states, attention_mask, past_key_values, layer_idx=0)
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        layer_kwargs = {"position_ids": position_ids, "use_cache": use_cache, **kwargs}
        importance = survivors = None

        for layer_idx, decoder_layer in enumerate(self.layers):
            if layer_idx == first_inner:
                if merges:
                    hidden_states, survivors = merge_videos(hidden_states, importance, inner_stage)
                    position_ids = position_ids.to(hidden_states.device).gather(1, survivors.index)
                    position_embeddings = self.rotary_emb(hidden_states, position_ids)
                # Survivors keep their position ids, which have gaps then: an attention function that sees them would
                # take one row for several packed ones. Only the rotation above needs them.
                layer_kwargs["position_ids"] = None
                if not isinstance(attention_mask, dict):
                    attention_mask = _inner_attention_mask(inner_stage, survivors)
                causal_mask = self._causal_mask(hidden_states, attention_mask, past_key_values, layer_idx)

            layer_input, layer_cache = hidden_states, past_key_values
            is_asked = merges and layer_idx == first_inner - 1
            if is_asked and past_key_values is not None:
                layer_cache = _KeyRecorder(past_key_values)
            hidden_states = decoder_layer(
                hidden_states,
                attention_mask=causal_mask,
                position_embeddings=position_embeddings,
                past_key_values=layer_cache,
                **layer_kwargs,
            )
            if is_asked:
                keys = layer_cache.keys if layer_cache is not None else None
                importance = received_attention(
                    decoder_layer, layer_input, position_embeddings, keys, attention_mask, inner_stage
                )

        return HoliTomDecoderOutput(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=past_key_values if use_cache else None,
            survivors=survivors,
        )

    def _causal_mask(self, hidden_states, attention_mask, past_key_values, layer_idx: int):
        """The mask of the layers from `layer_idx` on, from a 2D one of their positions or a dict of ready ones."""
        if isinstance(attention_mask, dict):
            return attention_mask["full_attention" if layer_idx == 0 else "inner_attention"]
        # No position ids: create_causal_mask would only search them for packed rows, which gaps look like.
        return create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            layer_idx=layer_idx,
        )


def _inner_attention_mask(stage: InnerStage, survivors: PackedRows | None) -> torch.Tensor | None:
    """2D mask of the positions that the layers of stage 3 hold, with those of this call; `None` if all are real."""
    if not (stage.is_padded or (survivors is not None and survivors.is_padded)):
        return None
    mask = stage.mask if survivors is None else survivors.mask
    return torch.cat([stage.past_mask.to(mask.device), mask], dim=1)


@torch.no_grad()
def received_attention(
    layer: nn.Module,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    keys: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    stage: InnerStage,
) -> torch.Tensor:
    """
    The attention that the prompt's last token pays to the positions of this call, averaged over heads.

    One query row per sample: no attention matrix, whatever `attn_implementation` the layer runs with.

    Args:
        layer: The decoder layer.
        hidden_states: (B, N, D), what went into it.
        position_embeddings: Cosine and sine of this call's positions.
        keys: (B, H_kv, S, d) rotated keys with the past ones, or `None` without a cache.
        attention_mask: (B, P+N) bool, or `None` if all are real.
        stage: Its `query` and `num_past`.

    Returns:
        (B, N) float32.
    """
    attention = layer.self_attn
    batch_size, num_new, _ = hidden_states.shape
    shape = (batch_size, -1, attention.head_dim)
    normed = layer.input_layernorm(hidden_states)
    # Where this layer lies: with a device_map that need not be where the prompt came in.
    query = stage.query[:, None].to(normed.device)  # (B, 1)
    cos, sin = (values.to(normed.device).expand(batch_size, -1, -1) for values in position_embeddings)

    queries = attention.q_proj(take_rows(normed, query)).view(shape)[:, :, None]  # (B, H, 1, d)
    queries, _ = apply_rotary_pos_emb(queries, queries, take_rows(cos, query), take_rows(sin, query))
    if keys is None:
        keys = attention.k_proj(normed).view(batch_size, num_new, -1, attention.head_dim).transpose(1, 2)
        keys, _ = apply_rotary_pos_emb(keys, keys, cos, sin)

    num_kv_heads, num_keys = keys.shape[1:3]
    queries = queries.view(batch_size, num_kv_heads, -1, attention.head_dim)  # (B, H_kv, G, d)
    scores = (queries @ keys.mT).float() * attention.scaling  # (B, H_kv, G, S)
    # The token sees what is not after it; in a static cache there are unused places, too.
    is_seen = torch.arange(num_keys, device=keys.device) <= query + stage.num_past  # (B, S)
    if attention_mask is not None:
        is_seen = is_seen & F.pad(attention_mask.to(is_seen.device), (0, num_keys - attention_mask.shape[1]))
    probabilities = scores.masked_fill(~is_seen[:, None, None, :], -torch.inf).softmax(-1)
    importance = probabilities.mean((1, 2))[:, stage.num_past : stage.num_past + num_new]
    if isinstance(attention.q_proj.weight, DTensor):
        # Tensor parallel: this process saw its own heads only, and all must choose alike.
        group = attention.q_proj.weight.device_mesh.get_group()
        dist.all_reduce(importance := importance.contiguous(), group=group)
        importance = importance / dist.get_world_size(group)
    return importance
