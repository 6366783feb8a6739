"""Products of methods, as torch counts them: what compares methods asks for it, checkpoints do without."""

from .methods.farthest_points import token_budget
from .video_tokens import VideoTokens


def segmentation_flops(num_frames: int, tokens_per_frame: int, dim: int) -> float:
    """Operations of [`frame_similarity`] where each norm and each product of adjacent tokens is computed once."""
    return float(2 * dim * tokens_per_frame * (2 * num_frames - 1))


def farthest_points_flops(video: VideoTokens, config) -> float:
    """Products of `merge_farthest_points`: each looked-at frame's tokens with each other, and stage 1's."""
    _, num_looked = token_budget(video, config)
    tokens, dim = video.tokens_per_frame, video.features.shape[-1]
    stage_1 = segmentation_flops(num_looked, tokens, dim) if config.similarity_threshold < 1 else 0.0
    return 2.0 * num_looked * tokens**2 * dim + stage_1
