"""Causal masks of decoder layers, with proportional attention where tokens stand for several others."""

import copy

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_causal_mask


def causal_mask(
    config,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Cache | None,
    layer_idx: int,
    sizes: torch.Tensor | None = None,
):
    """
    transformers' causal mask; with `sizes` an additive one that holds their logarithms.

    Args:
        config: The decoder's.
        inputs_embeds: (B, N, D) of this call.
        attention_mask: (B, P+N), which of the layers' positions are real; `None` if all are.
        cache: With the P positions before.
        layer_idx: The first of layers of equal length.
        sizes: (B, S), for how many uncompressed tokens the first S positions stand; the others stand for one.

    Source: ToMe, arXiv 2210.09461, section 3, proportional attention.
    """
    if sizes is not None:
        # Eager attention's masks are sums of what is added to scores, which all others that take a mask take as well.
        config = copy.copy(config)
        config._attn_implementation = "eager"
    # No position ids: create_causal_mask would only search them for packed rows, which gaps look like.
    mask = create_causal_mask(config, inputs_embeds, attention_mask, cache, layer_idx=layer_idx)
    return mask if sizes is None else mask + score_bias(sizes, mask.shape[-1]).to(mask)[:, None, None]


def score_bias(sizes: torch.Tensor, num_keys: int) -> torch.Tensor:
    """(B, S) sizes -> (B, num_keys) logarithms; 0 where none is given, and what lies beyond is cut."""
    return F.pad(sizes.log(), (0, num_keys - sizes.shape[1]))


def check_takes_mask(config) -> None:
    """Raises a `ValueError` if the decoder's attention takes no mask with sizes in it, as those that use flash's."""
    masks = ALL_MASK_ATTENTION_FUNCTIONS
    if masks[config._attn_implementation] is masks["flash_attention_2"]:
        raise ValueError(
            f"proportional_attention adds to attention scores, which {config._attn_implementation!r} cannot: load the "
            'model with attn_implementation "sdpa", "flex_attention" or "eager", or pass proportional_attention=False'
        )
