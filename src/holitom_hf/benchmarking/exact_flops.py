"""
Operations of every part of a compressed forward pass, counted as they are run.

A multiplication and an addition count as two, as torch's `FlopCounterMode` has it, and like there only matrix products
and convolutions count. (The paper's formula, in `flops.py`, counts the pair as one, knows neither grouped-query
attention nor the gate of the MLP, and leaves out what stands before the decoder.)
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ..configuration import HoliTomConfig
from ..merging.flops import prefill_flops, tokens_by_layer
from ..merging.inner import num_inner_kept


@dataclass
class ForwardFlops:
    """
    Operations of one prompt, by part.

    Attributes:
        vision_tower, projector: All frames.
        importance: The one layer's attention, from its queries and keys.
        segmentation: Norms and products of adjacent frames' tokens.
        clustering: Distances, and sums over members.
        decoder: All layers.
        inner_merging: The query row that stage 3 asks for, and similarities of what is folded.
        output_layer: The vocabulary, for one token.
    """

    vision_tower: float
    projector: float
    importance: float
    segmentation: float
    clustering: float
    decoder: float
    inner_merging: float
    output_layer: float

    @property
    def total(self) -> float:
        """All parts together."""
        return sum(asdict(self).values())

    @property
    def own(self) -> float:
        """What HoliTom adds."""
        return self.importance + self.segmentation + self.clustering + self.inner_merging


def vision_tower_flops(vision_config, num_frames: int) -> float:
    """Operations of a SigLIP tower without a head over `num_frames` frames."""
    width, hidden = vision_config.hidden_size, vision_config.intermediate_size
    patches = _num_patches(vision_config)
    embedding = 2 * patches * vision_config.num_channels * vision_config.patch_size**2 * width
    layer = 2 * patches * (4 * width**2 + 2 * width * hidden) + 4 * patches**2 * width
    return float(num_frames * (embedding + vision_config.num_hidden_layers * layer))


def projector_flops(config, num_frames: int) -> float:
    """Operations of LLaVA-OneVision's two-layer projector, which runs before the pooling."""
    layers = config.vision_feature_layer
    width = config.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers))
    dim = config.text_config.hidden_size
    return float(num_frames * 2 * _num_patches(config.vision_config) * (width * dim + dim * dim))


def importance_flops(vision_config, num_frames: int) -> float:
    """Operations of [`vision_importance`]: two projections and the scores."""
    patches, width = _num_patches(vision_config), vision_config.hidden_size
    return float(num_frames * (2 * patches * 2 * width**2 + 2 * patches**2 * width))


def segmentation_flops(num_frames: int, tokens_per_frame: int, dim: int) -> float:
    """Operations of [`frame_similarity`] where each norm and each product of adjacent tokens is computed once."""
    return float(2 * dim * tokens_per_frame * (2 * num_frames - 1))


def clustering_flops(num_tokens: Sequence[int], num_clusters: Sequence[int], dim: int) -> float:
    """Operations of [`cluster_tokens`] over sets of these sizes, without padding."""
    return float(sum(2 * dim * n * (n + m) for n, m in zip(num_tokens, num_clusters) if m))


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


@dataclass
class VideoPlan:
    """
    What stages 1 and 2 make of a video of scenes of equal length: sizes, no values.

    Attributes:
        num_tokens: Tokens that are left.
        num_static, num_clusters: Of every segment.
    """

    num_tokens: int
    num_static: list[int]
    num_clusters: list[int]


