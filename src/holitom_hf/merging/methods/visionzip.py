"""VisionZip (Yang et al., CVPR 2025, arXiv 2412.04467), a baseline: dominant and contextual tokens of a frame."""

import torch

from ..merged_video import MergedVideo, TokenGroup, TokenKind, in_order
from ..spatial import masked_positions, select_tokens
from ..video_tokens import VideoTokens


def num_dominant_tokens(num_kept: int) -> int:
    """How many of a frame's kept tokens are dominant: 54 of 64, as the authors choose."""
    return int(num_kept * 54 / 64)


def visionzip_frames(
    features: torch.Tensor, importance: torch.Tensor, keys: torch.Tensor, num_kept: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Keeps `num_kept` tokens of every frame: the most attended ones, and some that absorb the others by key similarity.

    Args:
        features: (F, T, D).
        importance: (F, T), what each token receives of the attention.
        keys: (F, T, K) attention keys averaged over heads.
        num_kept: N <= T.

    Returns:
        `embeddings` (F, N, D), the dominant ones in ascending position, then the contextual ones;
        `positions` (F, N) int64, where they come from;
        `places` (F, N) int64, where they stand in a grid with newlines. The published code sorts the dominant tokens
        by position and their places by importance, so that the i-th by position stands where the i-th most important
        came from; a baseline must do as it was published;
        `slot` (F, T) int64, the entry of a frame's N that each token went into.

    Source: VisionZip, sections 3.2 and 3.3.
    """
    num_frames, num_tokens, dim = features.shape
    device = features.device
    num_dominant = num_dominant_tokens(num_kept)
    num_contextual = num_kept - num_dominant
    is_dominant = select_tokens(
        importance,
        torch.ones_like(importance, dtype=torch.bool),
        torch.full((num_frames,), num_dominant, device=device),
    )
    dominant = masked_positions(is_dominant, num_dominant)  # (F, N_d)
    others = masked_positions(~is_dominant, num_tokens - num_dominant)  # (F, O)
    slot = torch.full((num_frames, num_tokens), -1, device=device)
    slot.scatter_(1, dominant, torch.arange(num_dominant, device=device).expand_as(dominant))
    dominant_places = importance.float().argsort(dim=-1, descending=True, stable=True)[:, :num_dominant]
    dominant_embeddings = features.gather(1, dominant[..., None].expand(-1, -1, dim))
    if num_contextual == 0:
        return dominant_embeddings, dominant, dominant_places, slot

    step = max(1, others.shape[1] // num_contextual)
    is_target = torch.zeros(others.shape[1], dtype=torch.bool, device=device)
    is_target[: step * num_contextual : step] = True
    targets, absorbed = others[:, is_target], others[:, ~is_target]

    def rows(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))

    unit_keys = torch.nn.functional.normalize(keys.float(), dim=-1)
    target_of = (rows(unit_keys, absorbed) @ rows(unit_keys, targets).mT).argmax(-1)  # (F, A)
    one_hot = (target_of[:, None, :] == torch.arange(num_contextual, device=device)[:, None]).float()  # (F, N_c, A)
    means = one_hot @ rows(features, absorbed).float() / one_hot.sum(-1, keepdim=True).clamp_min(1)
    contextual_embeddings = rows(features, targets) + means.to(features.dtype)

    slot.scatter_(1, targets, num_dominant + torch.arange(num_contextual, device=device).expand_as(targets))
    slot.scatter_(1, absorbed, num_dominant + target_of)
    return (
        torch.cat([dominant_embeddings, contextual_embeddings], 1),
        torch.cat([dominant, targets], 1),
        torch.cat([dominant_places, targets], 1),
        slot,
    )


def merge_visionzip(video: VideoTokens, config) -> MergedVideo:
    """
    VisionZip over a video: every frame is a segment of its own.

    Args:
        video: Its tokens, with `importance` and `keys`.
        config: The settings.

    Raises:
        ValueError: Without `keys`.
    """
    if video.keys is None:
        raise ValueError('outer_method="visionzip" needs the keys of the vision tower\'s attention')
    num_frames, tokens_per_frame, device = video.num_frames, video.tokens_per_frame, video.features.device
    num_kept = max(1, round(tokens_per_frame * config.retention_ratio))
    embeddings, positions, places, slot = visionzip_frames(video.features, video.importance, video.keys, num_kept)
    frame = torch.arange(num_frames, device=device)[:, None]
    is_contextual = torch.arange(num_kept, device=device) >= num_dominant_tokens(num_kept)
    group = TokenGroup(
        embeddings.flatten(0, 1),
        frame.expand(-1, num_kept).flatten(),
        positions.flatten(),
        TokenKind.DYNAMIC,
        (2 * frame + is_contextual).flatten(),
        places.flatten(),
    )
    assigned = torch.where(slot >= 0, slot + frame * num_kept, -1)
    segments = [(f, f + 1) for f in range(num_frames)]
    return in_order(video, [group], assigned, segments, num_kept / tokens_per_frame, newline_if_empty=True)


def visionzip_flops(video: VideoTokens, config) -> float:
    """Products of [`merge_visionzip`]: keys of absorbed tokens with those of contextual ones, and sums over them."""
    num_frames, tokens, dim = video.features.shape
    num_kept = max(1, round(tokens * config.retention_ratio))
    num_dominant = num_dominant_tokens(num_kept)
    pairs = (num_kept - num_dominant) * (tokens - num_kept)
    return 2.0 * num_frames * pairs * (video.keys.shape[-1] + dim)
