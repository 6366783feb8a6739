"""A few frames out of a video file with PyAV, by seeking: the time does not grow with the video's length."""

import bisect
import io
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import torch
from av.stream import Disposition
from huggingface_hub import get_session
from transformers.video_utils import VideoMetadata


# What can be opened: a path, a URL, the file's bytes, or a binary file object.
VideoFile = str | os.PathLike | bytes | io.IOBase

DOWNLOAD_TIMEOUT = 30.0  # seconds without a byte
SEEK_MARGIN = 64  # frames before the first one that seeking may aim at
MISSING_SHARE = 0.1  # a video that ends this much before its header says is cut off


def is_video_file(video) -> bool:
    """Whether `video` names or holds a file to decode, and not frames."""
    return isinstance(video, (str, os.PathLike, bytes, bytearray)) or hasattr(video, "read")


def read_video(
    video: VideoFile, sample_indices: Callable[[VideoMetadata], np.ndarray]
) -> tuple[torch.Tensor, VideoMetadata]:
    """
    Decodes the frames that `sample_indices` asks for.

    Args:
        video: Path, `http(s)` URL, bytes or binary file object.
        sample_indices: Takes the metadata (number of frames, frames per second, duration in seconds, size), returns
            the indices of the frames to decode, ascending; repeats are allowed.

    Returns:
        (F, 3, H, W) uint8, upright as the file's rotation says, and the metadata with `frames_indices`.

    Raises:
        FileNotFoundError: If there is no such file.
        OSError: If a URL can't be read.
        ValueError: If the file is empty, cut off or no video, has no video stream or no frame.
    """
    name = _name_of(video)
    source, size = _open_source(video, name)
    try:
        with av.open(source) as container:
            reader = _VideoReader(container, size, name)
            metadata = VideoMetadata(
                total_num_frames=reader.num_frames,
                fps=float(reader.rate),
                width=reader.stream.width,
                height=reader.stream.height,
                duration=reader.num_frames / float(reader.rate),
                video_backend="pyav",
            )
            indices = np.asarray(sample_indices(metadata), dtype=int)
            frames = reader.frames_at(indices)
    except av.error.FFmpegError as error:
        raise ValueError(
            f"{name} can't be read as a video: it is no video file, cut off or damaged ({error.strerror})"
        ) from error
    finally:
        if source is not video and hasattr(source, "close"):
            source.close()
    metadata.frames_indices = indices
    return frames, metadata


