"""
All operations of a question up to the first token of its answer: tower, projector, importance, merging, decoder.

A multiplication and an addition count as two, as torch counts them. Merging is counted while it runs; the rest has
exact formulas (`models/operations.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..answering.prompts import ExpandedVideo
from ..answering.savings import Savings
from ..configuration import HoliTomConfig
from ..merging.flops import tokens_by_layer
from ..merging.inner import INNER_METHODS
from ..merging.outer import merge_videos
from ..models.operations import (
    decoder_flops,
    importance_flops,
    inner_merging_flops,
    output_layer_flops,
    packed_tower_flops,
    projector_flops,
)
from ..models.registry import encoder_operations
from ..models.vision import HoliTomVideoFeatures


def grouped_product(rows: tuple[int, int], matrices: tuple[int, int, int], *args, **kwargs) -> int:
    """Operations of rows (N, K) with one each of several matrices (E, K, M), as experts have them."""
    return 2 * rows[0] * rows[1] * matrices[2]


# What torch's counter does not know yet.
_operator = getattr(torch.ops.aten, "_grouped_mm", None)
GROUPED_PRODUCTS = {} if _operator is None else {_operator: grouped_product}


@dataclass
class EncodedVideo:
    """
    A video after the vision tower, and what that took.

    Attributes:
        features: Of the one video, with all that methods may ask for.
        prompt: What stands for it in prompts.
        encoding: Operations of tower and projector.
        importance: Operations of what the tokens receive of the attention, for settings that need it.
    """

    features: HoliTomVideoFeatures
    prompt: ExpandedVideo
    encoding: float
    importance: float


def encoded_video(
    encode: Callable[[HoliTomConfig], HoliTomVideoFeatures],
    config,
    num_frames: int,
    settings: HoliTomConfig,
    prompt: ExpandedVideo,
) -> EncodedVideo:
    """
    An [`EncodedVideo`].

    Args:
        encode: Sends one video through the tower as settings have it.
        config: The model's.
        num_frames: F, as they were decoded.
        settings: What to encode it with; they need importance.
        prompt: What stands for it in prompts.
    """
    vision, features = config.vision_config, encode(settings)
    grids = getattr(features, "grids", None)
    if features.rows_by_layer is None:
        size = None if grids is None else tuple(side * vision.patch_size for side in grids[0][1:])
        whole = replace(settings, vision_reuse_layer=None)
        operations = encoder_operations(config, num_frames, size, whole)
        return EncodedVideo(features, prompt, operations.vision_tower + operations.projector, operations.importance)
    if grids is None:
        [rows_by_layer], num_rows = features.rows_by_layer, int(features.computed_patches[0].sum())
        tower = packed_tower_flops(vision, rows_by_layer, settings.vision_method)
        importance = importance_flops(vision, num_frames, int(rows_by_layer[-1].sum()))
        return EncodedVideo(features, prompt, tower + projector_flops(config, num_frames, num_rows), importance)
    # Which patch is computed in which window, and which tokens have one, no formula knows.
    without, both = (
        counted(lambda used=used: encode(used)) for used in (replace(settings, outer_method="none"), settings)
    )
    return EncodedVideo(features, prompt, without, both - without)


def counted(function: Callable[[], object]) -> float:
    """Operations of a call, as torch counts them."""
    # The counter knows no fused attention on CPUs: the plain one is made of products that it knows.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=GROUPED_PRODUCTS) as counter:
        function()
    return float(counter.get_total_flops())


def merging_operations(model, video: EncodedVideo, settings: HoliTomConfig, num_text: int) -> float:
    """
    Operations of stages 1 and 2 over a video, by running them once more.

    Args:
        model: Whose video it is, with its language head.
        video: The video.
        settings: What it is merged with.
        num_text: Tokens of the prompt beside the video's, which some methods compare it with.
    """
    [tokens] = model.model.video_tokens(video.features)
    if settings.needs_question:
        tokens = replace(tokens, question=tokens.features.new_zeros(num_text, tokens.features.shape[-1]))
    return counted(lambda: merge_videos([tokens], settings))


def decoding_operations(text_config, savings: Savings, settings: HoliTomConfig, num_text: int) -> float:
    """
    Operations of the decoder with stage 3, and of the output layer for one token.

    Args:
        text_config: Of the decoder.
        savings: The row's.
        settings: What it was compressed with.
        num_text: Tokens of the prompt beside the video's.
    """
    outer, inner, layer = savings.visual_tokens_outer, savings.visual_tokens_inner, savings.inner_merge_layer
    num_tokens = tokens_by_layer(outer + num_text, inner + num_text, layer, text_config.num_hidden_layers)
    total = decoder_flops(text_config, num_tokens, settings, outer) + output_layer_flops(text_config)
    if layer is not None:
        is_folding = settings.inner_method == "merge"
        num_queries = num_text if INNER_METHODS[settings.inner_method] else 1  # as if all text stood behind the video
        videos = [(inner, outer - inner)]
        total += inner_merging_flops(text_config, outer + num_text, videos, is_folding, num_queries)
    return total


def first_token_operations(
    model, video: EncodedVideo, settings: HoliTomConfig, savings: Savings, num_text: int, merging: float
) -> float:
    """
    All operations of one question up to the first token of its answer.

    Args:
        model, video, settings, savings, num_text: As above.
        merging: From [`merging_operations`].
    """
    importance = video.importance if settings.needs_importance else 0.0
    decoding = decoding_operations(model.config.text_config, savings, settings, num_text)
    return video.encoding + importance + merging + decoding
