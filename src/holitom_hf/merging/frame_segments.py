"""Stage 1 over the similarity of adjacent frames: where the video is cut."""

import torch

from .segmentation import choose_segments, count_static_tokens, similarity_runs


def segment_frames(
    similarity: torch.Tensor, threshold: float, max_segment_frames: int | None = None
) -> list[tuple[int, int]]:
    """
    Cuts F frames into the segments in which most tokens repeat.

    Args:
        similarity: (F-1, T) cosine similarity of adjacent frames, as from [`frame_similarity`].
        threshold: tau; a token repeats if its similarity is strictly larger.
        max_segment_frames: Longest segment in frames; `None` sets no limit.

    Returns:
        Half-open `(start, stop)` frame ranges that cover 0..F in order.

    Raises:
        ValueError: If `similarity` is not two-dimensional or `max_segment_frames` is below 1.

    Source: section 3.1.
    """
    if similarity.ndim != 2:
        raise ValueError(f"similarity must have shape (frames - 1, tokens), got {tuple(similarity.shape)}")
    if max_segment_frames is not None and max_segment_frames < 1:
        raise ValueError(f"max_segment_frames must be at least 1 or None, got {max_segment_frames}")
    static_counts = count_static_tokens(similarity_runs(similarity, threshold))
    return choose_segments(static_counts, max_segment_frames)[0]
