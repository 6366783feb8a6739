"""Means over time: frames are averaged in equal parts of the video, place by place."""

import torch

from ..host_numbers import on_device
from ..merged_video import MergedVideo
from ..transitions import weighted_sums
from ..video_tokens import VideoTokens


def merge_temporal_pooling(video: VideoTokens, config) -> MergedVideo:
    """
    Averages the video's frames down to `round(F * R)`, at least one: each is the mean of as many frames, to one, that
    follow each other, and stands where the first of them stood.

    Args:
        video: Its tokens; nothing but their number matters.
        config: The settings; R is `retention_ratio`.

    Source: the temporal pooling of STORM (arXiv 2503.04130), without the layers (Mamba) that mix frames before it and
    are trained with it. Its other form, sampling frames behind those layers, is `"frame_subsampling"` without them.
    """
    num_frames, tokens_per_frame, device = video.num_frames, video.tokens_per_frame, video.features.device
    num_parts = max(1, round(num_frames * config.retention_ratio))
    starts = [part * num_frames // num_parts for part in range(num_parts)]
    segments = list(zip(starts, [*starts[1:], num_frames]))
    place = torch.arange(tokens_per_frame, device=device)
    length, part = on_device(
        [
            [stop - start for start, stop in segments for _ in range(start, stop)],
            [p for p, (start, stop) in enumerate(segments) for _ in range(start, stop)],
        ],
        device,
    )
    chosen = (on_device(starts, device)[:, None] * tokens_per_frame + place).flatten()
    assigned = part[:, None] * tokens_per_frame + place  # (F, T)
    inputs = torch.arange(num_frames * tokens_per_frame, device=device)
    weights = (1 / length).repeat_interleave(tokens_per_frame, output_size=len(inputs))
    contributions = (inputs, assigned.flatten(), weights)
    return weighted_sums(video, chosen, assigned, contributions, segments, num_parts / num_frames)
