"""Presses of kvpress on the cache of a compressed video: fewer keys and values than the decoder has seen tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..sequence.compressed_sequence import CompressedSequence
from .upstream import CACHE_NAME, OLD_CACHE_NAME, cache_of


@contextmanager
def pressing(model: nn.Module, press: Any) -> Iterator[None]:
    """
    Within it a press of kvpress shortens the cache of a prompt, layer by layer, behind stages 1 to 3.

    kvpress' own `with press(model)` reads arguments that decoder layers no longer get and does not know that the cache
    remembers how long it is. A press that hooks more than attention layers (those that override `__call__`) is not
    meant here.

    Args:
        model: One of this package, with a decoder of Llama's shape.
        press: A `kvpress.BasePress`. It sees (B, N, D) hidden states and (B, H_kv, N, d) keys and values of the
            layer's own N tokens, which are fewer from `inner_merge_layer` on.

    Raises:
        ValueError: In the forward pass: if rows are padded, tokens have sizes, nothing was compressed, visual tokens
            skip a layer's attention, or the layers before stage 3, or those from it on, are left with unlike lengths.

    Source: kvpress, github.com/NVIDIA/kvpress.
    """
    decoder = model.model.language_model

    def press_layer(attention, args, kwargs, output):
        cache, hidden_states = kwargs[CACHE_NAME], kwargs["hidden_states"]
        if not hasattr(cache, "layers"):  # queries of text alone go through this layer, on keys of everyone
            raise ValueError(
                f"layer {attention.layer_idx} can't be pressed, since visual tokens skip its attention: leave it out "
                "of skipped_layers"
            )
        num_cached = cache.layers[attention.layer_idx].get_seq_length()
        positions = torch.arange(num_cached - hidden_states.shape[1], num_cached, device=hidden_states.device)
        return press.forward_hook(
            attention, args, kwargs | {OLD_CACHE_NAME: cache, "cache_position": positions}, output
        )

    def shorten_record(_, args, kwargs, output):
        cache = cache_of(output)
        record = getattr(cache, "compressed_sequence", None)
        if record is None:
            raise ValueError("nothing in the cache was compressed: a press needs a prompt with a compressed video")
        if getattr(output, "merged_videos", None) is not None:
            lengths = [layer.get_seq_length() for layer in cache.layers]
            shortened(record, lengths).attach(cache)

    press.post_init_from_model(model)
    attentions = [layer.self_attn for layer in decoder.layers]
    handles = [model.model.register_forward_hook(shorten_record, with_kwargs=True)]
    try:
        for attention in attentions:
            attention.rotary_emb = decoder.rotary_emb  # where presses that rotate look for it
            handles.append(attention.register_forward_hook(press_layer, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for attention in attentions:
            if hasattr(attention, "rotary_emb"):
                del attention.rotary_emb


def shortened(record: CompressedSequence, lengths: list[int]) -> CompressedSequence:
    """
    A cache's record after keys and values were dropped in each layer, other ones in each head perhaps.

    Args:
        record: Of the cache as the forward pass left it.
        lengths: How many positions each layer holds now.

    Raises:
        ValueError: If it is not known which positions are left and that matters (padding, sizes), or layers before
            stage 3, or those from it on, differ.
    """
    if record.is_padded or record.outer_sizes is not None or record.inner_sizes is not None:
        raise ValueError("keys can't be dropped by head where rows are padded or attention is proportional to sizes")
    split = record.inner_layer if record.inner_layer is not None else len(lengths)
    outer, inner = lengths[:split], lengths[split:] or lengths[:1]
    if len(set(outer)) > 1 or len(set(inner)) > 1:
        raise ValueError(f"layers that see the same tokens must stay equally long, but they hold {lengths}")
    return replace(record, outer_mask=record.outer_mask[:, : outer[0]], inner_mask=record.inner_mask[:, : inner[0]])