def plan_video(
    settings, num_frames: int, tokens_per_frame: int, static_share: float = 0.6, scene_frames: int = 8
) -> VideoPlan:
    """
    The sizes that stages 1 and 2 come to (section 3.2).

    Args:
        settings: [`HoliTomConfig`].
        num_frames, tokens_per_frame: F and T.
        static_share: Share of the tokens that repeat over their scene.
        scene_frames: Frames of a scene; the last one may be shorter.
    """
    total = num_frames * tokens_per_frame
    if not settings.has_outer_stage:
        return VideoPlan(total, [], [])
    if settings.outer_method != "holitom":
        return VideoPlan(round(settings.retention_ratio * total), [], [])
    lengths = [min(scene_frames, num_frames - start) for start in range(0, num_frames, scene_frames)]
    num_static = [round(static_share * tokens_per_frame) if length > 1 else 0 for length in lengths]
    gain = sum(n * (length - 1) for n, length in zip(num_static, lengths))
    ratio = min(settings.retention_ratio * total / (total - gain), 1)
    num_clusters = [round(n * ratio) for n in num_static]
    dynamic = sum(length * math.ceil((tokens_per_frame - n) * ratio) for n, length in zip(num_static, lengths))
    return VideoPlan(sum(num_clusters) + dynamic, num_static, num_clusters)


def forward_flops(config, num_frames: int, num_text: int, plan: VideoPlan, settings=None) -> ForwardFlops:
    """
    Operations of a prompt with one video, up to its first token.

    Args:
        config: [`HoliTomLlavaOnevisionConfig`].
        num_frames: F.
        num_text: Tokens of the prompt beside the video's (its newline is added here).
        plan: From [`plan_video`], or as a video turned out.
        settings: [`HoliTomConfig`]; default: the config's.
    """
    settings = settings or config.holitom_config
    text = config.text_config
    side = math.ceil(config.vision_config.image_size // config.vision_config.patch_size / 2)
    clusters_videos = settings.has_outer_stage and settings.outer_method == "holitom"
    num_video = plan.num_tokens + 1
    inner_layer, num_kept = None, num_video
    if settings.has_inner_stage:
        inner_layer, num_kept = settings.inner_merge_layer, num_inner_kept(num_video, settings.inner_merge_ratio)
    layers = tokens_by_layer(num_video + num_text, num_kept + num_text, inner_layer, text.num_hidden_layers)
    inner = 0.0
    if inner_layer is not None:
        videos = [(num_kept, num_video - num_kept)]
        inner = inner_merging_flops(text, num_video + num_text, videos, settings.inner_method == "merge")
    return ForwardFlops(
        vision_tower=vision_tower_flops(config.vision_config, num_frames),
        projector=projector_flops(config, num_frames),
        importance=importance_flops(config.vision_config, num_frames) if settings.needs_importance else 0.0,
        segmentation=segmentation_flops(num_frames, side**2, text.hidden_size) if clusters_videos else 0.0,
        clustering=clustering_flops(plan.num_static, plan.num_clusters, text.hidden_size),
        decoder=decoder_flops(text, layers),
        inner_merging=inner,
        output_layer=output_layer_flops(text),
    )


def compare_flops(
    config, num_frames: int, num_text: int, static_share: float = 0.6
) -> tuple[ForwardFlops, ForwardFlops, tuple[float, float]]:
    """
    Operations without and with a config's compression.

    Args:
        config: [`HoliTomLlavaOnevisionConfig`].
        num_frames, num_text: As in [`forward_flops`].
        static_share: As in [`plan_video`].

    Returns:
        Exact without, exact with, and both by the paper's formula: the decoder's, for the video's tokens alone, of
        which exactly the share that is asked for is left.
    """
    settings, text = config.holitom_config, config.text_config
    nothing = HoliTomConfig(outer_method="none", inner_method="none")
    tokens_per_frame = math.ceil(config.vision_config.image_size // config.vision_config.patch_size / 2) ** 2
    exact = [
        forward_flops(
            config, num_frames, num_text, plan_video(chosen, num_frames, tokens_per_frame, static_share), chosen
        )
        for chosen in (nothing, settings)
    ]
    total, depth = num_frames * tokens_per_frame, text.num_hidden_layers
    outer = inner = total * (settings.retention_ratio if settings.has_outer_stage else 1)
    layer = settings.inner_merge_layer if settings.has_inner_stage else None
    if layer is not None:
        inner = outer * (1 - settings.inner_merge_ratio)
    paper = [
        prefill_flops(layers, text.hidden_size, text.intermediate_size)
        for layers in ([total] * depth, tokens_by_layer(outer, inner, layer, depth))
    ]
    return exact[0], exact[1], (paper[0], paper[1])
