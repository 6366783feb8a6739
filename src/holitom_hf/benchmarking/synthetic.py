"""Videos and features with a chosen redundancy, so that as many tokens stay as of a real video."""

import functools
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
    size: tuple[int, int],
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
        size: Height and width of the frames, in pixels.
        patch_size: Side of what repeats as a whole, in pixels.
        static_share: Share of the patches that repeat over their scene.
        scene_frames: Frames of a scene.
        seed: Of the random numbers.
        device, dtype: Of the result.

    Returns:
        (F, 3, H, W).
    """
    random = torch.Generator(device).manual_seed(seed)
    frames = torch.randn((num_frames, 3, *size), generator=random, device=device, dtype=dtype)
    rows, columns = (side // patch_size for side in size)
    for start in range(0, num_frames, scene_frames):
        order = torch.randperm(rows * columns, generator=random, device=device)
        chosen = (order < round(static_share * rows * columns)).view(rows, columns)
        is_static = chosen.repeat_interleave(patch_size, 0).repeat_interleave(patch_size, 1)
        scene = frames[start : start + scene_frames, :, : rows * patch_size, : columns * patch_size]
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


class SyntheticFeatures:
    """In place of a model's `get_video_features`, where videos have grids: of what the decoder gets, chosen ones."""

    def __init__(self, encode: Callable, features: torch.Tensor):
        """
        Args:
            encode: The model's own.
            features: (V, N, D), given out from the first video on in every call, again from it after the last.
        """
        functools.update_wrapper(self, encode)  # `generate` reads there which arguments are its own
        self.encode, self.features = encode, features

    def __call__(self, *args, **kwargs):
        """What the model's own returns, with other features; the work before stays what it is."""
        output = self.encode(*args, **kwargs)
        videos = range(len(output.pooler_output))
        output.pooler_output = [self.features[video % len(self.features)] for video in videos]
        return output


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
