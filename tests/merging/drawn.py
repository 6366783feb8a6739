"""Videos that methods are tested on."""

import torch


def draw_video(
    num_frames: int, tokens_per_frame: int, dim: int = 16, num_scenes: int = 2, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (F, T, D) of a few scenes, in which half of the places hardly change, and importance (F, T)."""
    random = torch.Generator().manual_seed(seed)
    scenes = torch.randn(num_scenes, tokens_per_frame, dim, generator=random)
    noise = torch.randn(num_frames, tokens_per_frame, dim, generator=random)
    noise *= 0.5 * torch.rand(tokens_per_frame, 1, generator=random)
    noise[:, ::2] *= 0.1
    scene = torch.arange(num_frames) * num_scenes // num_frames
    return scenes[scene] + noise, torch.rand(num_frames, tokens_per_frame, generator=random) + 0.1
