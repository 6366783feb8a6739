"""Merged tokens at all the places that they stand for (virtual token unmerging of DyMU, arXiv 2504.17040)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb, eager_attention_forward

from ..merging.merged_video import MergedVideo
from ..merging.spatial import masked_positions
from ..merging.video_tokens import VideoTokens
from ..sequence.compaction import CompactedPrompt
from ..sequence.packed_rows import PackedRows, take_rows
from .upstream import CACHE_NAME


@dataclass
class Unmerging:
    """
    Where a call's tokens stand in attention.

    Attributes:
        packed: Which E of the L positions keys and queries stand at: all text, and the placeholders that a token
            stands for.
        is_dropped: (B, L) bool, the placeholders that none stands for.
        index: (B, E) int64, which of the row's N tokens each is; arbitrary but valid at padding.
    """

    packed: PackedRows
    is_dropped: torch.Tensor
    index: torch.Tensor

    def take(self, values: torch.Tensor) -> torch.Tensor:
        """(B, N, D) of the tokens -> (B, E, D) of the places."""
        return take_rows(values, self.index.to(values.device))

    def around(self, layer: nn.Module) -> Callable[..., torch.Tensor]:
        """What runs a decoder layer over tokens at their places: see [`unmerged_layer`]."""
        return partial(unmerged_layer, layer, self)


# As part of an argument of a decoder that is exported on its own.
torch.export.register_dataclass(Unmerging)


def check_unmerging(settings, layer: int | None, decoder_kwargs: dict) -> None:
    """Raises a `ValueError` if tokens can't stand at their members' places, with stage 3 from `layer` on."""
    for name in ("output_hidden_states", "output_attentions"):
        if decoder_kwargs.get(name):
            raise ValueError(f"with virtual_unmerging layers are not recorded: leave {name} out")
    if layer is not None or settings.skips:
        raise ValueError('virtual_unmerging needs all layers to see the same tokens: set inner_method="none"')
    if settings.proportional_attention:
        raise ValueError(
            "virtual_unmerging counts a token at each of its places, and proportional_attention would again: set one"
        )


def unmerged(
    model,
    prompt: CompactedPrompt,
    video_mask: torch.Tensor,
    is_real: torch.Tensor,
    merged: list[MergedVideo],
    videos: list[VideoTokens],
    settings,
    layer: int | None,
    decoder_kwargs: dict,
) -> Unmerging:
    """
    The places of every token of a call. The host waits once more, for how many there are.

    A token stands at the places of those that were merged into it and at its own; what was dropped has none. Where one
    was merged into several (areas that overlap) it counts with the one that `assignment` names.

    Args:
        model: Whose [`kept_slots`] say which placeholder a token had.
        prompt: After merging.
        video_mask, is_real: (B, L) bool, placeholders and what is no padding.
        merged, videos: In the order of the prompts.
        settings: They merged them.
        layer: From which on the cache or the call is shorter.
        decoder_kwargs: Of the call.

    Raises:
        ValueError: As [`check_unmerging`], and for newlines behind rows that have no placeholders.
    """
    check_unmerging(settings, layer, decoder_kwargs)
    members, first = [], 0
    for tokens, video in zip(merged, videos):
        taken = _members(model, tokens, video, settings)
        members.append(torch.where(taken >= 0, taken + first, -1))
        first += tokens.num_tokens + _has_end(video, settings)
    number = torch.full_like(is_real, -1, dtype=torch.long).masked_scatter(video_mask, torch.cat(members))
    is_dropped = is_real & video_mask & (number < 0)
    keep = is_real & ~is_dropped
    packed = PackedRows.of(keep, keep.sum(1).tolist(), prompt.packed.padding_side)
    places = masked_positions(prompt.video_mask.reshape(1, -1), first)[0] % prompt.video_mask.shape[1]
    index = torch.where(video_mask, places[number.clamp_min(0)], prompt.packed.last_kept)
    return Unmerging(packed, is_dropped, index.gather(1, packed.index))


def _has_end(video: VideoTokens, settings) -> bool:
    """Whether a newline follows the video, behind its tokens."""
    return video.newline is not None and settings.newline_position == "end"


def _members(model, merged: MergedVideo, video: VideoTokens, settings) -> torch.Tensor:
    """(S,) int64, which token each of a video's placeholders stands for, or -1."""
    num_frames, tokens_per_frame = merged.assignment.shape
    if settings.newline_position == "row" and video.num_slots == num_frames * tokens_per_frame + 1:
        raise ValueError('virtual_unmerging needs newline_position="end": newlines of rows have no place to stand at')
    inputs = torch.arange(merged.num_input_tokens, device=merged.frame.device)
    every = replace(
        merged,
        frame=inputs // tokens_per_frame,
        position=inputs % tokens_per_frame,
        kind=torch.ones_like(inputs),
    )
    members = torch.full((video.num_slots,), -1, device=inputs.device)
    members[model.kept_slots(every, video, settings)] = merged.assignment.flatten()
    members[model.kept_slots(merged, video, settings)] = torch.arange(merged.num_tokens, device=inputs.device)
    if _has_end(video, settings):
        members[-1] = merged.num_tokens
    return members


