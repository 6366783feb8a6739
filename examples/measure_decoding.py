"""
How long 32 frames of H.264 clips of 10 seconds, 1 minute and 10 minutes take: as holitom-hf reads them, by decoding
every frame, and with torchcodec and decord where they are installed.

    python examples/measure_decoding.py [--runs 5] [--seconds 10 60 600]

Writes clips of 1280x720 at 25 frames a second into a temporary folder: a keyframe every 250 frames with and without
frames that no other refers to (x264's presets veryfast and ultrafast), and one file with a single keyframe. Prints
medians.
"""

import argparse
import importlib.util
import tempfile
from functools import partial
from pathlib import Path

import av
import numpy as np
import torch

from holitom_hf.benchmarking.measuring import Spread, alternate
from holitom_hf.benchmarking.synthetic import write_clip
from holitom_hf.video.decoding import read_video


NUM_FRAMES = 32


def uniform(metadata) -> np.ndarray:
    return np.linspace(0, metadata.total_num_frames - 1, NUM_FRAMES, dtype=int)


def decode_everything(path: Path) -> np.ndarray:
    """The plain way: every frame is decoded, 32 are kept."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        wanted = set(np.linspace(0, stream.frames - 1, NUM_FRAMES, dtype=int).tolist())
        return np.stack(
            [frame.to_ndarray(format="rgb24") for i, frame in enumerate(container.decode(stream)) if i in wanted]
        )


def with_torchcodec(path: Path) -> torch.Tensor:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(str(path), seek_mode="approximate", num_ffmpeg_threads=0)
    return decoder.get_frames_at(np.linspace(0, len(decoder) - 1, NUM_FRAMES, dtype=int).tolist()).data


def with_decord(path: Path) -> np.ndarray:
    import decord

    reader = decord.VideoReader(str(path))
    return reader.get_batch(np.linspace(0, len(reader) - 1, NUM_FRAMES, dtype=int).tolist()).asnumpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seconds", type=float, nargs="+", default=[10, 60, 600], help="lengths of the clips")
    arguments = parser.parse_args()
    readers = {"holitom-hf": lambda path: read_video(path, uniform), "every frame": decode_everything}
    for name, reader in (("torchcodec", with_torchcodec), ("decord", with_decord)):
        if importlib.util.find_spec(name):
            readers[name] = reader
    clips = [(seconds, 250, preset) for seconds in arguments.seconds for preset in ("veryfast", "ultrafast")]
    clips.append((sorted(arguments.seconds)[len(arguments.seconds) // 2], 10**6, "veryfast"))
    print("| clip | keyframe every | preset | " + " | ".join(readers) + " |")
    print("| --- | --- | --- |" + " ---: |" * len(readers))
    with tempfile.TemporaryDirectory() as folder:
        for seconds, interval, preset in clips:
            path = Path(folder) / "clip.mp4"
            write_clip(path, seconds, interval, preset=preset)
            calls = {name: partial(reader, path) for name, reader in readers.items()}
            times = alternate(calls, torch.device("cpu"), arguments.runs)
            medians = " | ".join(f"{Spread.of(values).median:.2f} s" for values in times.values())
            every = f"{interval / 25:.0f} s" if interval < seconds * 25 else "only the first"
            print(f"| {seconds:.0f} s | {every} | {preset} | {medians} |", flush=True)


if __name__ == "__main__":
    main()
