"""What matters in a frame, in vLLM's towers of the Qwen-VL families: their last block's attention."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from vllm.distributed import tensor_model_parallel_all_reduce

from ..models.vision_importance import received_attention


@contextmanager
def last_attention_input(tower: nn.Module) -> Iterator[dict]:
    """What goes into the attention of a tower's last block while this lasts: its named arguments, and `x`."""
    seen = {}

    def see(attention: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.update(kwargs, x=args[0])

    # Of the attention: vLLM's blocks, which it may compile, call no hooks.
    hook = tower.blocks[-1].attn.register_forward_pre_hook(see, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


def in_reading_order(tower: nn.Module, rows: torch.Tensor, grids: list[list[int]]) -> torch.Tensor:
    """
    Rows of patches (P, ...) of a tower's blocks, in the order of the patches that went into it: a tower with windows
    has them window by window, squares that make a token together.
    """
    if not hasattr(tower, "window_size"):
        return rows
    indices, num_tokens = [], 0
    for frames, height, width in grids:
        window_index, _ = tower.get_window_index_thw(frames, height, width)
        indices.append(window_index + num_tokens)
        num_tokens += len(window_index)
    order = torch.cat(indices).argsort().to(rows.device, non_blocking=True)
    return rows.unflatten(0, (-1, tower.spatial_merge_size**2))[order].flatten(0, 1)


def last_attention_importance(
    tower: nn.Module, seen: dict, grids: list[list[int]]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """
    What each token receives of the attention in a tower's last block, from that attention's own input, fused
    projection and rotary embedding. It runs on whichever kernel it has.

    Args:
        tower: vLLM's, of Qwen2.5-VL, Qwen3-VL or a newer one, whose last block sees all of a frame.
        seen: From [`last_attention_input`].
        grids: (T, h, w) of every video.

    Returns:
        For each video (F, T) float32, and the keys before rotation, averaged over heads and the square of patches that
        makes a token, (F, T, K).
    """
    attention, unit = tower.blocks[-1].attn, tower.spatial_merge_size**2
    names = ("x", "rotary_pos_emb_cos", "rotary_pos_emb_sin")
    x, cos, sin = (in_reading_order(tower, seen[name], grids) for name in names)
    projected, _ = attention.qkv(x)  # (P, 1, 3 * heads * d)
    heads = (3, attention.num_attention_heads_per_partition, attention.hidden_size_per_attention_head)
    queries_keys = projected.squeeze(1).unflatten(-1, heads)[:, :2].transpose(0, 1).contiguous()  # (2, P, heads, d)
    rotated = attention.apply_rotary_emb(queries_keys, cos, sin)
    num_patches = [frames * height * width for frames, height, width in grids]
    plain = queries_keys[1].mean(1)
    found = []
    for (num_frames, _, _), video, keys in zip(grids, rotated.split(num_patches, 1), plain.split(num_patches)):
        queries, rotated_keys = video.unflatten(1, (num_frames, -1)).transpose(2, 3)
        received = received_attention(queries, rotated_keys, attention.hidden_size_per_attention_head**-0.5)
        received = received.unflatten(1, (-1, unit)).mean(2)
        head_mean = keys.unflatten(0, (num_frames, -1, unit)).mean(2)
        if attention.tp_size > 1:
            received = tensor_model_parallel_all_reduce(received) / attention.tp_size
            head_mean = tensor_model_parallel_all_reduce(head_mean) / attention.tp_size
        found.append((received, head_mean))
    return found
