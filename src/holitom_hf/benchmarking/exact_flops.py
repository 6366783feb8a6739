"""
Operations of every part of a compressed forward pass, counted as they are run.

A multiplication and an addition count as two, as torch's `FlopCounterMode` has it, and like there only matrix products
and convolutions count. (The paper's formula, in `flops.py`, counts the pair as one, knows neither grouped-query
attention nor the gate of the MLP, and leaves out what stands before the decoder.)
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

import torch

from ..configuration import HoliTomConfig
from ..merging.budget import newline_budget, token_budget
from ..merging.flops import prefill_flops, tokens_by_layer
from ..merging.inner import INNER_METHODS, num_inner_kept
from ..merging.merged_video import MergedVideo, TokenKind
from ..merging.products import segmentation_flops
from ..merging.registry import METHODS
from ..merging.video_tokens import VideoTokens
from ..models.operations import (
    EncoderOperations,
    decoder_flops,
    inner_merging_flops,
    mlp_width,
    output_layer_flops,
)
from ..models.registry import encoder_operations


@dataclass
class ForwardFlops:
    """
    Operations of one prompt, by part.

    Attributes:
        vision_tower, projector: All frames.
        importance: The one layer's attention, from its queries and keys.
        segmentation: Norms and products of adjacent frames' tokens.
        clustering: Distances, and sums over members.
        choosing: What another method than HoliTom multiplies, as its `flops` in the registry has it.
        decoder: All layers.
        inner_merging: The query row that stage 3 asks for, and similarities of what is folded.
        output_layer: The vocabulary, for one token.
    """

    vision_tower: float
    projector: float
    importance: float
    segmentation: float
    clustering: float
    choosing: float
    decoder: float
    inner_merging: float
    output_layer: float

    @property
    def total(self) -> float:
        """All parts together."""
        return sum(asdict(self).values())

    @property
    def own(self) -> float:
        """What HoliTom, or the method in its place, adds."""
        return self.importance + self.segmentation + self.clustering + self.choosing + self.inner_merging


def clustering_flops(num_tokens: Sequence[int], num_clusters: Sequence[int], dim: int) -> float:
    """Operations of [`cluster_tokens`] over sets of these sizes, without padding."""
    return float(sum(2 * dim * n * (n + m) for n, m in zip(num_tokens, num_clusters) if m))


def choosing_flops(config, video: EncoderOperations, num_text: int, settings) -> float:
    """Operations of the method that the settings name, where the registry has them; HoliTom's follow from a plan."""
    flops = METHODS[settings.outer_method].flops if settings.has_outer_stage else None
    if flops is None:
        return 0.0
    dim = config.text_config.hidden_size
    sizes = VideoTokens(
        torch.empty(video.num_frames, video.tokens_per_frame, dim, device="meta"),
        keys=torch.empty(video.num_frames, video.tokens_per_frame, video.key_dim, device="meta"),
        question=torch.empty(num_text, dim, device="meta"),
    )
    return flops(sizes, settings)


@dataclass
class VideoPlan:
    """
    What stages 1 and 2 make of a video of scenes of equal length: sizes, no values.

    Attributes:
        num_tokens: Tokens that are left, without newlines.
        num_static, num_clusters: Of every segment.
        num_newlines: Behind rows that have a token left, where a model has such newlines; `None`: as many as the
            uncompressed video has, which is the most there can be.
    """

    num_tokens: int
    num_static: list[int]
    num_clusters: list[int]
    num_newlines: int | None = None


