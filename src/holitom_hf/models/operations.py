"""
Operations of the parts of a forward pass: a SigLIP tower, and a decoder of Llama's and Qwen's shape. What stands
before the decoder is each backbone's own: `encoder_operations` in its folder's `operations.py`.

A multiplication and an addition count as two, as torch's `FlopCounterMode` has it, and like there only matrix products
and convolutions count.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..merging.products import segmentation_flops
from ..merging.vision_methods import REUSE, TOME


@dataclass
class EncoderOperations:
    """
    What a backbone makes of a video before the decoder.

    Attributes:
        num_frames, tokens_per_frame: F and T, as the method sees them.
        num_newlines: Tokens that the model adds to them.
        key_dim: Of an attention head of the tower.
        vision_tower, projector, importance: Operations.
    """

    num_frames: int
    tokens_per_frame: int
    num_newlines: int
    key_dim: int
    vision_tower: float
    projector: float
    importance: float


def vision_tower_flops(vision_config, num_frames: int) -> float:
    """Operations of a SigLIP tower without a head over `num_frames` frames."""
    width, hidden = vision_config.hidden_size, vision_config.intermediate_size
    patches = _num_patches(vision_config)
    embedding = 2 * patches * vision_config.num_channels * vision_config.patch_size**2 * width
    layer = 2 * patches * (4 * width**2 + 2 * width * hidden) + 4 * patches**2 * width
    return float(num_frames * (embedding + vision_config.num_hidden_layers * layer))


def packed_tower_flops(vision_config, rows_by_layer: torch.Tensor, vision_method: str) -> float:
    """
    Operations of a SigLIP tower that leaves something out, and of finding out what, over the frames of one video.

    Args:
        vision_config: Of the tower.
        rows_by_layer: (L, F), as in [`HoliTomVideoFeatures`].
        vision_method: What it leaves out.
    """
    width, hidden, patches = vision_config.hidden_size, vision_config.intermediate_size, _num_patches(vision_config)
    num_frames = rows_by_layer.shape[1]
    total = 2 * num_frames * patches * vision_config.num_channels * vision_config.patch_size**2 * width
    after = torch.cat([rows_by_layer[1:], rows_by_layer[-1:]]) if vision_method == TOME else rows_by_layer
    keys = rows_by_layer if vision_method == TOME else torch.full_like(rows_by_layer, patches)
    total += int((8 * rows_by_layer * width**2 + 4 * rows_by_layer * keys * width + 4 * after * width * hidden).sum())
    if vision_method == TOME:
        merging = rows_by_layer[rows_by_layer != after]
        head_dim = width // vision_config.num_attention_heads
        total += int((2 * ((merging + 1) // 2) * (merging // 2) * head_dim).sum())
    return float(total + (segmentation_flops(num_frames, patches, width) if vision_method == REUSE else 0))


def projector_flops(config, num_frames: int, num_rows: int | None = None) -> float:
    """
    Operations of LLaVA-OneVision's two-layer projector, which runs before the pooling; over `num_rows` patches where
    not all are computed.
    """
    layers = config.vision_feature_layer
    width = config.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers))
    dim = config.text_config.hidden_size
    num_rows = num_frames * _num_patches(config.vision_config) if num_rows is None else num_rows
    return float(num_rows * 2 * (width * dim + dim * dim))


def importance_flops(vision_config, num_frames: int, num_rows: int | None = None) -> float:
    """Operations of [`vision_importance`]: two projections of `num_rows` patches, or all, and the scores of all."""
    patches, width = _num_patches(vision_config), vision_config.hidden_size
    num_rows = num_frames * patches if num_rows is None else num_rows
    return float(2 * num_rows * 2 * width**2 + num_frames * 2 * patches**2 * width)


def decoder_flops(text_config, num_tokens: Sequence[int]) -> float:
    """
    Operations of a prompt's way through Qwen2's layers, every token's attention over all of them (as torch counts).

    Args:
        text_config: Of the decoder.
        num_tokens: n of every layer.
    """
    dim, heads, groups = text_config.hidden_size, text_config.num_attention_heads, text_config.num_key_value_heads
    head_dim = getattr(text_config, "head_dim", None) or dim // heads
    per_token = 2 * dim * head_dim * (2 * heads + 2 * groups) + 2 * 3 * dim * text_config.intermediate_size
    return float(sum(n * per_token + 4 * n**2 * heads * head_dim for n in num_tokens))


def inner_merging_flops(text_config, num_tokens: int, videos: Sequence[tuple[int, int]], is_folding: bool) -> float:
    """
    Operations of stage 3.

    Args:
        text_config: Of the decoder.
        num_tokens: Tokens that enter the decoder.
        videos: How many tokens of each video are kept and how many removed.
        is_folding: Whether removed ones are folded into kept ones.
    """
    dim, heads = text_config.hidden_size, text_config.num_attention_heads
    head_dim = getattr(text_config, "head_dim", None) or dim // heads
    query = 2 * dim * heads * head_dim + 2 * num_tokens * heads * head_dim
    return float(query + is_folding * sum(2 * dim * kept * removed for kept, removed in videos))


def output_layer_flops(text_config) -> float:
    """Operations of the vocabulary's logits for one token."""
    return float(2 * text_config.hidden_size * text_config.vocab_size)


def _num_patches(vision_config) -> int:
    return (vision_config.image_size // vision_config.patch_size) ** 2
