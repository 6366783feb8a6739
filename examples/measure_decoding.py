"""
How long 32 frames of a 10-second, a 1-minute and a 10-minute clip take, by seeking and by decoding every frame.

    python examples/measure_decoding.py [--runs 5] [--keyframes 250]

Writes H.264 clips of 1280x720 at 25 frames a second into a temporary folder and prints medians.
"""

import argparse
import statistics
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from holitom_hf.video_decoding import read_video


def write_clip(path: Path, seconds: int, keyframes: int, fps: int = 25, size: tuple[int, int] = (1280, 720)) -> None:
    """A texture that scrolls, with noise: neither trivial to encode nor still."""
    random = np.random.default_rng(0)
    texture = random.integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    options = {"preset": "ultrafast", "crf": "28", "x264-params": "scenecut=0"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.gop_size = keyframes
        for index in range(seconds * fps):
            frame = av.VideoFrame.from_ndarray(np.roll(texture, 3 * index, axis=1), format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def uniform(metadata) -> np.ndarray:
    return np.linspace(0, metadata.total_num_frames - 1, 32, dtype=int)


def decode_everything(path: Path) -> np.ndarray:
    """The plain way: every frame is decoded, 32 are kept."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        wanted = set(np.linspace(0, stream.frames - 1, 32, dtype=int).tolist())
        return np.stack(
            [frame.to_ndarray(format="rgb24") for i, frame in enumerate(container.decode(stream)) if i in wanted]
        )


def median_seconds(function, runs: int) -> float:
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--keyframes", type=int, default=250, help="frames between two keyframes")
    arguments = parser.parse_args()
    print("| clip | by seeking | every frame |")
    print("| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for seconds in (10, 60, 600):
            path = Path(folder) / f"{seconds}.mp4"
            write_clip(path, seconds, arguments.keyframes)
            seeking = median_seconds(lambda path=path: read_video(path, uniform), arguments.runs)
            plain = median_seconds(lambda path=path: decode_everything(path), min(2, arguments.runs))
            print(f"| {seconds} s | {seeking:.2f} s | {plain:.2f} s |", flush=True)


if __name__ == "__main__":
    main()
