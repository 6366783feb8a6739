"""vLLM's SigLIP tower: what its last layer attends to, and its layers over what changes alone."""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import nn
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.models.siglip import SiglipVisionModel

from ..merging.patches import PatchPiece, plan_patches
from ..merging.settings import MergingSettings
from ..models.vision_importance import received_attention


def encode_frames(tower: SiglipVisionModel, pixels: torch.Tensor, num_layers: int) -> torch.Tensor:
    """
    (F, P, D), what comes out of the tower's first layers.

    Args:
        tower: vLLM's.
        pixels: (F, C, H, W).
        num_layers: So many.
    """
    hidden_states = tower.vision_model.embeddings(pixels)
    for layer in tower.vision_model.encoder.layers[:num_layers]:
        hidden_states, _ = layer(hidden_states)
    return hidden_states


def encode_changes(
    tower: SiglipVisionModel,
    chunks: Iterable[torch.Tensor],
    num_frames: list[int],
    settings: MergingSettings,
    frames_at_once: int,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """
    Videos whose repeating patches go through the layers once per segment, after `vision_reuse_layer` of them. As
    `HoliTomSiglipVisionModel.encode_changes`, through the modules of vLLM's layers.

    Args:
        tower: vLLM's.
        chunks: (f, C, H, W) pixels, together the frames of all videos.
        num_frames: Of every video.
        settings: Which layer, and what repeats.
        frames_at_once: So many frames, or as many patches as they have, go through a layer at once.

    Returns:
        Of some frames after others what goes into the last layer and what comes out, each (n, D) rows, and the row of
        every place, (f, P).
    """
    layers, start = tower.vision_model.encoder.layers, settings.vision_reuse_layer
    states = torch.cat([encode_frames(tower, pixels, start) for pixels in chunks])
    plan = plan_patches(states, num_frames, settings)
    rows = before = plan.gather(states)
    del states
    pieces = list(plan.pieces(frames_at_once))
    for layer in layers[start:]:
        before, rows = rows, torch.cat([layer_over_piece(layer, rows, piece) for piece in pieces])
    for piece in pieces:
        yield piece.take(before), piece.take(rows), piece.own_slot


def layer_over_piece(layer: nn.Module, rows: torch.Tensor, piece: PatchPiece) -> torch.Tensor:
    """What a layer of vLLM's SigLIP makes of a piece's own rows (n, D), of all rows (N, D) that go into it."""
    taken, plan = piece.take(rows), piece.plan
    if plan.is_dense:
        hidden_states, _ = layer(taken.view(*plan.slot.shape, -1))
        return piece.own(hidden_states.flatten(0, 1))
    # vLLM's own attention has as many queries as keys.
    queries, keys, values = project(layer, taken)
    batches, found_at = plan.batches
    attended = []
    for frames, own in batches:
        slot = plan.slot[frames]
        inputs = (states.transpose(1, 2) for states in (queries[own], keys[slot], values[slot]))
        output = F.scaled_dot_product_attention(*inputs, scale=layer.self_attn.scale)
        attended.append(output.transpose(1, 2).flatten(2).flatten(0, 1))
    output, _ = layer.self_attn.out_proj(torch.cat(attended)[found_at])
    hidden_states = taken + output
    return piece.own(hidden_states + layer.mlp(layer.layer_norm2(hidden_states)))


def project(layer: nn.Module, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of a layer of vLLM's SigLIP, each (..., H, d), of what goes into it, (..., D)."""
    attention = layer.self_attn
    projected, _ = attention.qkv_proj(layer.layer_norm1(hidden_states))
    return projected.unflatten(-1, (3, attention.num_heads_per_partition, attention.head_dim)).unbind(-3)


def last_layer_importance(
    layer: nn.Module, hidden_states: torch.Tensor, slot: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    What each patch receives of a layer's attention, from its own input and its fused projection. The layer itself runs
    on whichever kernel it has.

    Args:
        layer: One of vLLM's SigLIP.
        hidden_states: (F, P, D), what goes into it, or with `slot` packed rows (n, D).
        slot: (F, P), the row of every place.

    Returns:
        (F, P) float32, and the keys averaged over heads, (F, P, head_dim); of all heads where these are divided among
        processes.
    """
    attention = layer.self_attn
    queries, keys, _ = project(layer, hidden_states)
    if slot is not None:
        queries, keys = queries[slot], keys[slot]
    keys = keys.transpose(1, 2)
    received, head_mean = received_attention(queries.transpose(1, 2), keys, attention.scale), keys.mean(1)
    if attention.tp_size > 1:
        received = tensor_model_parallel_all_reduce(received) / attention.tp_size
        head_mean = tensor_model_parallel_all_reduce(head_mean) / attention.tp_size
    return received, head_mean
