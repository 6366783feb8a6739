"""Decoding steps that see few of a video's entries, other ones in every step."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..merging.inner import choose_survivors, num_inner_kept
from .evicting import check_can_evict, visual_entries
from .upstream import CACHE_NAME, cache_of


@dataclass
class DynamicPruning:
    """
    What steps know of their cache, found on it as `cache.dynamic_pruning`.

    Attributes:
        is_visual: (B, M) bool, where the tokens of videos stand in the pruned layers.
        received: (B, M) float32, what the step before gave them of its attention; `None` before the first.
        hidden: (B, S) bool, which of the positions the step that runs does not see.
    """

    is_visual: torch.Tensor
    received: torch.Tensor | None = None
    hidden: torch.Tensor | None = None


@contextmanager
def dynamic_pruning(
    model: nn.Module, layer: int = 3, ratio: float = 0.7, similarity_threshold: float = 0.9
) -> Iterator[None]:
    """
    Within it, layers from `layer` on attend in every decoding step to a share of the videos' entries alone: those that
    the step's token attends to most in the layer before, averaged over heads.

    The others stay in the cache, where later steps may choose them: this saves no memory. A step whose attention is as
    the step's before sees all entries, as in the published code.

    Args:
        model: One of this package, with a head or without.
        layer: The first layer that sees fewer, >= 1, behind that of stage 3.
        ratio: Share of the entries that a step leaves out, 0 <= ratio < 1; one stays at least.
        similarity_threshold: Cosine similarity of the attention to the step's before from which on all are seen.

    Raises:
        ValueError: If the arguments are not allowed, attention is neither eager nor sdpa, or as in [`evicting`].

    Source: DyCoke, arXiv 2411.15024, its second stage; `PrunableDynamicCache` of KD-TAO/DyCoke.
    """
    base = model.model if hasattr(model, "lm_head") else model
    decoder, num_new = base.language_model, {}
    layers = decoder.attention_layers()
    if layer - 1 not in layers or layer >= len(decoder.layers) or not 0 <= ratio < 1:
        raise ValueError(f"expected 0 <= ratio < 1 and a layer behind one with attention, got {ratio} and {layer}")
    if decoder.config._attn_implementation not in ("eager", "sdpa"):
        raise ValueError('entries are hidden by masks: load the model with attn_implementation "sdpa" or "eager"')

    def state_of(kwargs: dict[str, Any]) -> DynamicPruning | None:
        return getattr(kwargs[CACHE_NAME], "dynamic_pruning", None) if kwargs["hidden_states"].shape[1] == 1 else None

    def count(_, args, kwargs):
        num_new["outer"] = kwargs["hidden_states"].shape[1]

    def choose(attention, args, kwargs, output):
        if (state := state_of(kwargs)) is not None:
            query = decoder.rotated(
                decoder.query_of(attention, kwargs["hidden_states"]), *kwargs["position_embeddings"]
            )
            keys = kwargs[CACHE_NAME].layers[layer - 1].keys
            given = attention_of(query, keys, attention.scaling, kwargs["attention_mask"])
            state.hidden = hidden_entries(state, given, ratio, similarity_threshold)

    def hide(_, args, kwargs):
        if (state := state_of(kwargs)) is None:
            return None
        mask = kwargs["attention_mask"]
        bias = torch.zeros_like(state.hidden, dtype=kwargs["hidden_states"].dtype)[:, None, None]
        lowest = torch.finfo(bias.dtype).min
        if mask is not None:
            bias = bias.masked_fill(~mask, lowest) if mask.dtype == torch.bool else mask
        return args, kwargs | {"attention_mask": bias.masked_fill(state.hidden[:, None, None].to(bias.device), lowest)}

    def note(_, args, kwargs, output):
        cache = cache_of(output)
        record = getattr(cache, "compressed_sequence", None)
        if record is None:
            reason = "nothing in it was compressed" if cache is not None else "there is none (use_cache=False)"
            raise ValueError(f"no visual entries to hide in the cache: {reason}")
        if getattr(output, "merged_videos", None) is not None:
            check_can_evict(base, kwargs, cache, record)
            if record.inner_layer is not None and layer <= record.inner_layer:
                raise ValueError(f"layer is {layer}, which must be behind stage 3's, {record.inner_layer}")
            entries = visual_entries(base, kwargs, output, record, num_new["outer"])
            is_visual = entries.outer if record.inner_layer is None else entries.inner
            cache.dynamic_pruning = DynamicPruning(is_visual)

    handles = [
        base.register_forward_hook(note, with_kwargs=True),
        decoder.layers[layers[0]].self_attn.register_forward_pre_hook(count, with_kwargs=True),
        decoder.layers[layer - 1].self_attn.register_forward_hook(choose, with_kwargs=True),
    ]
    try:
        for index in layers:
            if index >= layer:
                handles.append(decoder.layers[index].self_attn.register_forward_pre_hook(hide, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def attention_of(query: torch.Tensor, keys: torch.Tensor, scaling: float, mask: torch.Tensor | None) -> torch.Tensor:
    """
    What a step's token gives to every position, averaged over heads.

    Args:
        query: (B, H, 1, d).
        keys: (B, H_kv, S, d).
        scaling: Of the products.
        mask: (B, 1, 1, S), bool or added to the products; `None`: all are seen.

    Returns:
        (B, S) float32.
    """
    grouped = query.unflatten(1, (keys.shape[1], -1))[..., 0, :]  # (B, H_kv, G, d)
    products = (grouped @ keys.mT).float() * scaling
    if mask is not None:
        products = products.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else products + mask
    return products.softmax(-1).mean((1, 2))


def hidden_entries(
    state: DynamicPruning, given: torch.Tensor, ratio: float, similarity_threshold: float
) -> torch.Tensor:
    """
    Which positions a step does not see; what it gave to the videos' is noted for the next one.

    Args:
        state: Of the cache.
        given: (B, S), the step's attention, S >= M.
        ratio, similarity_threshold: As in [`dynamic_pruning`].

    Returns:
        (B, S) bool.
    """
    is_visual = state.is_visual.repeat_interleave(len(given) // len(state.is_visual), 0).to(given.device)
    hidden = torch.zeros_like(given, dtype=torch.bool)
    received = given[:, : is_visual.shape[1]] * is_visual
    likeness = received.new_zeros(len(given))
    if state.received is not None:
        likeness = F.cosine_similarity(received, state.received.to(received.device), dim=-1)
    for row, is_new in enumerate((likeness < similarity_threshold).tolist()):
        places = is_visual[row].nonzero()[:, 0]
        if is_new and len(places):
            _, left_out = choose_survivors(received[row, places], num_inner_kept(len(places), ratio))
            hidden[row, places[left_out]] = True
    state.received = received
    return hidden
