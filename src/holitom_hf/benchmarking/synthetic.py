"""Videos and features with a chosen redundancy, so that as many tokens stay as of a real video."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch


SCENE_FRAMES = 8


def synthetic_features(
    num_frames: int,
    tokens_per_frame: int,
    dim: int,
    static_share: float = 0.6,
    scene_frames: int = SCENE_FRAMES,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """
    Features of scenes of equal length, in which a share of the tokens repeats (cosine similarity about 0.92).

    Args:
        num_frames: F.
        tokens_per_frame: T.
        dim: D.
        static_share: Share of the tokens that repeat over their scene.
        scene_frames: Frames of a scene.
        seed: Of the random numbers.
        device, dtype: Of the result.

    Returns:
        (F, T, D).
    """
    random = torch.Generator(device).manual_seed(seed)
    features = torch.empty((num_frames, tokens_per_frame, dim), device=device, dtype=dtype)
    features.normal_(generator=random)
    for start in range(0, num_frames, scene_frames):
        chosen = torch.randperm(tokens_per_frame, generator=random, device=device)
        chosen = chosen[: round(static_share * tokens_per_frame)]
        scene = features[start : start + scene_frames]
        scene[1:, chosen] = scene[:1, chosen] + 0.3 * scene[1:, chosen]
    return features


def synthetic_pixels(
    num_frames: int,
    side: int,
    patch_size: int,
    static_share: float = 0.6,
    scene_frames: int = SCENE_FRAMES,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """
    Frames of noise in scenes of equal length, in which a share of the patches repeats to the bit.

    Args:
        num_frames: F.
        side, patch_size: Of the frames and of the vision tower's patches, in pixels.
        static_share: Share of the patches that repeat over their scene.
        scene_frames: Frames of a scene.
        seed: Of the random numbers.
        device, dtype: Of the result.

    Returns:
        (F, 3, side, side).
    """
    random = torch.Generator(device).manual_seed(seed)
    frames = torch.randn((num_frames, 3, side, side), generator=random, device=device, dtype=dtype)
    grid = side // patch_size
    for start in range(0, num_frames, scene_frames):
        chosen = torch.randperm(grid**2, generator=random, device=device) < round(static_share * grid**2)
        is_static = chosen.view(grid, grid).repeat_interleave(patch_size, 0).repeat_interleave(patch_size, 1)
        scene = frames[start : start + scene_frames, :, : grid * patch_size, : grid * patch_size]
        scene[1:] = torch.where(is_static, scene[:1], scene[1:])
    return frames


class SyntheticPooling:
    """
    In place of a model's `apply_pooling`: it pools, and of what becomes the decoder's input gives out chosen features.

    Random weights make features that are all alike; the work before stays what it is.
    """

    def __init__(self, pool: Callable[[torch.Tensor], torch.Tensor], features: torch.Tensor):
        """
        Args:
            pool: The model's own.
            features: (F, T, D), given out frame by frame, from the first again after the last.
        """
        self.pool, self.features, self.frame = pool, features, 0

    def __call__(self, patches: torch.Tensor) -> torch.Tensor:
        """(f, P, E) -> (f, T, E); with E = D the next f frames."""
        pooled = self.pool(patches)
        if pooled.shape[1:] != self.features.shape[1:]:
            return pooled
        frames = [(self.frame + step) % len(self.features) for step in range(len(pooled))]
        self.frame = (self.frame + len(pooled)) % len(self.features)
        first = frames[0]
        if frames == list(range(first, first + len(frames))):
            return self.features[first : first + len(frames)]
        return self.features[frames]


def write_clip(
    path: Path,
    duration: float,
    keyframe_interval: int = 250,
    fps: int = 25,
    size: tuple[int, int] = (1280, 720),
    preset: str = "ultrafast",
) -> None:
    """
    Writes an H.264 clip of a texture that scrolls: neither trivial to encode nor still.

    Args:
        path: File to write.
        duration: Seconds.
        keyframe_interval: Frames between keyframes.
        fps: Frames a second.
        size: Width and height in pixels.
        preset: Of x264. With "ultrafast" every frame is referred to by the next, with most others many by none.
    """
    random = np.random.default_rng(0)
    texture = random.integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    options = {"preset": preset, "crf": "28", "x264-params": "scenecut=0"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.gop_size = keyframe_interval
        for index in range(round(duration * fps)):
            frame = av.VideoFrame.from_ndarray(np.roll(texture, 3 * index, axis=1), format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
