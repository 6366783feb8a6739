"""Which kept token a dropped one counts with, so that it is known how much of the video each of them stands for."""

from dataclasses import replace

import torch
import torch.nn.functional as F

from .host_numbers import Steps
from .merged_video import MergedVideo
from .spatial import masked_positions


# Frames that are compared with their outputs at once.
FRAMES_PER_CHUNK = 64


def with_representatives(merged: MergedVideo, features: torch.Tensor) -> Steps:
    """
    The same video with its `representative`, so that it has `sizes`.

    A dropped token counts with the output most like it (cosine similarity; of equally similar ones the earlier) among
    those that tokens of its frame went into. A frame that has none looks at those of the frame before it that has
    some, or, at a video's start, of the first one that does.

    Args:
        merged: What came out of a merge.
        features: (F, T, D), what went in.
    """
    if merged.representative is not None:
        return merged
    num_frames, num_outputs = len(features), merged.num_tokens
    if num_outputs == 0:
        return replace(merged, representative=merged.assignment)
    device = features.device
    is_kept = merged.assignment >= 0
    # (F, N): which outputs a frame went into. Dropped tokens are noted in a column of their own.
    column = torch.where(is_kept, merged.assignment, num_outputs)
    is_near = torch.zeros((num_frames, num_outputs + 1), dtype=torch.bool, device=device).scatter_(1, column, True)
    is_near = is_near[:, :num_outputs]
    has_some = is_near.any(1)
    home = torch.where(has_some, torch.arange(num_frames, device=device), -1).cummax(0).values
    is_near = is_near[torch.where(home < 0, has_some.int().argmax(), home)]

    most = int((yield is_near.sum(1).max()))
    nearby = masked_positions(is_near, most)  # (F, K)
    is_near = is_near.gather(1, nearby)
    outputs = F.normalize(merged.embeddings.detach().float(), dim=-1)
    nearest = []
    for frames in torch.arange(num_frames, device=device).split(FRAMES_PER_CHUNK):
        similarity = features[frames].detach().float() @ outputs[nearby[frames]].mT  # (f, T, K)
        nearest.append(similarity.masked_fill(~is_near[frames, None], -torch.inf).argmax(-1))
    nearest = nearby.gather(1, torch.cat(nearest))
    return replace(merged, representative=torch.where(is_kept, merged.assignment, nearest))
