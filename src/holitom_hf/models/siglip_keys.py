"""A SigLIP layer's attention with its keys, by which patches are merged."""

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.siglip.modeling_siglip import eager_attention_forward


def attend_with_keys(
    attention: nn.Module,
    normed: torch.Tensor,
    mask: torch.Tensor | None,
    index: torch.Tensor | None = None,
    is_real: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    What `SiglipAttention` returns, and its keys averaged over heads.

    Args:
        attention: The layer's.
        normed: (F, n, D); with `index` packed rows (N, D), which the projections run over.
        mask: (F, 1, 1, n), added to the scores.
        index, is_real: (F, n), the row of every place of a frame, and which places there are.

    Returns:
        As `normed`, and (F, n, head_dim) or (N, head_dim).
    """
    query, key, value = (
        project(normed).unflatten(-1, (attention.num_heads, attention.head_dim))
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    places = (query, key, value) if index is None else (rows[index] for rows in (query, key, value))
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention_forward)
    dropout = attention.dropout if attention.training else 0.0
    kwargs = {"is_causal": False, "scaling": attention.scale, "dropout": dropout}
    output, _ = attend(attention, *(x.transpose(1, 2) for x in places), mask, **kwargs)
    output = output.flatten(2) if index is None else output.flatten(2)[is_real]
    return attention.out_proj(output), key.mean(-2)