def unmerged_layer(
    layer: nn.Module,
    unmerging: Unmerging,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    **kwargs,
) -> torch.Tensor:
    """
    A decoder layer of Qwen2's shape, its attention as in [`unmerged_attention`]: norms, projections and MLP run over
    the N tokens alone. Hooks on the layer do not run, nor is it checkpointed for gradients.

    Args:
        layer: A `Qwen2DecoderLayer`.
        unmerging: Where tokens stand.
        hidden_states: (B, N, D).
        attention_mask, position_embeddings, kwargs: As upstream's, of the places.
    """
    device = layer.input_layernorm.weight.device
    hidden_states = hidden_states.to(device)
    position_embeddings = tuple(values.to(device) for values in position_embeddings)
    if attention_mask is not None:
        attention_mask = attention_mask.to(device)
    normed = layer.input_layernorm(hidden_states)
    kwargs.pop("position_ids"), kwargs.pop("use_cache")
    attended, _ = unmerged_attention(layer.self_attn, normed, unmerging, position_embeddings, attention_mask, **kwargs)
    hidden_states = hidden_states + attended
    return hidden_states + layer.mlp(layer.post_attention_layernorm(hidden_states))


def unmerged_attention(
    attention: nn.Module,
    hidden_states: torch.Tensor,
    unmerging: Unmerging,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    As if every token stood at each of its places, rotated and masked for that place, and its outputs were averaged.
    Projections run over the N tokens alone.

    Queries, keys and values are repeated before the rotation, and the cache takes them so: it is as long as the
    uncompressed one, and what follows is plain attention. DyMU's factored form of the scores, which saves operations
    and not time, gives the same; its published code runs this one.

    Args:
        attention: A `Qwen2Attention`.
        hidden_states: (B, N, D).
        unmerging: Which of them stand at the E places.
        position_embeddings: Cosine and sine of the places, (B, E, d).
        attention_mask: Of the places, as upstream's.
        kwargs: As upstream.

    Returns:
        (B, N, D), and the probabilities of the places where the attention has them.
    """
    cache = kwargs.pop(CACHE_NAME, None)
    index = unmerging.index.to(hidden_states.device)
    batch_size, num_tokens, _ = hidden_states.shape
    query, key, value = (
        project(hidden_states).view(batch_size, num_tokens, -1, attention.head_dim).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    query, key, value = (
        states.gather(2, index[:, None, :, None].expand(-1, states.shape[1], -1, attention.head_dim))
        for states in (query, key, value)
    )  # (B, H, E, d)
    query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
    if cache is not None:
        key, value = cache.update(key, value, attention.layer_idx)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention_forward)
    output, probabilities = attend(
        attention,
        query,
        key,
        value,
        attention_mask,
        dropout=attention.attention_dropout if attention.training else 0.0,
        scaling=attention.scaling,
        sliding_window=attention.sliding_window,
        **kwargs,
    )
    means = mean_over_places(output.flatten(2), index, unmerging.packed.mask.to(index.device), num_tokens)
    return attention.o_proj(means), probabilities


def mean_over_places(values: torch.Tensor, index: torch.Tensor, mask: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """
    Of what is at the places (B, E, D), of which `mask` (B, E) says those that are no padding, the mean for each token:
    (B, num_tokens, D); 0 for one without places.
    """
    weights = mask.to(torch.float32)
    counts = weights.new_zeros(len(values), num_tokens).scatter_add(1, index, weights)
    total = weights.new_zeros(len(values), num_tokens, values.shape[-1])
    total = total.scatter_add(1, index[..., None].expand_as(values), values.float() * weights[..., None])
    return (total / counts.clamp_min(1)[..., None]).to(values.dtype)
