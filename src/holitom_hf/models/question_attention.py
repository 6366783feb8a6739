"""What all tokens of the question attend to: stage 3's choice with `inner_method="prune_by_question"`."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from ..sequence.inner_stage import InnerStage
from ..sequence.packed_rows import take_rows
from ..sequence.question_positions import question_positions
from .masks import score_bias


@torch.no_grad()
def question_attention(
    decoder: nn.Module,
    layer: nn.Module,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    keys: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    stage: InnerStage,
) -> torch.Tensor:
    """
    The largest attention that any head of any token behind a row's videos, up to the prompt's last token, pays to the
    positions of this call. One query row for each of these tokens: no attention matrix.

    Args:
        decoder: A [`HoliTomDecoderMixin`].
        The rest: As in [`HoliTomDecoderMixin.received_attention`].

    Returns:
        (B, N) float32.

    Source: PruneVid, arXiv 2412.16117; `VTPWindowCache` of Visual-AI/PruneVid.
    """
    attention = layer.self_attn
    batch_size, num_new, _ = hidden_states.shape
    normed = layer.input_layernorm(hidden_states)
    is_video = torch.zeros((batch_size, num_new), dtype=torch.bool, device=normed.device)
    for row, videos in enumerate(stage.videos):
        for positions in videos:
            is_video[row, positions.to(normed.device)] = True
    query = question_positions(is_video, stage.query.to(normed.device))  # (B, Q)
    cos, sin = (values.to(normed.device).expand(batch_size, -1, -1) for values in position_embeddings)

    queries = decoder.query_of(attention, take_rows(normed, query))  # (B, H, Q, d)
    queries = decoder.rotated(queries, take_rows(cos, query), take_rows(sin, query))
    if keys is None:
        keys = decoder.rotated(decoder.keys_of(attention, normed), cos, sin)
    num_keys = keys.shape[2]
    scores = queries.unflatten(1, (keys.shape[1], -1)) @ keys.mT[:, :, None]  # (B, H_kv, G, Q, S)
    scores = scores.float() * attention.scaling
    if stage.sizes is not None:
        scores = scores + score_bias(stage.sizes.to(scores.device), num_keys)[:, None, None, None]
    # Tokens see what is not after them; in a static cache there are unused places, too.
    is_seen = torch.arange(num_keys, device=keys.device) <= (query + stage.num_past)[..., None]  # (B, Q, S)
    if attention_mask is not None:
        is_real = F.pad(attention_mask.to(is_seen.device), (0, num_keys - attention_mask.shape[1]))
        is_seen = is_seen & is_real[:, None]
    probabilities = scores.masked_fill(~is_seen[:, None, None], -torch.inf).softmax(-1)
    importance = probabilities.amax((1, 2, 3))[:, stage.num_past : stage.num_past + num_new]
    if isinstance(attention.q_proj.weight, DTensor):
        # Tensor parallel: this process saw its own heads only, and all must choose alike.
        group = attention.q_proj.weight.device_mesh.get_group()
        dist.all_reduce(importance := importance.contiguous(), dist.ReduceOp.MAX, group=group)
    return importance
