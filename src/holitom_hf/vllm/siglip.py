"""The last layer of vLLM's SigLIP tower: what goes into it, and what each patch receives of its attention."""

import torch
from torch import nn
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.models.siglip import SiglipVisionModel

from ..models.vision_importance import received_attention


def encode_before_last(tower: SiglipVisionModel, pixels: torch.Tensor) -> torch.Tensor:
    """
    (F, P, D), what goes into the tower's last layer.

    Args:
        tower: vLLM's.
        pixels: (F, C, H, W).
    """
    hidden_states = tower.vision_model.embeddings(pixels)
    for layer in tower.vision_model.encoder.layers[:-1]:
        hidden_states, _ = layer(hidden_states)
    return hidden_states


def last_layer_importance(layer: nn.Module, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    What each patch receives of a layer's attention, from its own input and its fused projection. The layer itself runs
    on whichever kernel it has.

    Args:
        layer: One of vLLM's SigLIP.
        hidden_states: (F, P, D), what goes into it.

    Returns:
        (F, P) float32, and the keys averaged over heads, (F, P, head_dim); of all heads where these are divided among
        processes.
    """
    attention = layer.self_attn
    projected, _ = attention.qkv_proj(layer.layer_norm1(hidden_states))
    queries, keys, _ = projected.unflatten(-1, (3, attention.num_heads_per_partition, attention.head_dim)).unbind(-3)
    keys = keys.transpose(1, 2)
    received, head_mean = received_attention(queries.transpose(1, 2), keys, attention.scale), keys.mean(1)
    if attention.tp_size > 1:
        received = tensor_model_parallel_all_reduce(received) / attention.tp_size
        head_mean = tensor_model_parallel_all_reduce(head_mean) / attention.tp_size
    return received, head_mean
