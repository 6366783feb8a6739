"""FastVID: in every frame the most important tokens, in some frames of a segment density peaks that stand for all."""

from dataclasses import replace

import torch
import torch.nn.functional as F

from ..apportionment import apportion, evenly, kept_tokens
from ..density import density_peaks
from ..host_numbers import Steps, on_device
from ..merged_video import take_tokens
from ..spatial import masked_positions, select_tokens
from ..transitions import transition_segments, weighted_sums
from ..video_tokens import VideoTokens


# As published: c and tau of DySeg, d (the share of density peaks), p (frames for each anchor frame), beta (the least
# weight of a peak against the mean of what joins it), and the neighbours that density looks at.
MIN_SEGMENTS = 8
TRANSITION = 0.9
CONTEXT_SHARE = 0.4
FRAMES_PER_ANCHOR = 4
LEAST_WEIGHT = 0.6
NUM_NEIGHBORS = 4


def merge_fastvid(video: VideoTokens, config) -> Steps:
    """
    Keeps exactly `round(F * T * R)` tokens, at least one. With n tokens for a frame:

    - segments end where the means of adjacent frames have a cosine similarity below 0.9, at least 8 of them;
    - n - int(0.4 n) tokens of every frame, the most important ones, stay as they are;
    - the others of a segment are shared out among its anchor frames, every fourth counted from its last: these keep
      the tokens with the largest delta * density among their own others, density of the 4 nearest;
    - every other token of the segment joins, in each of its anchor frames, the peak that it is most like (cosine),
      and so does a peak itself. A peak that q tokens join becomes w * peak + (1 - w) * their mean,
      w = max(1 / (q + 1), 0.6).

    Args:
        video: Its tokens, with `importance`.
        config: The settings; R is `retention_ratio`.

    Source: FastVID (arXiv 2503.11187), `modeling_qwen2.py` of LunarShen/FastVID, whose constants for
    LLaVA-OneVision these are. What differs: frames are compared by the mean of their tokens, and importance is the
    vision tower's attention, where FastVID has the pooling head of SigLIP, which video models come without; n is
    not rounded down in every frame, so that the budget is met; anchor frames have at most what is left in them (above
    about R = 45 % more stays by importance then); nothing is random.
    """
    num_frames, tokens_per_frame, device = video.num_frames, video.tokens_per_frame, video.features.device
    num_tokens, num_kept = num_frames * tokens_per_frame, kept_tokens(video, config)
    segments = yield from transition_segments(video.features, TRANSITION, MIN_SEGMENTS)
    anchors = [f for start, stop in segments for f in range(start, stop) if (stop - 1 - f) % FRAMES_PER_ANCHOR == 0]
    num_salient = next(
        num
        for num in range(salient_tokens(num_kept, num_frames), num_kept + 1)
        if num_kept - num <= len(anchors) * (tokens_per_frame - -(-num // num_frames))
    )
    num_context = num_kept - num_salient

    salient_counts = evenly(num_salient, num_frames, torch.device("cpu"))
    everything = torch.ones_like(video.importance, dtype=torch.bool)
    is_salient = select_tokens(video.importance, everything, salient_counts.to(device, non_blocking=True))
    salient = masked_positions(is_salient.view(1, -1), num_salient)[0]
    if num_context == 0:
        return replace(take_tokens(video, salient, config.retention_ratio), segments=segments)

    # How many peaks each anchor frame has: a segment's share for its length, the same in all of its anchors.
    length_of = {f: stop - start for start, stop in segments for f in range(start, stop)}
    weights = [length_of[f] / -(-length_of[f] // FRAMES_PER_ANCHOR) for f in anchors]
    room = tokens_per_frame - salient_counts[torch.tensor(anchors)]
    counts = apportion(torch.tensor(weights), room, num_context, tokens_per_frame).tolist()
    anchors, counts = zip(*((f, count) for f, count in zip(anchors, counts) if count))

    tokens = video.features.detach().float()
    neighbors = (~is_salient).sum(1, keepdim=True).clamp(1, NUM_NEIGHBORS)
    _, score = density_peaks(tokens, ~is_salient, neighbors, NUM_NEIGHBORS)
    most = max(counts)
    best = score[on_device(list(anchors), device)].argsort(dim=1, descending=True, stable=True)[:, :most]  # (A, M)
    row, column, frame = on_device(
        [
            [a for a, count in enumerate(counts) for _ in range(count)],
            [j for count in counts for j in range(count)],
            [f for f, count in zip(anchors, counts) for _ in range(count)],
        ],
        device,
    )
    peaks = frame * tokens_per_frame + best[row, column]  # (C,)

    # Which peak of every anchor frame a token is most like; a peak is most like itself.
    unit = F.normalize(tokens.flatten(0, 1), dim=-1)
    similarity = unit @ unit[peaks].T  # (F * T, C)
    number = torch.arange(num_context, device=device)
    similarity[peaks, number] = 2.0
    first = [sum(counts[:a]) for a in range(len(counts))]
    columns = on_device([[first[a] + min(j, counts[a] - 1) for j in range(most)] for a in range(len(counts))], device)
    nearest = similarity[:, columns].argmax(-1)  # (F * T, A)
    nearest = columns.flatten()[nearest + most * torch.arange(len(counts), device=device)]

    # Each token of a segment goes into one peak of each of its anchor frames.
    segment_of = [s for s, (start, stop) in enumerate(segments) for _ in range(start, stop)]
    pairs = [
        (f, a) for f in range(num_frames) for a, anchor in enumerate(anchors) if segment_of[f] == segment_of[anchor]
    ]
    pair_frame, pair_anchor = on_device(list(zip(*pairs)), device)
    inputs = pair_frame[:, None] * tokens_per_frame + torch.arange(tokens_per_frame, device=device)  # (P, T)
    joined, joins = nearest[inputs, pair_anchor[:, None]], ~is_salient[pair_frame]
    num_joined = torch.zeros(num_context, device=device).index_add_(0, joined.flatten(), joins.flatten().float())
    weight = (1 / (num_joined + 1)).clamp_min(LEAST_WEIGHT)
    share = (1 - weight) / num_joined
    contributions = (
        torch.cat([salient, peaks, inputs.flatten()]),
        torch.cat([torch.arange(num_kept, device=device), num_salient + joined.flatten()]),
        torch.cat([torch.ones(num_salient, device=device), weight, (share[joined] * joins).flatten()]),
    )

    # A token is named with the next anchor frame of its segment, or the last one where none follows.
    home = [
        min((a for g, a in pairs if g == f), key=lambda a: (anchors[a] < f, abs(anchors[a] - f)), default=-1)
        for f in range(num_frames)
    ]
    home = on_device(home, device).repeat_interleave(tokens_per_frame, output_size=num_tokens)
    assigned = num_salient + nearest.gather(1, home.clamp_min(0)[:, None])[:, 0]
    assigned = torch.where(home >= 0, assigned, -1)
    assigned[torch.cat([salient, peaks])] = torch.arange(num_kept, device=device)
    chosen = torch.cat([salient, peaks])
    assigned = assigned.view(num_frames, tokens_per_frame)
    return weighted_sums(video, chosen, assigned, contributions, segments, config.retention_ratio)


def salient_tokens(num_kept: int, num_frames: int) -> int:
    """How many tokens of a video stay by importance where anchor frames have room for the others."""
    for_frame = num_kept // num_frames
    return (for_frame - int(for_frame * CONTEXT_SHARE)) * num_frames


def fastvid_flops(video: VideoTokens, config) -> float:
    """Products of [`merge_fastvid`]: the tokens of every frame with each other, and all of them with the peaks."""
    num_frames, tokens, dim = video.features.shape
    num_kept = kept_tokens(video, config)
    num_context = num_kept - salient_tokens(num_kept, num_frames)
    return 2.0 * num_frames * tokens * dim * (tokens + num_context) if num_context else 0.0
