"""
Work that visual tokens leave out in some layers of the decoder: the feed-forward network, the attention, or both.

What was read: abstract and code of ShortV (arXiv 2504.00502, github.com/icip-cas/ShortV), which is `"freeze"`. In its
layers visual tokens are no queries and pass by the feed-forward network, while text attends to their keys and values
as before. `"skip_ffn"` and `"skip_attention"` are its two halves. Of Skip-Vision (2503.21817), FFN-SkipLLM
(2404.03865) and RedundancyLens (2501.19036) abstracts and summaries alone could be read. None is built as it is: the
first leaves the network out for most visual tokens of every layer, in a model that was trained so; the second decides
for text, token by token, while it decodes; the third keeps a share of the network's neurons, and attention to near
visual tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache

from ..merging.inner import SKIP_ATTENTION, SKIP_FFN
from ..merging.settings import MergingSettings
from ..merging.spatial import masked_positions
from ..sequence.compaction import CompactedPrompt
from ..sequence.packed_rows import PackedRows, take_rows
from .decoder import HoliTomDecoderMixin, heads_of
from .upstream import CACHE_NAME


def check_skips(text_config, settings: MergingSettings) -> None:
    """Raises a `ValueError` if attention can't be left out in this decoder: it is linear, or takes no mask."""
    if settings.inner_method == SKIP_FFN:
        return
    types = getattr(text_config, "layer_types", None) or ()
    other = [layer for layer in settings.skipped_layers if types and types[layer] != "full_attention"]
    if other:
        full = ", ".join(str(layer) for layer, kind in enumerate(types) if kind == "full_attention")
        raise ValueError(
            f"inner_method={settings.inner_method!r} needs full attention, which layers {other} have not: choose "
            f'skipped_layers among {full}, or inner_method="skip_ffn"'
        )
    if text_config._attn_implementation not in ("sdpa", "eager"):
        raise ValueError(
            f"inner_method={settings.inner_method!r} has fewer queries than keys, which "
            f'{text_config._attn_implementation!r} is not told: load the model with attn_implementation "sdpa" or '
            '"eager"'
        )


def skipped_work(settings: MergingSettings, prompt: CompactedPrompt, embeddings: list[torch.Tensor]) -> "SkippedWork":
    """
    What the visual tokens of a call leave out.

    Args:
        settings: With `skipped_layers`.
        prompt: The batch that enters the decoder.
        embeddings: The (N_v, D) tokens of every video in it.
    """
    is_text = prompt.packed.mask & ~prompt.video_mask
    num_visual = [sum(len(embeddings[video]) for video in videos) for videos in prompt.videos_of_row]
    num_text = [kept - visual for kept, visual in zip(prompt.packed.num_kept, num_visual)]
    queries = PackedRows.of(is_text, num_text, prompt.packed.padding_side)

    def places(mask: torch.Tensor, count: int) -> torch.Tensor:
        return masked_positions(mask.reshape(1, -1), count)[0]

    total = sum(num_text)
    return SkippedWork(
        method=settings.inner_method,
        layers=frozenset(settings.skipped_layers),
        queries=queries.index,
        rows=places(queries.mask, total),
        text=places(is_text, total),
        visual=places(prompt.video_mask, sum(num_visual)),
    )


