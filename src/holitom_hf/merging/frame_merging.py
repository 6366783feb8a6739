"""Whole frames that are merged where a video hardly changes (EarlyTom, arXiv 2605.30010)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from .host_numbers import on_device
from .segmentation import COMPARED_BYTES


# Share of the newest similarity in the moving average.
MOMENTUM = 0.9
# EarlyTom's window of 6: a segment ends before the frame that would be its sixth.
LONGEST_SEGMENT = 5


@dataclass
class FrameGroups:
    """
    F frames of some videos as the G that are left of them. All numbers are on the host.

    Attributes:
        group: (F,) int64, ascending: which of the G every frame is in.
        members: (G, 2) int64, the frames that each is made of; twice the same one where it is alone.
        weight: (G,) float32, the share of the first of them.
        num_frames: Left of every video.
    """

    group: np.ndarray
    members: np.ndarray
    weight: np.ndarray
    num_frames: list[int]

    def merge(self, states: torch.Tensor) -> torch.Tensor:
        """(F, P, D) -> (G, P, D)."""
        if len(self.members) == len(states):
            return states
        first, second = on_device(self.members.T.tolist(), states.device)
        weight = torch.from_numpy(self.weight).to(states.device, states.dtype, non_blocking=True)
        return torch.lerp(states[second], states[first], weight[:, None, None])


@torch.no_grad()
def group_frames(states: torch.Tensor, num_frames: list[int], threshold: float) -> FrameGroups:
    """
    Which frames EarlyTom merges. It waits for the device once.

    A segment goes on while the moving average of its frames' similarity to its first one is at least the threshold,
    up to [`LONGEST_SEGMENT`] frames. Its first and last frame stay; of those between, two adjacent ones become one
    where they are at least as similar as the segment's ends, and as the next two of them are (s'), with weights s and
    s' (1 and 0 for the last two).

    Two departures from the public code: there, equal similarities merge nothing (so that a still video is left to
    rounding), and of two or more frames between the ends the last one gets lost where it is not merged.

    Args:
        states: (F, P, D), the frames of all videos.
        num_frames: Of every video; nothing is merged across them.
        threshold: Of the average over patches of the cosine similarity; at 1 nothing is merged.

    Source: EarlyTom, frame merging inside the encoder, by its public code (viridisGreen/EarlyTom).
    """
    similarity = band_similarity(states, LONGEST_SEGMENT - 1).round(decimals=5).tolist()
    threshold = threshold if threshold < 1 else math.inf
    left, lengths, start = [], [], 0
    for number in num_frames:
        segments = stream_segments(similarity, start, start + number, threshold)
        left.extend(merged for segment in segments for merged in merge_middle(similarity, *segment))
        lengths.append(len(left) - sum(lengths))
        start += number
    members = np.array([(first, second) for first, second, _ in left])
    weight = np.array([weight for *_, weight in left], dtype=np.float32)
    return FrameGroups(np.arange(len(left)).repeat(np.diff(members)[:, 0] + 1), members, weight, lengths)


def band_similarity(states: torch.Tensor, reach: int) -> torch.Tensor:
    """
    Cosine similarity of frames with those behind them, averaged over patches.

    Args:
        states: (F, P, D).
        reach: How far behind, at most.

    Returns:
        (reach + 1, F) float32: entry [d, f] is of the frames f and f + d; 1 where there is no such frame.
    """
    num_frames = len(states)
    band = torch.ones(reach + 1, num_frames, device=states.device)
    at_once = max(1, COMPARED_BYTES // (8 * states[0].numel()))
    for start in range(0, num_frames, at_once):
        unit = F.normalize(states[start : start + at_once + reach].float(), dim=-1)
        for distance in range(1, min(reach + 1, len(unit))):
            later = unit[distance : distance + at_once]
            band[distance, start : start + len(later)] = (unit[: len(later)] * later).sum(-1).mean(-1)
    return band


def stream_segments(
    similarity: list[list[float]], start: int, stop: int, threshold: float
) -> Iterator[tuple[int, int]]:
    """Half-open ranges that the frames of a video are cut into; `similarity` as from [`band_similarity`]."""
    while start < stop:
        average, end = 1.0, start + 1
        while end < min(stop, start + LONGEST_SEGMENT):
            average = MOMENTUM * similarity[end - start][start] + (1 - MOMENTUM) * average
            if average < threshold:
                break
            end += 1
        yield start, end
        start = end


def merge_middle(similarity: list[list[float]], start: int, stop: int) -> Iterator[tuple[int, int, float]]:
    """What is left of a segment: a frame, the one that is merged into it (or itself), and the first one's weight."""
    yield start, start, 1.0
    frame, last = start + 1, stop - 1
    while frame < last:
        alike, following = (similarity[1][first] if first + 1 < last else 0.0 for first in (frame, frame + 1))
        is_pair = frame + 1 < last and alike >= max(following, similarity[last - start][start])
        yield frame, frame + is_pair, alike / (alike + following) if is_pair and following > 0 else 1.0
        frame += 1 + is_pair
    if last > start:
        yield last, last, 1.0
