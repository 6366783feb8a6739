"""What matters in a frame: the attention that every patch receives in one layer of the vision tower."""

import torch
from torch import nn


# Bytes of attention probabilities that exist at once: few enough for a processor's cache, many enough to fill a GPU.
IMPORTANCE_BYTES = {"cpu": 2 * 2**20}
IMPORTANCE_BYTES_ELSEWHERE = 256 * 2**20


@torch.no_grad()
def vision_importance(
    layer: nn.Module, hidden_states: torch.Tensor, slot: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    What each patch receives of a vision layer's attention, from that layer's own input and projections.

    Softmax attention averaged over heads and over queries, a few heads at a time; the layer itself may run with any
    `attn_implementation`.

    Args:
        layer: A SigLIP or CLIP encoder layer.
        hidden_states: (F, P, D), what goes into it, or with `slot` packed rows (N, D).
        slot: (F, P), the row of every place.

    Returns:
        (F, P) float32, and the keys averaged over heads, (F, P, head_dim).

    Source: section 3.2; VisionZip, section 3.2, for the keys.
    """
    attention = layer.self_attn
    normed = layer.layer_norm1(hidden_states)
    queries, keys = attention.q_proj(normed), attention.k_proj(normed)
    if slot is not None:
        queries, keys = queries[slot], keys[slot]
    shape = (*queries.shape[:2], attention.num_heads, -1)
    queries, keys = queries.view(shape).transpose(1, 2), keys.view(shape).transpose(1, 2)
    return received_attention(queries, keys, attention.scale), keys.mean(1)


def received_attention(queries: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """
    Softmax attention averaged over heads and queries, a few heads at a time.

    Args:
        queries, keys: (F, H, P, d), of F frames that don't see each other.
        scale: Of the scores.

    Returns:
        (F, P) float32.
    """
    num_frames, _, num_patches, _ = queries.shape
    budget = IMPORTANCE_BYTES.get(queries.device.type, IMPORTANCE_BYTES_ELSEWHERE)
    heads_at_once = max(1, budget // (4 * num_patches**2))
    received = [
        (torch.bmm(q, k.mT) * scale).softmax(-1, dtype=torch.float32).sum(1)
        for q, k in zip(*(values.flatten(0, 1).split(heads_at_once) for values in (queries, keys)))
    ]
    return torch.cat(received).view(num_frames, -1, num_patches).mean(1) / num_patches