@dataclass
class SkippedWork:
    """
    What the visual tokens of a call leave out, and in which layers.

    Attributes:
        method: `"skip_ffn"`, `"skip_attention"` or `"freeze"`.
        layers: Where.
        queries: (B, R) int64, the positions of every row that are text; arbitrary but valid at padding.
        rows: (P,) int64, which of these B * R are no padding.
        text: (P,) int64, which of the B * N positions they are.
        visual: (Q,) int64, which of the B * N positions are visual.
    """

    method: str
    layers: frozenset[int]
    queries: torch.Tensor
    rows: torch.Tensor
    text: torch.Tensor
    visual: torch.Tensor

    def instead_of(self, layer: nn.Module, layer_idx: int, decoder: HoliTomDecoderMixin) -> Callable:
        """What takes the arguments of a decoder's layer and gives its hidden states: the layer where all is done."""
        return partial(self.run, layer, layer_idx, decoder) if layer_idx in self.layers else layer

    def run(
        self, layer: nn.Module, layer_idx: int, decoder: HoliTomDecoderMixin, hidden_states: torch.Tensor, **kwargs
    ) -> torch.Tensor:
        """
        A layer without what visual tokens leave out.

        The layer's modules are called one by one, in the order of upstream's layers of Llama's and Qwen's shape.

        Args:
            layer, layer_idx, decoder: The layer and where it is.
            hidden_states: (B, N, D).
            kwargs: As the layer is called with.

        Returns:
            (B, N, D).

        Raises:
            ValueError: If hidden states are to be recorded, which happens where whole layers are called.
        """
        if kwargs.get("output_hidden_states"):
            raise ValueError("hidden states can't be recorded of layers that visual tokens leave something out in")
        device = layer.input_layernorm.weight.device
        if device.type != "meta":  # weights that are elsewhere come to their inputs
            hidden_states = hidden_states.to(device)
        forward = partial(self._forward, layer, layer_idx, decoder)
        if layer.gradient_checkpointing and layer.training and torch.is_grad_enabled():
            kwargs |= {CACHE_NAME: None, "use_cache": False}  # it would be written twice
            return checkpoint(partial(forward, **kwargs), hidden_states, use_reentrant=False)
        return forward(hidden_states, **kwargs)

    def _forward(self, layer, layer_idx, decoder, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        normed = layer.input_layernorm(hidden_states)
        if self.method == SKIP_FFN:
            hidden_states = hidden_states + _mixed(layer, normed, **kwargs)
        else:
            hidden_states = self._added(
                hidden_states, self._text_attention(layer.self_attn, layer_idx, decoder, normed, **kwargs)
            )
        if self.method == SKIP_ATTENTION:
            return hidden_states + _ffn(layer, hidden_states)
        text = hidden_states.flatten(0, 1).index_select(0, self.text.to(hidden_states.device))
        return self._added(hidden_states, _ffn(layer, text[None])[0])

    def _added(self, hidden_states: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
        """(B, N, D) with (P, D) added to what is text."""
        text = self.text.to(hidden_states.device)
        return hidden_states.flatten(0, 1).index_add(0, text, update).view_as(hidden_states)

    def _text_attention(
        self,
        attention: nn.Module,
        layer_idx: int,
        decoder: HoliTomDecoderMixin,
        normed: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        **kwargs,
    ) -> torch.Tensor:
        """(P, D): what text is given by the attention to all (B, N, D) tokens."""
        batch_size, num_new, _ = normed.shape
        queries, cache = self.queries.to(normed.device), kwargs.pop(CACHE_NAME, None)
        cos, sin = (values.to(normed.device).expand(batch_size, -1, -1) for values in position_embeddings)
        if attention_mask is None:  # all are real, and each sees what is not after it
            num_past = cache.get_seq_length(layer_idx) if cache is not None else 0
            num_keys = cache.get_mask_sizes(num_new, layer_idx)[0] if cache is not None else num_new
            mask = (torch.arange(num_keys, device=normed.device) <= num_past + queries[..., None])[:, None]
        else:
            mask = attention_mask.to(normed.device).expand(batch_size, -1, -1, -1)
            mask = mask.gather(2, queries[:, None, :, None].expand(-1, -1, -1, mask.shape[-1]))
        visual = self.visual.to(normed.device)
        rows, *rotation = (values.flatten(0, 1)[visual][None] for values in (normed, cos, sin))
        everyone = _EveryonesKeys(
            self,
            cache,
            (batch_size, num_new),
            decoder.rotated(decoder.keys_of(attention, rows), *rotation),
            heads_of(attention, attention.v_proj(rows), None),
        )
        output, _ = attention(
            hidden_states=take_rows(normed, queries),
            attention_mask=mask,
            position_embeddings=(take_rows(cos, queries), take_rows(sin, queries)),
            **{CACHE_NAME: everyone},
            **kwargs | {"position_ids": None},
        )
        return output.flatten(0, 1).index_select(0, self.rows.to(output.device))


class _EveryonesKeys:
    """
    Stands in for the cache in one layer: what attention computes of the text goes together with what was computed of
    the visual tokens before.

    Attributes:
        work: Where they belong.
        cache: The cache, or `None`.
        shape: B and N.
        keys, values: (1, H_kv, Q, d), of the visual tokens.
    """

    def __init__(self, work, cache: Cache | None, shape: tuple[int, int], keys: torch.Tensor, values: torch.Tensor):
        self.work, self.cache, self.shape, self.keys, self.values = work, cache, shape, keys, values

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args, **kwargs):
        """Takes (B, H_kv, R, d) of the text, gives (B, H_kv, S, d) of all that is cached or new."""
        keys, values = self._joined(keys, self.keys), self._joined(values, self.values)
        return (keys, values) if self.cache is None else self.cache.update(keys, values, *args, **kwargs)

    def _joined(self, of_text: torch.Tensor, of_visual: torch.Tensor) -> torch.Tensor:
        device, (batch_size, num_new) = of_text.device, self.shape
        of_text = of_text.transpose(1, 2).flatten(0, 1).index_select(0, self.work.rows.to(device))
        everyone = of_text.new_zeros(batch_size * num_new, *of_text.shape[1:])
        everyone = everyone.index_copy(0, self.work.text.to(device), of_text)
        everyone = everyone.index_copy(0, self.work.visual.to(device), of_visual[0].transpose(0, 1))
        return everyone.view(batch_size, num_new, *of_text.shape[1:]).transpose(1, 2)


def _mixed(layer: nn.Module, normed: torch.Tensor, **kwargs) -> torch.Tensor:
    """(B, N, D) behind a layer's attention, which is linear in some."""
    if hasattr(layer, "linear_attn"):
        return layer.linear_attn(
            hidden_states=normed,
            attention_mask=kwargs["attention_mask"],
            **{CACHE_NAME: kwargs.get(CACHE_NAME)},
        )
    device = normed.device
    kwargs["position_embeddings"] = tuple(values.to(device) for values in kwargs["position_embeddings"])
    if isinstance(kwargs.get("attention_mask"), torch.Tensor):
        kwargs["attention_mask"] = kwargs["attention_mask"].to(device)
    return layer.self_attn(hidden_states=normed, **kwargs)[0]


def _ffn(layer: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """What a layer's feed-forward network, or its experts, add to (B, N, D)."""
    output = layer.mlp(layer.post_attention_layernorm(hidden_states))
    return output[0] if isinstance(output, tuple) else output
