"""What compression left of every row of a generated batch."""

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache

from ..merging.flops import prefill_flops, tokens_by_layer
from ..models.operations import mlp_width


@dataclass
class Savings:
    """
    Tokens and operations of one row.

    Attributes:
        num_segments: Segments that stage 1 found in the row's videos; 0 if nothing was merged.
        visual_tokens_before: Video tokens of the uncompressed model, newlines included.
        visual_tokens_outer: Those left by stages 1 and 2; with virtual_unmerging all places that they stand at.
        visual_tokens_inner: Those left by stage 3.
        inner_merge_layer: The layer before which stage 3 ran; `None` if it did not.
        flops: Prefill operations of the decoder by the paper's formula.
        flops_share: The same against the uncompressed decoder's.
    """

    num_segments: int
    visual_tokens_before: int
    visual_tokens_outer: int
    visual_tokens_inner: int
    inner_merge_layer: int | None
    flops: float
    flops_share: float


def cache_bytes(cache: Cache) -> int:
    """Bytes of a cache's keys and values."""
    tensors = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))


def row_savings(cache: Cache, attention_mask: torch.Tensor, num_visual: list[int], text_config) -> list[Savings]:
    """
    Args:
        cache: As `generate` returns it.
        attention_mask: (B, L) of the prompts.
        num_visual: Video tokens of every row's uncompressed prompt.
        text_config: Of the decoder.
    """
    lengths = outer = inner = attention_mask.sum(1).tolist()
    record, layer, segments = getattr(cache, "compressed_sequence", None), None, [0] * len(lengths)
    if record is not None:
        outer, inner, layer = record.outer_mask.sum(1).tolist(), record.inner_mask.sum(1).tolist(), record.inner_layer
        if record.merged_videos:  # else it notes positions alone
            segments = [sum(len(video.segments) for video in videos) for videos in record.merged_videos]
    depth, sizes = text_config.num_hidden_layers, (text_config.hidden_size, mlp_width(text_config))
    savings = []
    for row, length in enumerate(lengths):
        num_text = length - num_visual[row]
        flops = prefill_flops(tokens_by_layer(outer[row], inner[row], layer, depth), *sizes)
        savings.append(
            Savings(
                num_segments=segments[row],
                visual_tokens_before=num_visual[row],
                visual_tokens_outer=outer[row] - num_text,
                visual_tokens_inner=inner[row] - num_text,
                inner_merge_layer=layer,
                flops=flops,
                flops_share=flops / prefill_flops([length] * depth, *sizes),
            )
        )
    return savings
