"""HoliTom with SToP: places that the vision tower attends to in every frame are kept less, and merged more."""

from dataclasses import replace

from ..host_numbers import Steps
from ..segmentation import choose_segments, count_static_tokens, frame_similarity, similarity_runs
from ..video_tokens import VideoTokens
from .holitom import merge_holitom


# As published for HoliTom: the weights of the sink score in space and in time, and its exponent.
IN_SPACE = 0.04
IN_TIME = 0.07
EXPONENT = 1.1
# Patches of the tower that the first was chosen for, among which a frame's attention of 1 is divided.
NUM_PATCHES = 729


def merge_holitom_stop(video: VideoTokens, config) -> Steps:
    """
    Stages 1 and 2 with a sink score s of every place: its mean importance over the frames to the power of 1.1, scaled
    to 0..1. Segments are HoliTom's. A token is static if its similarities plus 0.07 s are larger than
    `similarity_threshold`; of the dynamic ones those are kept whose importance minus 0.04 s is largest. The budget is
    HoliTom's, with as many static tokens as that makes.

    Args:
        video: Its tokens, with `importance`.
        config: The settings, as for HoliTom.

    Source: SToP (arXiv 2604.20937), `pruning/holitom/llava_arch.py` and `eval/utils/config.py` of rlqja1107/SToP,
    whose constants these are, chosen there for R = 10 %. What differs: 0.04 is in units of 729 times the mean
    importance, which is 1 for the tower of LLaVA-OneVision; the share of tokens that is kept follows from the static
    tokens that there are (there from those without the score), so that budgets are alike; the threshold is the
    setting's (there 0.8); the published code also takes 0.3 s from the scores of cluster centres among static tokens,
    which is left out.
    """
    importance = video.importance.detach().float()
    persistent = importance.mean(0).pow(EXPONENT)  # (T,)
    low, high = persistent.aminmax()
    sink = (persistent - low) / (high - low).clamp_min(1e-12)
    similarity = frame_similarity(video.features)
    counts = yield count_static_tokens(similarity_runs(similarity, config.similarity_threshold))
    segments, _ = choose_segments(counts, config.max_segment_frames)
    kept_less = importance - IN_SPACE * NUM_PATCHES * importance.mean() * sink
    video = replace(video, importance=kept_less)
    return (yield from merge_holitom(video, config, segments, similarity + IN_TIME * sink))