def plan_video(
    settings,
    num_frames: int,
    tokens_per_frame: int,
    static_share: float = 0.6,
    scene_frames: int = 8,
    newline_rows: int | None = None,
) -> VideoPlan:
    """
    The sizes that stages 1 and 2 come to (section 3.2).

    Newlines of rows are an estimate: a row has one if any of a frame's tokens is left in it, and those that are left
    are taken to lie anywhere in the frame with equal probability. [`plan_of`] has the number for a video; with
    `exact_budget` it follows from the sizes.

    Args:
        settings: [`HoliTomConfig`].
        num_frames, tokens_per_frame: F and T.
        static_share: Share of the tokens that repeat over their scene.
        scene_frames: Frames of a scene; the last one may be shorter.
        newline_rows: As in [`EncoderOperations`].
    """
    total = num_frames * tokens_per_frame
    if not settings.has_outer_stage:
        return VideoPlan(total, [], [])

    def newlines(kept: list[int]) -> int | None:
        if newline_rows is None:
            return None
        if settings.exact_budget:
            return newline_budget(token_budget(settings, num_frames, tokens_per_frame), num_frames, newline_rows)
        return expected_newlines(kept, tokens_per_frame, newline_rows)

    if settings.outer_method != "holitom":
        num_tokens = round(settings.retention_ratio * total)
        ends = [num_tokens * frame // num_frames for frame in range(num_frames + 1)]
        kept = [stop - start for start, stop in pairwise(ends)]
        return VideoPlan(num_tokens, [], [], newlines(kept))
    lengths = [min(scene_frames, num_frames - start) for start in range(0, num_frames, scene_frames)]
    num_static = [round(static_share * tokens_per_frame) if length > 1 else 0 for length in lengths]
    gain = sum(n * (length - 1) for n, length in zip(num_static, lengths))
    ratio = min(settings.retention_ratio * total / (total - gain), 1)
    num_clusters = [round(n * ratio) for n in num_static]
    num_dynamic = [math.ceil((tokens_per_frame - n) * ratio) for n in num_static]  # of a frame
    # Static tokens stand in their scene's first frame.
    kept = [
        dynamic + clusters * (step == 0)
        for dynamic, clusters, length in zip(num_dynamic, num_clusters, lengths)
        for step in range(length)
    ]
    num_tokens = token_budget(settings, num_frames, tokens_per_frame) if settings.exact_budget else sum(kept)
    return VideoPlan(num_tokens, num_static, num_clusters, newlines(kept))


def expected_newlines(kept: Sequence[int], tokens_per_frame: int, num_rows: int) -> int:
    """
    Rows with a token, rounded, if tokens lie anywhere in their frame with equal probability.

    Args:
        kept: n of every frame.
        tokens_per_frame: T.
        num_rows: H, of a frame.
    """
    elsewhere = tokens_per_frame - tokens_per_frame // num_rows
    empty = sum(math.comb(elsewhere, n) / math.comb(tokens_per_frame, n) for n in kept)
    return round(num_rows * (len(kept) - empty))


def plan_of(merged: MergedVideo) -> VideoPlan:
    """The sizes that a video came to in stages 1 and 2, newlines of rows included; without contextual tokens' sets."""
    kind, num_static, num_clusters = merged.kind, [], []
    for start, _ in merged.segments:
        output = merged.assignment[start]
        num_static.append(int(((output >= 0) & (kind[output.clamp_min(0)] == TokenKind.STATIC)).sum()))
        num_clusters.append(int(((merged.frame == start) & (kind == TokenKind.STATIC)).sum()))
    num_newlines = int((kind == TokenKind.NEWLINE).sum())
    return VideoPlan(merged.num_tokens - num_newlines, num_static, num_clusters, num_newlines)


def forward_flops(
    config,
    num_frames: int,
    num_text: int,
    plan: VideoPlan,
    settings=None,
    computed_share: float = 1.0,
    size: tuple[int, int] | None = None,
) -> ForwardFlops:
    """
    Operations of a prompt with one video, up to its first token. What other methods' dropped tokens count with under
    `proportional_attention` is not among them, nor are the products of HoliTom's ablations.

    Args:
        config: Of a backbone.
        num_frames: Of the video.
        num_text: Tokens of the prompt beside the video's (newlines are added here where the model has them).
        plan: From [`plan_video`], or with [`plan_of`] as a video turned out: then newlines of rows are counted as
            they are.
        settings: [`HoliTomConfig`]; default: the config's.
        computed_share: Of the patches that the vision tower computes after `vision_reuse_layer`, where that is set.
        size: Height and width of frames in pixels, where the backbone takes several; default: its usual one.
    """
    settings = settings or config.holitom_config
    text, video = config.text_config, encoder_operations(config, num_frames, size, settings, computed_share)
    clusters_videos = settings.has_outer_stage and settings.outer_method == "holitom"
    are_left = video.newline_rows is not None and plan.num_newlines is not None
    num_video = plan.num_tokens + (plan.num_newlines if are_left else video.num_newlines)
    inner_layer, num_kept = None, num_video
    if settings.has_inner_stage:
        inner_layer, num_kept = settings.inner_merge_layer, num_inner_kept(num_video, settings.inner_merge_ratio)
    layers = tokens_by_layer(num_video + num_text, num_kept + num_text, inner_layer, text.num_hidden_layers)
    inner = 0.0
    if inner_layer is not None:
        videos = [(num_kept, num_video - num_kept)]
        num_queries = num_text if INNER_METHODS[settings.inner_method] else 1  # as if all text stood behind the video
        is_folding = settings.inner_method == "merge"
        inner = inner_merging_flops(text, num_video + num_text, videos, is_folding, num_queries)
    return ForwardFlops(
        vision_tower=video.vision_tower,
        projector=video.projector,
        importance=video.importance if settings.needs_importance else 0.0,
        segmentation=segmentation_flops(video.num_frames, video.tokens_per_frame, text.hidden_size)
        if clusters_videos
        else 0.0,
        clustering=clustering_flops(plan.num_static, plan.num_clusters, text.hidden_size),
        choosing=choosing_flops(config, video, num_text, settings),
        decoder=decoder_flops(text, layers, settings, num_video),
        inner_merging=inner,
        output_layer=output_layer_flops(text),
    )


def compare_flops(
    config,
    num_frames: int,
    num_text: int,
    static_share: float = 0.6,
    computed_share: float = 0.35,
    size: tuple[int, int] | None = None,
) -> tuple[ForwardFlops, ForwardFlops, tuple[float, float]]:
    """
    Operations without and with a config's compression.

    Args:
        config: Of a backbone.
        num_frames, num_text, computed_share, size: As in [`forward_flops`].
        static_share: As in [`plan_video`], over scenes of 8 frames.

    Returns:
        Exact without, exact with (but for newlines of rows, which [`plan_video`] estimates), and both by the paper's
        formula: the decoder's, for the video's tokens alone, of which exactly the share that is asked for is left.
    """
    settings, text = config.holitom_config, config.text_config
    nothing = HoliTomConfig(outer_method="none", inner_method="none")
    video = encoder_operations(config, num_frames, size, nothing)
    scene_frames = max(1, round(8 * video.num_frames / num_frames))
    exact = []
    for chosen in (nothing, settings):
        sizes = (video.num_frames, video.tokens_per_frame, static_share, scene_frames, video.newline_rows)
        plan = plan_video(chosen, *sizes)
        exact.append(forward_flops(config, num_frames, num_text, plan, chosen, computed_share, size))
    total, depth = video.num_frames * video.tokens_per_frame, text.num_hidden_layers
    outer = inner = total * (settings.retention_ratio if settings.has_outer_stage else 1)
    layer = settings.inner_merge_layer if settings.has_inner_stage else None
    if layer is not None:
        inner = outer * (1 - settings.inner_merge_ratio)
    paper = [
        prefill_flops(layers, text.hidden_size, mlp_width(text))
        for layers in ([total] * depth, tokens_by_layer(outer, inner, layer, depth))
    ]
    return exact[0], exact[1], (paper[0], paper[1])
