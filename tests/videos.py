"""Real video files, written with PyAV, whose frames say their own number."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np


BITS = 10


def numbered_frame(number: int, width: int = 160, height: int = 64) -> np.ndarray:
    """(H, W, 3) uint8: `number` as black and white stripes, least significant bit first, which survive encoding."""
    picture = np.zeros((height, width, 3), np.uint8)
    for bit in range(BITS):
        if number >> bit & 1:
            picture[:, bit * width // BITS : (bit + 1) * width // BITS] = 255
    return picture


def number_of(frame) -> int:
    """The number on a (3, H, W) frame."""
    columns = np.asarray(frame).astype(float).mean((0, 1))
    width = len(columns)
    return sum(
        int(columns[bit * width // BITS : (bit + 1) * width // BITS].mean() > 128) << bit for bit in range(BITS)
    )


def write_video(
    path: Path,
    num_frames: int = 60,
    fps: int = 25,
    gop: int = 12,
    codec: str = "libx264",
    times: list[int] | None = None,
    size: tuple[int, int] = (160, 64),
    rotation: int = 0,
    container_format: str | None = None,
    container_options: dict | None = None,
    with_audio: bool = False,
    codec_options: dict | None = None,
) -> Path:
    """Writes numbered frames; `times` are their time stamps in frames, for a variable frame rate."""
    with av.open(str(path), "w", format=container_format, options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=fps, options=codec_options or {})
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = gop
        stream.codec_context.time_base = stream.time_base = Fraction(1, fps)
        if rotation:
            stream.set_display_rotation(rotation)
        audio = container.add_stream("aac", rate=16000, layout="mono") if with_audio else None
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number, *size), format="rgb24")
            frame.pts, frame.time_base = times[number] if times else number, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if audio is not None:
            write_silence(container, audio)
    return path


def write_silence(container, stream, num_blocks: int = 20) -> None:
    for block in range(num_blocks):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, block * 1024
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def write_audio(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        write_silence(container, container.add_stream("aac", rate=16000, layout="mono"))
    return path


def join_streams(path: Path, parts: list[Path]) -> Path:
    """Writes the packets of several files behind each other into one MPEG transport stream."""
    with av.open(str(path), "w", format="mpegts") as out:
        stream, offset = None, 0
        for part in parts:
            with av.open(str(part)) as container:
                source = container.streams.video[0]
                stream = stream or out.add_stream_from_template(source)
                end = 0
                for packet in container.demux(source):
                    if packet.dts is None:
                        continue
                    end = max(end, packet.pts + packet.duration)
                    packet.pts, packet.dts, packet.stream = packet.pts + offset, packet.dts + offset, stream
                    out.mux(packet)
                offset += end
    return path