class _VideoReader:
    """
    One video stream, its frames addressed by index.

    Frames are told apart by their time stamps. Where the container lists every frame (MP4, AVI), the list says how
    many there are, when each is shown and where decoding can start. Elsewhere the first and the last frame are
    decoded, and the frames between them are taken to be evenly spaced: what a header says of their number is not
    believed. A stream without time stamps is decoded from the start and counted.
    """

    def __init__(self, container, size: int | None, name: str):
        self.container, self.name = container, name
        # A cover picture is a video stream, too.
        streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
        if not streams:
            kinds = sorted({stream.type for stream in container.streams}) or ["nothing"]
            raise ValueError(f"{name} has no video stream, only {', '.join(kinds)}: pass a file with moving pictures")
        self.stream = streams[0]
        self.stream.thread_type = "AUTO"
        self.rate = self.stream.average_rate or self.stream.guessed_rate or self.stream.base_rate or 25
        self.period = max(1, round(1 / (self.rate * self.stream.time_base)))  # of one frame, in time stamps
        self.seek_distance = 2 * self.period  # without a list of keyframes: what seeking has to save to be tried
        self.seek_margin = 0  # how far before a frame seeking must aim in this container
        self.keyframes = None

        self.decoder = self._decode()
        self.current = next(self.decoder, None)
        if self.current is None:
            raise ValueError(f"{name} has no frame that can be decoded: it is empty, cut off or damaged")
        self.first = self.current.pts
        index = list(self.stream.index_entries)
        if size is not None and index and max(entry.pos + entry.size for entry in index) > size:
            raise ValueError(f"{name} is cut off: its index lists frames beyond its end. Copy or download it again")
        if self.first is None:
            self.times = None
            self.num_frames = 1 + sum(1 for _ in self.decoder)
            return
        # A count of 0 means that the index covers only what was read so far (fragmented MP4, Matroska).
        if self.stream.frames > 0 and len(index) > 1:
            stamps = sorted(entry.timestamp for entry in index)
            self.times = [self.first + stamp - stamps[0] for stamp in stamps]
            self.keyframes = sorted(self.first + entry.timestamp - stamps[0] for entry in index if entry.is_keyframe)
        else:
            self.times = self._evenly_spaced_times()
        self.num_frames = len(self.times)

    def frames_at(self, indices: np.ndarray) -> torch.Tensor:
        """(F, 3, H, W) uint8."""
        wanted = sorted(set(indices.tolist()))
        if self.times is None:
            self.container.seek(0)
            counted = zip(range(self.num_frames), self._decode())
            pictures = {index: _picture(frame) for index, frame in counted if index in wanted}
        else:
            pictures = {index: _picture(self._frame_at(self.times[index])) for index in wanted}
        shapes = {tuple(picture.shape[1:]) for picture in pictures.values()}
        if len(shapes) > 1:
            raise ValueError(f"{self.name} changes its size between frames ({shapes}): re-encode it to one size")
        return torch.stack([pictures[index] for index in indices.tolist()])

    def _frame_at(self, time: int):
        """The frame that is shown at a time stamp."""
        slack = self.period // 2
        if self._is_worth_seeking(time, slack):
            self._seek(time)
        while self.current.pts < time - slack:
            frame = next(self.decoder, None)
            if frame is None:
                self._check_end(self.current.pts, time)
                break
            before, self.current = self.current, frame
            if frame.pts > time + slack:
                return before
        return self.current

    def _is_worth_seeking(self, time: int, slack: int) -> bool:
        """Whether decoding can start between here and there; else going on is never slower."""
        position = self.current.pts
        if time < position - slack:
            return True
        if self.keyframes is not None:
            place = bisect.bisect_right(self.keyframes, time)
            return place > 0 and self.keyframes[place - 1] > position
        return time - position > self.seek_distance

    def _seek(self, time: int) -> None:
        """Starts to decode at the last keyframe before a time stamp."""
        was_at = self.current.pts
        while True:
            aim = time - self.seek_margin
            self.container.seek(aim, stream=self.stream, backward=True)
            self.decoder = self._decode()
            frame = next(self.decoder, None)
            if frame is not None and frame.pts <= max(time, self.first) + self.period // 2:
                break
            # An MPEG transport stream lands on the keyframe behind, any container behind its last one.
            if aim < self.first - SEEK_MARGIN * self.period:
                raise ValueError(f"{self.name} can't be decoded from its start a second time: it is damaged")
            self.seek_margin = max(4 * self.period, 4 * self.seek_margin)
        self.current = frame
        if frame.pts <= was_at < time:
            # Came out before the place it left: keyframes are further apart than this.
            self.seek_distance = max(self.seek_distance, 2 * (time - frame.pts))

    def _decode(self):
        """Frames from where the container stands; broken data ends the video."""
        start = 0
        try:
            for count, frame in enumerate(self.container.decode(self.stream)):
                # AVI knows no presentation times: all but the keyframes' are guesses, and in disorder.
                if self.container.format.name == "avi" and frame.pts is not None:
                    start = frame.pts if count == 0 else start
                    frame.pts = start + count * self.period
                yield frame
        except (av.error.EOFError, av.error.InvalidDataError):
            return

    def _evenly_spaced_times(self) -> list[int]:
        """Time stamps of the frames between the first and the last, which are the only ones that are looked at."""
        claimed = self.stream.duration
        if claimed is None and self.container.duration:
            claimed = int(self.container.duration / av.time_base / self.stream.time_base)
        if claimed:
            self._seek(self.first + claimed)
        last = self.current.pts
        for frame in self.decoder:
            last = max(last, frame.pts)
        if claimed:
            self._check_end(last + self.period, self.first + claimed)
        self._seek(self.first)
        count = round((last - self.first) * self.stream.time_base * self.rate) + 1
        return np.linspace(self.first, last, count).round().astype(int).tolist()

    def _check_end(self, last: int, expected: int) -> None:
        """Raises a `ValueError` if the video ends at a time stamp much before the expected one."""
        if last - self.first < (1 - MISSING_SHARE) * (expected - self.first) - 2 * self.period:
            seconds = [float((time - self.first) * self.stream.time_base) for time in (expected, last)]
            raise ValueError(
                f"{self.name} is cut off: it should last {seconds[0]:.1f} s, but its frames end after "
                f"{seconds[1]:.1f} s. Copy or download it again"
            )


def _picture(frame: av.VideoFrame) -> torch.Tensor:
    """(3, H, W) uint8, upright."""
    picture = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
    return torch.rot90(picture, round(frame.rotation / 90) % 4, dims=(1, 2))  # counterclockwise, both


def _name_of(video: VideoFile) -> str:
    if isinstance(video, (str, os.PathLike)):
        return repr(os.fspath(video))
    return repr(video.name) if isinstance(getattr(video, "name", None), str) else "the video passed as bytes"


def _open_source(video: VideoFile, name: str) -> tuple[str | io.IOBase, int | None]:
    """What PyAV opens, and its size in bytes where it is known."""
    if isinstance(video, (bytes, bytearray)):
        video = io.BytesIO(video)
    elif isinstance(video, str) and video.startswith(("http://", "https://")):
        video = _download(video)
    elif isinstance(video, (str, os.PathLike)):
        path = Path(video)
        if path.is_dir():
            raise ValueError(f"{name} is a folder: pass a video file")
        if not path.exists():
            raise FileNotFoundError(f"there is no video file {name}")
        size = path.stat().st_size
        if size == 0:
            raise ValueError(f"{name} is empty (0 bytes)")
        return str(path), size
    if not video.seekable():
        video = io.BytesIO(video.read())
    size = video.seek(0, os.SEEK_END)
    video.seek(0)
    if size == 0:
        raise ValueError(f"{name} is empty (0 bytes)")
    return video, size


def _download(url: str) -> io.IOBase:
    """A temporary file with what a URL holds."""
    file = tempfile.TemporaryFile()  # noqa: SIM115 (closed by the reader)
    try:
        with get_session().stream("GET", url, follow_redirects=True, timeout=DOWNLOAD_TIMEOUT) as response:
            response.raise_for_status()
            for chunk in response.iter_bytes():
                file.write(chunk)
    except Exception as error:
        file.close()
        raise OSError(f"the video at {url!r} can't be downloaded: {error}") from error
    file.seek(0)
    return file
