"""Where the question stands that `inner_method="prune_by_question"` asks: the text behind a row's videos."""

import torch


def question_positions(video_mask: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """
    The positions behind the last video of a prompt, up to its last token. It waits for the device, to know how many.

    Args:
        video_mask: (B, N) bool, where tokens of videos stand in this call; what lies between a row's first real token
            and its last one is real.
        last: (B,) int64, the last token of the prompt.

    Returns:
        (B, Q) int64 for the longest of the questions; shorter ones repeat their first position. Where a prompt ends
        with its video or has none, its last token.

    Source: PruneVid, arXiv 2412.16117; `obtain_language_attention` of Visual-AI/PruneVid takes all tokens behind the
    video's, too.
    """
    places = torch.arange(video_mask.shape[1], device=video_mask.device)
    is_before = video_mask & (places <= last[:, None])
    first = (is_before * (places + 1)).amax(1)
    first = torch.where(is_before.any(1), first, last).minimum(last)
    longest = int((last - first).amax()) + 1
    return (last[:, None] - torch.arange(longest, device=last.device).flip(0)).maximum(first[:, None])
