"""Visual entries that leave the cache once the first token of an answer was decoded."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.cache_utils import Cache, DynamicLayer

from ..merging.inner import choose_survivors, num_inner_kept
from ..sequence.compressed_sequence import CompressedSequence
from ..sequence.packed_rows import PackedRows
from .upstream import CACHE_NAME, cache_of


@dataclass
class VisualEntries:
    """
    Where the tokens of a prompt's videos stand in its cache, found on it as `cache.visual_entries` until they are
    scored.

    Attributes:
        outer: (B, N) bool, in the layers before stage 3.
        inner: (B, M) bool, in those from it on.
    """

    outer: torch.Tensor
    inner: torch.Tensor


@contextmanager
def evicting(model: nn.Module, ratio: float = 0.5, kernel_size: int = 3) -> Iterator[None]:
    """
    Within it, the step behind a prompt with compressed videos, which decodes the first token of its answer, drops a
    share of the videos' keys and values from every layer of attention, those that its query has least to do with.

    An entry's score is the product of its key and the query, averaged over heads, then the largest of its neighbors
    among the videos' entries. Every layer drops others, every row of a batch its own, all heads the same. Calls of
    several tokens, such as a further question, drop nothing; a later turn with a video drops of that one's.

    Args:
        model: One of this package, with a head or without.
        ratio: Share of the entries that go, 0 <= ratio < 1; one stays at least.
        kernel_size: Neighbors that share a score, an odd number; 1: none.

    Raises:
        ValueError: If the arguments are not allowed. In the forward pass: if nothing was compressed, attention is
            proportional to sizes, tokens stand at several places (`virtual_unmerging`), decoding has no cache, or one
            that is not a plain `DynamicCache`, or heads lie on several processes.

    Source: Sparse-dLLM, arXiv 2508.02558, `CustomCache.filter_cache` of OpenMOSS/Sparse-dLLM.
    """
    if not 0 <= ratio < 1 or kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"expected 0 <= ratio < 1 and an odd kernel_size, got {ratio} and {kernel_size}")
    base = model.model if hasattr(model, "lm_head") else model
    decoder, scores, num_new = base.language_model, {}, {}

    def score_layer(layer_idx, attention, args, kwargs, output):
        cache, hidden_states = kwargs[CACHE_NAME], kwargs["hidden_states"]
        num_new[layer_idx] = hidden_states.shape[1]
        if hidden_states.shape[1] == 1 and getattr(cache, "visual_entries", None) is not None:
            query = decoder.rotated(decoder.query_of(attention, hidden_states), *kwargs["position_embeddings"])
            scores[layer_idx] = entry_scores(query, cache.layers[layer_idx].keys)

    def note_or_evict(_, args, kwargs, output):
        cache = cache_of(output)
        record = getattr(cache, "compressed_sequence", None)
        if record is None:
            reason = "nothing in it was compressed" if cache is not None else "there is none (use_cache=False)"
            raise ValueError(f"no visual entries to drop from the cache: {reason}")
        if getattr(output, "merged_videos", None) is not None:
            check_can_evict(base, kwargs, cache, record)
            cache.visual_entries = visual_entries(base, kwargs, output, record, num_new[min(num_new)])
        elif scores:
            evict(cache, record, kwargs.get("attention_mask"), scores, ratio, kernel_size)
            cache.visual_entries = None
        scores.clear()

    handles = [base.register_forward_hook(note_or_evict, with_kwargs=True)] if ratio else []
    try:
        for layer_idx in decoder.attention_layers() if ratio else ():
            hook = partial(score_layer, layer_idx)
            handles.append(decoder.layers[layer_idx].self_attn.register_forward_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_can_evict(base: nn.Module, kwargs: dict[str, Any], cache: Cache, record: CompressedSequence) -> None:
    """Raises a `ValueError` if it is not known how to drop entries of the cache that a forward pass left."""
    decoder = base.language_model
    if base.settings_for(kwargs.get("holitom_config")).virtual_unmerging:
        raise ValueError(
            "entries of tokens that stand at several places are not told apart: set virtual_unmerging=False"
        )
    layers = [cache.layers[layer_idx] for layer_idx in decoder.attention_layers()]
    if getattr(cache, "offloading", False) or any(type(layer) is not DynamicLayer for layer in layers):
        raise ValueError("entries can be dropped from a DynamicCache alone, not a static, quantized or offloaded one")
    if record.outer_sizes is not None or record.inner_sizes is not None:
        raise ValueError("layers drop other entries each: set proportional_attention=False, sizes are one for all")
    if any(isinstance(weight, DTensor) for weight in decoder.parameters()):
        raise ValueError("entries are scored by all heads, which tensor parallel processes don't have")


@torch.no_grad()
def entry_scores(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """
    Products of a layer's keys with the mean of some queries, averaged over heads.

    Args:
        queries: (B, H, Q, d).
        keys: (B, H_kv, S, d).

    Returns:
        (B, S) float32.
    """
    mean_query = queries.mean(2).unflatten(1, (keys.shape[1], -1))  # (B, H_kv, G, d)
    return (mean_query @ keys.mT).float().mean((1, 2))


def visual_entries(
    base: nn.Module, kwargs: dict[str, Any], output, record: CompressedSequence, num_outer: int
) -> VisualEntries:
    """
    Where a call's videos stand in the cache that it leaves.

    Args:
        base: The model without a head.
        kwargs: Of its forward pass: `input_ids` or `inputs_embeds` of L positions, and `attention_mask`.
        output: What it returned.
        record: Of the cache.
        num_outer: Positions of this call before stage 3.
    """
    input_ids, inputs_embeds, mask = (kwargs.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask"))
    if inputs_embeds is None:
        inputs_embeds = base.get_input_embeddings()(input_ids)
    is_text = ~base.get_placeholder_mask(base.placeholder_ids(input_ids, kwargs), inputs_embeds)[1][..., 0]
    if mask is not None:
        is_text &= mask[:, -is_text.shape[1] :].to(is_text)
    # Text is all there inside, so that what else is real is visual.
    num_inner = output.last_hidden_state.shape[1]
    inner, outer = (mask.clone() for mask in (record.inner_mask, record.outer_mask))
    inner[:, :-num_inner] = outer[:, :-num_outer] = False
    for row, index in enumerate(output.output_index):
        is_real, new = inner[row].clone(), inner[row, -num_inner:]
        new[index[is_text[row]]] = False
        keep = output.inner_keep[row] if output.inner_keep is not None else None
        places = outer[row].nonzero()[:, 0]
        if keep is None:  # this row lost nothing, in whichever layer
            keep = torch.arange(len(places), device=places.device)
        outer[row, places[keep.to(places.device)]] = inner[row][is_real]
    return VisualEntries(outer, inner)


def evict(
    cache: Cache,
    record: CompressedSequence,
    attention_mask: torch.Tensor | None,
    scores: dict[int, torch.Tensor],
    ratio: float,
    kernel_size: int,
) -> None:
    """
    Drops visual entries from a cache and renews its record. Rows are packed again: what was padding among the entries
    goes, too, and rows that are shorter than others are padded at the left.

    Args:
        cache: With `visual_entries`, behind a step.
        record: Its record, of the prompt.
        attention_mask: (B, L) of everything that the caller has passed; `None` if there is no padding.
        scores: (B, S) by layer.
        ratio, kernel_size: As in [`evicting`].
    """
    entries, batch_size = cache.visual_entries, len(next(iter(scores.values())))
    record = record.for_batch(batch_size)
    record = record.including(int(cache.get_seq_length()) - record.outer_mask.shape[1], attention_mask)
    masks = {True: record.outer_mask, False: record.inner_mask}
    packed_masks = dict(masks)
    for layer_idx, values in scores.items():
        is_outer = record.inner_layer is None or layer_idx < record.inner_layer
        visual = entries.outer if is_outer else entries.inner
        visual = visual.repeat_interleave(batch_size // len(visual), 0)
        keep = masks[is_outer].clone()
        for row, is_visual in enumerate(visual):
            places = is_visual.nonzero()[:, 0].to(keep.device)
            if len(places):
                gone = evicted_places(values[row].to(keep.device), places, ratio, kernel_size)
                keep[row, gone] = False
        packed = PackedRows.of(keep, keep.sum(1).tolist(), "left")
        layer = cache.layers[layer_idx]
        index = packed.index[:, None, :, None].to(layer.keys.device)
        layer.keys, layer.values = (
            states.gather(2, index.expand(-1, states.shape[1], -1, states.shape[3]))
            for states in (layer.keys, layer.values)
        )
        packed_masks[is_outer] = packed.mask
    outer, inner = packed_masks[True], packed_masks[False]
    if record.inner_layer is None:
        inner = outer
    is_padded = not bool(outer.all() and inner.all())
    replace(record, outer_mask=outer, inner_mask=inner, is_padded=is_padded).attach(cache)


def evicted_places(scores: torch.Tensor, places: torch.Tensor, ratio: float, kernel_size: int) -> torch.Tensor:
    """
    Which entries a layer drops.

    Args:
        scores: (S,).
        places: (V,) int64, V >= 1, those that may go, in order.
        ratio, kernel_size: As in [`evicting`].
    """
    shared = F.max_pool1d(scores[places][None], kernel_size, 1, kernel_size // 2)[0]
    return places[choose_survivors(shared, num_inner_kept(len(places), ratio))[1]]
