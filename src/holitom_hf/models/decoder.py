"""Stage 3 in a decoder: from one layer on, videos have fewer tokens."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..sequence.compressed_sequence import joined_sizes
from ..sequence.inner_stage import InnerStage, merge_inside
from ..sequence.packed_rows import PackedRows, take_rows
from .masks import causal_mask, score_bias
from .upstream import CACHE_NAME, takes_cache


@dataclass
class HoliTomDecoderOutput(BaseModelOutputWithPast):
    """
    `BaseModelOutputWithPast` of a decoder in which stage 3 ran.

    Attributes:
        survivors: The M of the N positions that came in that the last layers hold; `None` where nothing was merged.
        sizes: (B, M) float32, for how many uncompressed tokens these stand; `None` where all count alike.
    """

    survivors: PackedRows | None = None
    sizes: torch.Tensor | None = None


class _KeyRecorder:
    """Stands in for the cache in one layer and remembers the keys that its attention sees, past ones included."""

    def __init__(self, cache: Cache):
        self.cache = cache
        self.keys: torch.Tensor | None = None  # (B, H_kv, S, d)

    def update(self, *args, **kwargs):
        self.keys, values = self.cache.update(*args, **kwargs)
        return self.keys, values

    @property
    def layers(self) -> list:
        """Where hooks on attention look for what is cached."""
        return self.cache.layers


class HoliTomDecoderMixin:
    """
    Stage 3 (section 3.3) for any decoder of Llama's and Qwen's shape. It stands before upstream's class, which has
    `layers`, `norm` and `rotary_emb`.

    What differs between decoders are these hooks: [`attention_layers`], [`layer_masks`], [`query_of`], [`keys_of`],
    [`rotated`] and [`after_layer`].

    Attributes:
        num_position_axes: A of the position ids (A, B, N) that `rotary_emb` takes; 1: they are (B, N).
        needs_stage: Whether every call that is or was compressed comes with an [`InnerStage`], and so runs the loop
            over the layers that is here, also if all see the same tokens, which count alike.
    """

    num_position_axes = 1
    needs_stage = False

    def attention_layers(self) -> list[int]:
        """Hook: the layers whose attention stage 3 may ask, those that see every position before."""
        types = getattr(self.config, "layer_types", None) or ["full_attention"] * len(self.layers)
        return [index for index, kind in enumerate(types) if kind == "full_attention"]

    def layer_masks(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: Cache | None,
        layer_idx: int,
        sizes: torch.Tensor | None,
    ) -> dict[str, torch.Tensor | None]:
        """
        Hook: masks by layer type for the layers from `layer_idx` on.

        Args:
            hidden_states: (B, N, D) of this call.
            attention_mask: (B, P+N), which of the layers' positions are real; `None` if all are.
            cache: With the P positions before.
            layer_idx: The first of layers of equal length.
            sizes: As in [`causal_mask`].
        """
        return {"full_attention": causal_mask(self.config, hidden_states, attention_mask, cache, layer_idx, sizes)}

    def query_of(self, attention: nn.Module, normed: torch.Tensor) -> torch.Tensor:
        """Hook: queries before their rotation, (B, N, D) -> (B, H, N, d)."""
        return heads_of(attention, attention.q_proj(normed), getattr(attention, "q_norm", None))

    def keys_of(self, attention: nn.Module, normed: torch.Tensor) -> torch.Tensor:
        """Hook: keys before their rotation, (B, N, D) -> (B, H_kv, N, d)."""
        return heads_of(attention, attention.k_proj(normed), getattr(attention, "k_norm", None))

    def rotated(self, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Hook: queries or keys (B, H, N, d) behind their rotation by `rotary_emb`'s cosine and sine."""
        return apply_rotary_pos_emb(states, states, cos, sin)[0]

    def after_layer(
        self,
        layer_idx: int,
        hidden_states: torch.Tensor,
        visual_pos_masks: torch.Tensor | None,
        deepstack_visual_embeds: list[torch.Tensor] | None,
    ) -> torch.Tensor:
        """
        Hook: what a layer's output becomes. Here DeepStack, as Qwen3-VL's decoder has it (arXiv 2406.04334).

        Args:
            layer_idx: The layer.
            hidden_states: (B, N, D).
            visual_pos_masks: (B, N) bool, where visual tokens stand.
            deepstack_visual_embeds: For each of the first layers (V, D), added to the visual tokens behind it.
        """
        if deepstack_visual_embeds is None or layer_idx >= len(deepstack_visual_embeds):
            return hidden_states
        return self._deepstack_process(hidden_states, visual_pos_masks, deepstack_visual_embeds[layer_idx])

    def rotary_positions(self, position_ids: torch.Tensor) -> torch.Tensor:
        """Position ids (B, N), (A, B, N) or upstream's (1+A, B, N), text first, as `rotary_emb` takes them."""
        if self.num_position_axes == 1:
            return position_ids
        if position_ids.ndim == 2:
            return position_ids.expand(self.num_position_axes, -1, -1)
        return position_ids[-self.num_position_axes :]

    def forward(self, *args, inner_stage: InnerStage | None = None, **kwargs) -> BaseModelOutputWithPast:
        """
        Overrides upstream's forward: with `inner_stage` the layers from `inner_stage.layer` on hold fewer tokens.

        Args:
            inner_stage: What to merge; `None` runs upstream's forward.
            args, kwargs: As upstream. With `inner_stage`, `attention_mask` is a (B, P+N) mask of the positions of the
                first layers or `None`, or a dictionary of ready 4D masks: `"full_attention"` for them and
                `"inner_attention"` for the layers from `inner_stage.layer` on.

        Returns:
            Upstream's output, or with `inner_stage` a [`HoliTomDecoderOutput`].

        Raises:
            ValueError: If a layer does not see all positions, or the one that is asked does not.
        """
        if inner_stage is None:
            mask = kwargs.get("attention_mask")
            if isinstance(mask, dict) and not getattr(self.config, "layer_types", None):
                kwargs["attention_mask"] = mask["full_attention"]  # upstream takes a dictionary where layers differ
            return super().forward(*args, **kwargs)
        return self._forward_inner(*args, inner_stage=inner_stage, **kwargs)

    @takes_cache
    @merge_with_config_defaults
    @capture_outputs
    def _forward_inner(
        self,
        inputs_embeds: torch.Tensor,
        inner_stage: InnerStage,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        visual_pos_masks: torch.Tensor | None = None,
        deepstack_visual_embeds: list[torch.Tensor] | None = None,
        **kwargs,
    ) -> HoliTomDecoderOutput:
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        first_inner, merges = inner_stage.layer, inner_stage.videos is not None
        if first_inner is not None:
            self.check_layers(first_inner)

        hidden_states = held = inputs_embeds
        unmerging = inner_stage.unmerging
        if unmerging is not None:
            held = unmerging.take(inputs_embeds)
        masks = self._masks_from(held, attention_mask, cache, 0, inner_stage.sizes)
        position_embeddings = self.rotary_emb(hidden_states, self.rotary_positions(position_ids))
        # Layers get only what can't be mistaken for packed rows.
        is_plain = position_ids.ndim == 2 and not inner_stage.has_gaps
        layer_kwargs = {"position_ids": position_ids if is_plain else None, **kwargs}
        importance = survivors = survivor_sizes = None

        for layer_idx, decoder_layer in enumerate(self.layers):
            if layer_idx == first_inner:
                if merges:
                    hidden_states, survivors, survivor_sizes = merge_inside(hidden_states, importance, inner_stage)
                    positions = position_ids.to(hidden_states.device)
                    index = survivors.index.expand_as(positions[..., : survivors.index.shape[1]])
                    positions = self.rotary_positions(positions.gather(-1, index))
                    position_embeddings = self.rotary_emb(hidden_states, positions)
                    if deepstack_visual_embeds is not None and first_inner < len(deepstack_visual_embeds):
                        visual_pos_masks, deepstack_visual_embeds = surviving_features(
                            visual_pos_masks, deepstack_visual_embeds, survivors
                        )
                # Survivors keep their position ids, which have gaps then.
                layer_kwargs["position_ids"] = None
                if not isinstance(attention_mask, dict):
                    attention_mask = _inner_attention_mask(inner_stage, survivors)
                sizes = inner_stage.inner_sizes
                if merges:
                    sizes = joined_sizes(sizes, survivor_sizes, inner_stage.past_mask, survivors.mask)
                masks = self._masks_from(hidden_states, attention_mask, cache, layer_idx, sizes)

            if unmerging is not None:
                decoder_layer = unmerging.around(decoder_layer)
            layer_input, layer_cache = hidden_states, cache
            is_asked = merges and layer_idx + 1 == first_inner
            if is_asked and cache is not None:
                layer_cache = _KeyRecorder(cache)
            if inner_stage.skips is not None:
                decoder_layer = inner_stage.skips.instead_of(decoder_layer, layer_idx, self)
            hidden_states = decoder_layer(
                hidden_states,
                attention_mask=masks[self._layer_type(layer_idx)],
                position_embeddings=position_embeddings,
                use_cache=use_cache,
                **{CACHE_NAME: layer_cache},
                **layer_kwargs,
            )
            if is_asked:
                keys = layer_cache.keys if layer_cache is not None else None
                importance = (inner_stage.asked or type(self).received_attention)(
                    self, decoder_layer, layer_input, position_embeddings, keys, attention_mask, inner_stage
                )
            hidden_states = self.after_layer(layer_idx, hidden_states, visual_pos_masks, deepstack_visual_embeds)

        return HoliTomDecoderOutput(
            last_hidden_state=self.norm(hidden_states),
            survivors=survivors,
            sizes=survivor_sizes,
            **{CACHE_NAME: cache if use_cache else None},
        )

    def _layer_type(self, layer_idx: int) -> str:
        types = getattr(self.config, "layer_types", None)
        return types[layer_idx] if types else "full_attention"

    def check_layers(self, first_inner: int) -> None:
        """Raises a `ValueError` if stage 3 can't run from layer `first_inner` on."""
        types = getattr(self.config, "layer_types", None) or ()
        if "sliding_attention" in types:
            raise ValueError(
                "stage 3 needs full attention, this decoder has sliding windows: set inner_merge_layer=None"
            )
        asked = self.attention_layers()
        if first_inner - 1 not in asked:
            layers = ", ".join(str(layer + 1) for layer in asked if layer + 1 < len(self.layers))
            raise ValueError(
                f"inner_merge_layer is {first_inner}, but the layer before it has no attention over all positions: "
                f"choose one of {layers}, or None"
            )

    def _masks_from(self, hidden_states, attention_mask, cache, layer_idx: int, sizes) -> dict:
        """The masks of the layers from `layer_idx` on, from a 2D one of their positions or a dict of ready ones."""
        if isinstance(attention_mask, dict):
            inner = {"full_attention": attention_mask.get("inner_attention")} if layer_idx else {}
            return attention_mask | inner
        return self.layer_masks(hidden_states, attention_mask, cache, layer_idx, sizes)

    @torch.no_grad()
    def received_attention(
        self,
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
            stage: Its `query`, `num_past` and `sizes`.

        Returns:
            (B, N) float32.
        """
        attention = layer.self_attn
        batch_size, num_new, _ = hidden_states.shape
        normed = layer.input_layernorm(hidden_states)
        # Where this layer lies: with a device_map that need not be where the prompt came in.
        query = stage.query[:, None].to(normed.device)  # (B, 1)
        cos, sin = (values.to(normed.device).expand(batch_size, -1, -1) for values in position_embeddings)

        queries = self.query_of(attention, take_rows(normed, query))  # (B, H, 1, d)
        queries = self.rotated(queries, take_rows(cos, query), take_rows(sin, query))
        if keys is None:
            keys = self.rotated(self.keys_of(attention, normed), cos, sin)

        num_kv_heads, num_keys = keys.shape[1:3]
        queries = queries.view(batch_size, num_kv_heads, -1, attention.head_dim)  # (B, H_kv, G, d)
        scores = (queries @ keys.mT).float() * attention.scaling  # (B, H_kv, G, S)
        if stage.sizes is not None:
            scores = scores + score_bias(stage.sizes.to(scores.device), num_keys)[:, None, None]
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


def heads_of(attention: nn.Module, projected: torch.Tensor, norm: nn.Module | None) -> torch.Tensor:
    """(B, N, H*d) -> (B, H, N, d), each head normalized where the attention does so."""
    heads = projected.view(*projected.shape[:2], -1, attention.head_dim)
    return (heads if norm is None else norm(heads)).transpose(1, 2)


def surviving_features(
    visual_mask: torch.Tensor, features: list[torch.Tensor], survivors: PackedRows
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """
    What is left of features of visual tokens behind stage 3.

    Args:
        visual_mask: (B, N) bool, where the V visual tokens stand.
        features: Each (V, E), in the order of the mask.
        survivors: The M of the N positions.

    Returns:
        (B, M) bool, and each of the features with the rows that survived.
    """
    visual_mask = visual_mask.to(survivors.mask.device)
    number = visual_mask.flatten().cumsum(0).view_as(visual_mask) - 1
    survives = visual_mask.gather(1, survivors.index) & survivors.mask
    rows = number.gather(1, survivors.index)[survives]
    return survives, [values[rows.to(values.device)] for values in features]


def _inner_attention_mask(stage: InnerStage, survivors: PackedRows | None) -> torch.Tensor | None:
    """2D mask of the positions that the layers of stage 3 hold, with those of this call; `None` if all are real."""
    if not (stage.is_padded or (survivors is not None and survivors.is_padded)):
        return None
    mask = stage.mask if survivors is None else survivors.mask
    return torch.cat([stage.past_mask.to(mask.device), mask], dim=1)
