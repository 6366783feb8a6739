"""
Operations of the parts of a forward pass: a SigLIP tower, and a decoder of Llama's or Qwen's shape. What stands
before the decoder is each backbone's own: `encoder_operations` in its folder's `operations.py`.

A multiplication and an addition count as two, as torch's `FlopCounterMode` has it, and like there only matrix products
and convolutions count.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..merging.inner import SKIP_ATTENTION, SKIP_FFN
from ..merging.products import segmentation_flops
from ..merging.settings import MergingSettings
from ..merging.vision_methods import DYMU, REUSE, TOME


@dataclass
class EncoderOperations:
    """
    What a backbone makes of a video before the decoder.

    Attributes:
        num_frames, tokens_per_frame: F and T, as the method sees them.
        num_newlines: Tokens that the model adds to them.
        newline_rows: Rows of a frame that have a newline each, as long as any of their tokens is left; `None`: none,
            and newlines stay, whatever is left.
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
    newline_rows: int | None = None


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
    merges = vision_method in (TOME, DYMU)
    total = 2 * num_frames * patches * vision_config.num_channels * vision_config.patch_size**2 * width
    after = torch.cat([rows_by_layer[1:], rows_by_layer[-1:]]) if merges else rows_by_layer
    keys = rows_by_layer if merges else torch.full_like(rows_by_layer, patches)
    total += int((8 * rows_by_layer * width**2 + 4 * rows_by_layer * keys * width + 4 * after * width * hidden).sum())
    if merges:
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


def decoder_flops(
    text_config, num_tokens: Sequence[int], settings: MergingSettings | None = None, num_visual: int = 0
) -> float:
    """
    Operations of a prompt's way through a decoder's layers, of Qwen2's and Qwen3's shape or Qwen3.5's.

    Args:
        text_config: Of the decoder.
        num_tokens: n of every layer.
        settings: What visual tokens leave out in some layers, if they say so.
        num_visual: How many of the tokens these are.
    """
    types = getattr(text_config, "layer_types", None) or ["full_attention"] * len(num_tokens)
    skipped = settings.skipped_layers if settings is not None and settings.skips else ()
    total = 0.0
    for layer, (kind, n) in enumerate(zip(types, num_tokens)):
        num_queries = n - num_visual * (layer in skipped and settings.inner_method != SKIP_FFN)
        if kind == "linear_attention":
            total += linear_attention_flops(text_config, n)
        else:
            total += full_attention_flops(text_config, n, num_queries)
        num_rows = n - num_visual * (layer in skipped and settings.inner_method != SKIP_ATTENTION)
        total += num_rows * _mlp_flops(text_config, layer)
    return total


def full_attention_flops(text_config, num_tokens: int, num_queries: int | None = None) -> float:
    """
    Operations of a layer of attention of `num_queries` tokens, or all, to each of `num_tokens` (as torch counts).
    """
    num_queries = num_tokens if num_queries is None else num_queries
    dim, heads, groups = text_config.hidden_size, text_config.num_attention_heads, text_config.num_key_value_heads
    head = 2 * dim * _head_dim(text_config)
    projections = head * ((1 + _query_width(text_config)) * heads * num_queries + 2 * groups * num_tokens)
    return float(projections + 4 * num_queries * num_tokens * heads * _head_dim(text_config))


def linear_attention_flops(text_config, num_tokens: int) -> float:
    """
    Operations of a gated delta net over `num_tokens` tokens: projections, the convolution with its padding, and the
    delta rule in chunks of 64 tokens, the last one filled up, as transformers' torch code computes it.

    As in torch's count, the triangular system of each chunk is solved for nothing. Other kernels do other things.

    Source: `torch_chunk_gated_delta_rule` of transformers; arXiv 2412.06464, section 3.3.
    """
    dim, chunk, kernel = text_config.hidden_size, 64, text_config.linear_conv_kernel_dim
    heads, key_dim, value_dim = (
        getattr(text_config, f"linear_{name}") for name in ("num_value_heads", "key_head_dim", "value_head_dim")
    )
    keys, values = text_config.linear_num_key_heads * key_dim, heads * value_dim
    projections = 2 * dim * (2 * keys + 3 * values + 2 * heads)
    convolution = 2 * (num_tokens + kernel - 1) * kernel * (2 * keys + values)
    rows = -(-num_tokens // chunk) * chunk * heads
    rule = rows * (4 * chunk * key_dim + 2 * chunk * value_dim + 6 * key_dim * value_dim)
    return float(num_tokens * projections + convolution + rule)


def _mlp_flops(text_config, layer: int) -> int:
    """Operations of a layer's MLP for one token, or of its router and the experts that it is sent to."""
    dim, num_experts = text_config.hidden_size, getattr(text_config, "num_experts", 0)
    step, dense = getattr(text_config, "decoder_sparse_step", 1), getattr(text_config, "mlp_only_layers", ())
    if layer in dense or (layer + 1) % step:
        return 2 * 3 * dim * text_config.intermediate_size
    has_shared = bool(getattr(text_config, "shared_expert_intermediate_size", 0))  # behind a gate
    return 2 * dim * (num_experts + has_shared + 3 * mlp_width(text_config))


def mlp_width(text_config) -> int:
    """Neurons of a layer's MLP, or of all the experts that see one token."""
    if not getattr(text_config, "num_experts", 0):
        return text_config.intermediate_size
    shared = getattr(text_config, "shared_expert_intermediate_size", 0)
    return text_config.num_experts_per_tok * text_config.moe_intermediate_size + shared


def _head_dim(text_config) -> int:
    return getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads


def _query_width(text_config) -> int:
    """How many outputs a head's query has for each of its dimensions: Qwen3.5's has a gate with it."""
    return 2 if hasattr(text_config, "linear_num_key_heads") else 1


def inner_merging_flops(
    text_config, num_tokens: int, videos: Sequence[tuple[int, int]], is_folding: bool, num_queries: int = 1
) -> float:
    """
    Operations of stage 3.

    Args:
        text_config: Of the decoder.
        num_tokens: Tokens that enter the decoder.
        videos: How many tokens of each video are kept and how many removed.
        is_folding: Whether removed ones are folded into kept ones.
        num_queries: Tokens whose attention is asked.
    """
    dim, width = text_config.hidden_size, text_config.num_attention_heads * _head_dim(text_config)
    query = 2 * dim * width * _query_width(text_config) + 2 * num_tokens * width
    return float(num_queries * query + is_folding * sum(2 * dim * kept * removed for kept, removed in videos))


def output_layer_flops(text_config) -> float:
    """Operations of the vocabulary's logits for one token."""
    return float(2 * text_config.hidden_size * text_config.vocab_size)


def _num_patches(vision_config) -> int:
    return (vision_config.image_size // vision_config.patch_size) ** 2
