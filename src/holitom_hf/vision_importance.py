"""What matters in a frame: the attention that every patch receives in one layer of the vision tower."""

import torch
from torch import nn


# Attention probabilities that exist at once.
IMPORTANCE_BYTES = 256 * 2**20


@torch.no_grad()
def vision_importance(layer: nn.Module, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    What each patch receives of a vision layer's attention, from that layer's own input and projections.

    Softmax attention averaged over heads and over queries, a few frames at a time; the layer itself may run with
    any `attn_implementation`.

    Args:
        layer: A SigLIP or CLIP encoder layer.
        hidden_states: (F, P, D), what goes into it.

    Returns:
        (F, P) float32, and the keys averaged over heads, (F, P, head_dim).

    Source: section 3.2; VisionZip, section 3.2, for the keys.
    """
    attention = layer.self_attn
    num_patches = hidden_states.shape[1]
    frames_at_once = max(1, IMPORTANCE_BYTES // (4 * attention.num_heads * num_patches**2))
    received, head_mean = [], []
    for frames in hidden_states.split(frames_at_once):
        normed = layer.layer_norm1(frames)
        shape = (*normed.shape[:2], attention.num_heads, -1)
        queries = attention.q_proj(normed).view(shape).transpose(1, 2)  # (f, H, P, d)
        keys = attention.k_proj(normed).view(shape).transpose(1, 2)
        scores = (queries @ keys.mT) * attention.scale
        received.append(scores.softmax(-1, dtype=torch.float32).mean((1, 2)))
        head_mean.append(keys.mean(1))
    return torch.cat(received), torch.cat(head_mean)
