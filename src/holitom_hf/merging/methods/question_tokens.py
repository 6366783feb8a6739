"""The tokens that are most like the question, without those that repeat: a choice that knows what is asked."""

import torch
import torch.nn.functional as F

from ..host_numbers import Steps
from ..merged_video import take_tokens
from ..products import segmentation_flops
from ..segmentation import repeats_first, segment_starts
from ..spatial import masked_positions
from ..video_tokens import VideoTokens


def merge_question_tokens(video: VideoTokens, config) -> Steps:
    """
    Keeps exactly `round(F * T * R)` tokens, at least one, as they are.

    What is like the same place of its segment's first frame (cosine similarity above `similarity_threshold`) comes
    last; of the rest those come first whose cosine similarity to any token of the prompt's text is largest. Without a
    prompt, as in features merged on their own, all are alike and the earlier come first.

    Args:
        video: Its tokens, with `question`.
        config: The settings.

    Source: the retrieval by the prompt of PAR (arXiv 2410.07278) for the tokens of a video; not its router.
    """
    num_tokens = video.num_frames * video.tokens_per_frame
    num_kept = max(1, round(num_tokens * config.retention_ratio))
    unit = F.normalize(video.features.detach().float(), dim=-1)
    relevance = unit.new_zeros(unit.shape[:2])
    if video.question is not None and len(video.question):
        question = F.normalize(video.question.detach().to(unit), dim=-1)  # (Q, D)
        relevance = (unit @ question.T).amax(-1)  # (F, T)
    first = yield from segment_starts(video.features, config.similarity_threshold, config.max_segment_frames)
    score = torch.where(repeats_first(unit, first, config.similarity_threshold), relevance - 2, relevance)
    best = score.flatten().argsort(descending=True, stable=True)[:num_kept]
    is_kept = torch.zeros(num_tokens, dtype=torch.bool, device=unit.device).index_fill_(0, best, True)
    return take_tokens(video, masked_positions(is_kept[None], num_kept)[0], config.retention_ratio)


def question_tokens_flops(video: VideoTokens, config) -> float:
    """Products of [`merge_question_tokens`]: every token with every one of the question's, and stage 1's."""
    num_frames, tokens, dim = video.features.shape
    num_question = 0 if video.question is None else len(video.question)
    stage_1 = segmentation_flops(num_frames, tokens, dim) if config.similarity_threshold < 1 else 0.0
    return 2.0 * num_frames * tokens * dim * num_question + stage_1
