"""Frames into video files."""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


@dataclass(frozen=True)
class Encoding:
    """An encoder of FFmpeg's with its options, and the suffix of files that may hold what it writes."""

    encoder: str
    options: dict[str, str]
    suffix: str = ".mp4"


ENCODINGS = {
    "h264": Encoding("libx264", {"crf": "18"}),
    "h264-low": Encoding("libx264", {"crf": "32"}),
    "h265": Encoding("libx265", {"crf": "28", "x265-params": "log-level=none"}),
    "vp9": Encoding("libvpx-vp9", {"crf": "36", "b:v": "0", "deadline": "realtime", "cpu-used": "8"}, ".webm"),
}


def write_video(path: Path, frames: np.ndarray, fps: int = 8, encoding: str = "h264") -> None:
    """
    Writes a video file.

    Args:
        path: File to write.
        frames: (F, H, W, 3) uint8.
        fps: Frames per second.
        encoding: A name of [`ENCODINGS`].
    """
    with av.open(str(path), "w") as container:
        stream = container.add_stream(ENCODINGS[encoding].encoder, rate=fps, options=ENCODINGS[encoding].options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for index, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
