"""A few frames out of a video file with PyAV, by seeking: the time does not grow with the video's length."""

import base64
import binascii
import bisect
import contextlib
import io
import itertools
import math
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import torch
from av.stream import Disposition
from huggingface_hub import get_session
from transformers.video_utils import VideoMetadata

from .limits import CONTAINERS, LOCAL_LIMITS, VideoLimits


# What can be opened: a path, a URL (http, https or data), the file's bytes, or a binary file object.
VideoFile = str | os.PathLike | bytes | io.IOBase

DOWNLOAD_TIMEOUT = 30.0  # seconds without a byte
SEEK_MARGIN = 64  # frames before the first one that seeking may aim at
SEEK_COST = 12  # frames that are decoded in the time that seeking takes: the decoder's threads start anew
SKIP_MARGIN = 2  # frames around a wanted one that are decoded in any case
MISSING_SHARE = 0.1  # a video that ends this much before its header says is cut off


def is_video_file(video) -> bool:
    """Whether `video` names or holds a file to decode, and not frames."""
    return isinstance(video, (str, os.PathLike, bytes, bytearray)) or hasattr(video, "read")


def read_video(
    video: VideoFile,
    sample_indices: Callable[[VideoMetadata], np.ndarray],
    limits: VideoLimits | None = None,
) -> tuple[torch.Tensor, VideoMetadata]:
    """
    Decodes the frames that `sample_indices` asks for. Whatever the file holds, FFmpeg opens no other.

    Args:
        video: Path, `http(s)` or base64 `data` URL, bytes or binary file object.
        sample_indices: Takes the metadata (number of frames, frames per second, duration in seconds, size), returns
            the indices of the frames to decode, ascending; repeats are allowed.
        limits: What the file may ask for; `None`: [`VideoLimits`] for bytes and URLs, `LOCAL_LIMITS` for paths and
            file objects.

    Returns:
        (F, 3, H, W) uint8, upright as the file's rotation says, and the metadata with `frames_indices`.

    Raises:
        FileNotFoundError: If there is no such file.
        OSError: If a URL can't be read.
        ValueError: If the file is empty, cut off or no video, has no video stream or no frame, or more than
            `limits` allow.
    """
    name = name_of(video)
    if limits is None:
        is_strange = isinstance(video, (bytes, bytearray)) or is_url(video)
        limits = VideoLimits() if is_strange else LOCAL_LIMITS
    source, size = open_source(video, name, limits)
    try:
        limits.check(name, "bytes", size, limits.max_bytes)
        with open(source, "rb") if isinstance(source, str) else contextlib.nullcontext(source) as file:
            limits.check_header(name, file, size)
            file.seek(0)
        with _open_container(source, limits) as container:
            reader = _VideoReader(container, source, size, name, limits)
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
            reader.container.close()
    except av.error.FFmpegError as error:
        raise ValueError(
            f"{name} can't be read as a video: it is no video file, cut off or damaged, its container is not one of "
            f"those that are read, or its frames have more than {limits.max_pixels} pixels ({error.strerror})"
        ) from error
    finally:
        if source is not video and hasattr(source, "close"):
            source.close()
    metadata.frames_indices = indices
    return frames, metadata


class _VideoReader:
    """
    One video stream, its frames addressed by index.

    Each frame has a stamp that grows from one to the next, and `stamps` lists them for all frames:

    - Where the container lists its frames (MP4, AVI) at even intervals: their presentation times.
    - Where it lists them at uneven intervals, or knows no presentation times (AVI): their numbers, counted on from the
      keyframe at which decoding started.
    - Elsewhere (Matroska, MPEG-TS, fragmented MP4): presentation times, evenly spaced between the first and the last
      frame, which are decoded to find them. What a header says of the number of frames is not believed.
    - Without presentation times at all (a bare H.264 stream): the numbers, from the start.
    """

    def __init__(self, container, source, size: int, name: str, limits: VideoLimits):
        self.container, self.source, self.name, self.limits = container, source, name, limits
        self.num_decoded, self.deadline = 0, time.monotonic() + limits.max_seconds
        # A cover picture is a video stream, too.
        streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
        if not streams:
            kinds = sorted({stream.type for stream in container.streams}) or ["nothing"]
            raise ValueError(f"{name} has no video stream, only {', '.join(kinds)}: pass a file with moving pictures")
        if streams[0].codec_context is None:
            raise ValueError(f"{name} has a codec that is not known: re-encode it")
        self._take_stream(streams[0])
        self._check_size(self.stream)
        num_claimed = max(self.stream.frames, len(self.stream.index_entries))
        limits.check(name, "frames by its header", num_claimed, limits.max_frames)
        self.rate = self.stream.average_rate or self.stream.guessed_rate or self.stream.base_rate or 25
        self.period = max(1, round(1 / (self.rate * self.stream.time_base)))  # of one frame, in stamps
        self.is_counted = False
        self.starts: dict[int, int] | None = None  # stamps at which decoding can start, and where to seek for them
        self.seek_distance = 2 * self.period  # without `starts`: what seeking has to save to be tried
        self.seek_margin = 0  # without `starts`: how far before a frame seeking must aim
        self.wanted: list[int] | None = None  # stamps of the frames that will be asked for, ascending

        self.decoder = self._decode()
        self.stamp, self.frame = next(self.decoder, (None, None))
        if self.frame is None:
            raise ValueError(f"{name} has no frame that can be decoded: it is empty, cut off or damaged")
        self._check_whole(size)
        index = sorted(self.stream.index_entries, key=lambda entry: entry.timestamp)
        if self.stamp is None:
            self.is_counted, self.period = True, 1
            self.num_frames = 1 + sum(1 for _ in self.decoder)
            self.stamps = list(range(self.num_frames))
            self._reopen()
        # A count of 0 means that the index covers only what was read so far (fragmented MP4, Matroska).
        elif self.stream.frames > 0 and len(index) > 1:
            self._address_by_index(index)
        else:
            self.stamps = self._evenly_spaced_stamps()
        self.first, self.num_frames = self.stamps[0], len(self.stamps)

    def frames_at(self, indices: np.ndarray) -> torch.Tensor:
        """(F, 3, H, W) uint8."""
        size = self.frame.width * self.frame.height * 3
        self.limits.check(self.name, "bytes in the frames asked for", len(indices) * size, self.limits.max_memory)
        distinct = sorted(set(indices.tolist()))
        self.wanted = [self.stamps[index] for index in distinct]
        pictures = {index: _picture(self._frame_at(self.stamps[index])) for index in distinct}
        shapes = {tuple(picture.shape[:2]) for picture in pictures.values()}
        if len(shapes) > 1:
            raise ValueError(f"{self.name} changes its size between frames ({shapes}): re-encode it to one size")
        # Colours last in memory, as they come out of the decoder: torchvision resizes that faster, too.
        return torch.stack([pictures[index] for index in indices.tolist()]).permute(0, 3, 1, 2)

    def _address_by_index(self, index: list) -> None:
        times = [entry.timestamp for entry in index]
        is_avi = self.container.format.name == "avi"
        is_even = all(b - a == times[1] - times[0] for a, b in itertools.pairwise(times))
        # The index holds decoding times, which run ahead of presentation by as many frames as are reordered.
        ahead = 0 if is_avi else bisect.bisect_left(times, self.stamp)
        if is_even and not is_avi:
            self.stamps = [time + self.stamp - times[0] for time in times]
        else:
            self.is_counted, self.period, self.stamp = True, 1, 0
            self.stamps = list(range(len(index)))
        self.starts = {
            self.stamps[number]: times[min(number + ahead, len(times) - 1)]
            for number, entry in enumerate(index)
            if entry.is_keyframe
        }

    def _frame_at(self, stamp: int) -> av.VideoFrame:
        """The frame of a stamp, or the one that is shown then."""
        slack = self.period // 2
        if self._is_worth_seeking(stamp, slack):
            self._seek(stamp)
        while self.stamp < stamp - slack:
            before = self.frame
            following = next(self.decoder, None)
            if following is None:
                self._check_end(self.stamp, stamp)
                break
            self.stamp, self.frame = following
            if self.stamp > stamp + slack:
                return before
        return self.frame

    def _is_worth_seeking(self, stamp: int, slack: int) -> bool:
        """Whether decoding can start so far ahead of here that it pays; else going on is never slower."""
        if stamp < self.stamp - slack:
            return True
        if self.starts is not None:
            start = self._start_before(stamp)
            return start is not None and start > self.stamp + SEEK_COST * self.period
        return not self.is_counted and stamp - self.stamp > self.seek_distance

    def _start_before(self, stamp: int) -> int | None:
        place = bisect.bisect_right(list(self.starts), stamp + self.period // 2)
        return list(self.starts)[place - 1] if place else None

    def _seek(self, stamp: int) -> None:
        """Starts to decode at the last keyframe before a stamp."""
        if self.is_counted and self.starts is None:
            self._reopen()
        elif self.is_counted:
            start = self._start_before(stamp)
            self.container.seek(self.starts[start], stream=self.stream, backward=True)
            self._restart(start)
        else:
            self._seek_time(stamp)

    def _seek_time(self, time: int) -> None:
        was_at, first = self.stamp, getattr(self, "first", self.stamp)
        while True:
            aim = time - self.seek_margin
            # Not before the start, nor behind the end: some containers take that for an error.
            with contextlib.suppress(av.error.PermissionError, av.error.EOFError):
                self.container.seek(aim, stream=self.stream, backward=True)
                self._restart()
                if self.frame is not None and self.stamp <= max(time, first) + self.period // 2:
                    break
            # An MPEG transport stream lands on the keyframe behind, any container behind its last one.
            if aim < first - SEEK_MARGIN * self.period:
                self._reopen()
                break
            self.seek_margin = max(4 * self.period, 4 * self.seek_margin)
        if self.stamp <= was_at < time:
            # Came out before the place it left: keyframes are further apart than this.
            self.seek_distance = max(self.seek_distance, 2 * (time - self.stamp))

    def _restart(self, count_from: int = 0) -> None:
        self.decoder = self._decode(count_from)
        self.stamp, self.frame = next(self.decoder, (None, None))

    def _reopen(self) -> None:
        """Starts over, in containers that can't even seek to their start."""
        index = self.stream.index
        self.container.close()
        if hasattr(self.source, "seek"):
            self.source.seek(0)
        self.container = _open_container(self.source, self.limits)
        self._take_stream(self.container.streams[index])
        self._restart()

    def _take_stream(self, stream) -> None:
        self.stream = stream
        stream.thread_type = "AUTO"
        # A frame may be larger than the header says.
        stream.codec_context.options = _codec_options(self.limits)

    def _decode(self, count_from: int = 0):
        """Stamps and frames from where the container stands; broken data ends the video."""
        number = count_from
        try:
            for packet in self.container.demux(self.stream):
                self.stream.codec_context.skip_frame = "NONREF" if self._is_skippable(packet.pts) else "DEFAULT"
                for frame in packet.decode():
                    self._check_size(frame)
                    self._check_work()
                    yield number if self.is_counted else frame.pts, frame
                    number += 1
        except (av.error.EOFError, av.error.InvalidDataError):
            return

    def _check_size(self, picture) -> None:
        self.limits.check(self.name, "pixels in a frame", picture.width * picture.height, self.limits.max_pixels)

    def _check_work(self) -> None:
        self.num_decoded += 1
        self.limits.check(self.name, "frames to decode", self.num_decoded, self.limits.max_frames)
        if time.monotonic() > self.deadline:
            raise ValueError(f"{self.name} takes more than {self.limits.max_seconds:.0f} s to decode")

    def _is_skippable(self, stamp: int | None) -> bool:
        """Whether a frame is far from all wanted ones, where frames have stamps: it is decoded only for others."""
        if self.wanted is None or self.starts is None or self.is_counted or stamp is None:
            return False
        place = bisect.bisect_left(self.wanted, stamp - SKIP_MARGIN * self.period)
        return place == len(self.wanted) or self.wanted[place] > stamp + SKIP_MARGIN * self.period

    def _evenly_spaced_stamps(self) -> list[int]:
        """Stamps of the frames between the first and the last, which are the only ones that are looked at."""
        first = self.stamp
        claimed = self.stream.duration
        if claimed is None and self.container.duration:
            claimed = int(self.container.duration / av.time_base / self.stream.time_base)
        self.first = first
        if claimed:
            self._seek(first + claimed)
        last = max([self.stamp, *(stamp for stamp, _ in self.decoder)])
        if claimed:
            self._check_end(last + self.period, first + claimed)
        self._seek(first)
        count = round((last - first) * self.stream.time_base * self.rate) + 1
        self.limits.check(self.name, "frames by its time stamps", count, self.limits.max_frames)
        return np.linspace(first, last, count).round().astype(int).tolist()

    def _check_whole(self, size: int | None) -> None:
        """Raises a `ValueError` if the container says that there is more than the file holds."""
        end = max((entry.pos + entry.size for entry in self.stream.index_entries), default=0)
        if self.container.format.name == "avi":
            end = _riff_size(self.source)
        if size is not None and end > size:
            raise ValueError(f"{self.name} is cut off: it lists frames beyond its end. Copy or download it again")

    def _check_end(self, last: int, expected: int) -> None:
        """Raises a `ValueError` if the video ends at a stamp much before the expected one."""
        if last - self.first < (1 - MISSING_SHARE) * (expected - self.first) - 2 * self.period:
            share = (last - self.first) / (expected - self.first)
            raise ValueError(
                f"{self.name} is cut off: its frames end at {share:.0%} of its length. Copy or download it again"
            )


def _open_container(source: str | io.IOBase, limits: VideoLimits):
    """Opens a path or a file object, and takes care that it can't have FFmpeg open another."""
    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"} | _codec_options(limits)
    return av.open(f"file:{source}" if isinstance(source, str) else source, options=options)


def _codec_options(limits: VideoLimits) -> dict[str, str]:
    return {"max_pixels": str(limits.max_pixels * 9 // 8 + 2**20)}  # FFmpeg counts what it rounds widths up to


def _riff_size(source: str | io.IOBase) -> int:
    """Size of an AVI file by its own account."""
    if isinstance(source, str):
        with open(source, "rb") as file:
            head = file.read(8)
    else:
        position = source.tell()
        source.seek(0)
        head = source.read(8)
        source.seek(position)
    return int.from_bytes(head[4:8], "little") + 8


def _picture(frame: av.VideoFrame) -> torch.Tensor:
    """(H, W, 3) uint8, upright."""
    picture = torch.from_numpy(frame.to_ndarray(format="rgb24"))
    quarters = round(frame.rotation / 90) % 4  # counterclockwise, as torch's
    return torch.rot90(picture, quarters, dims=(0, 1)) if quarters else picture


def is_url(video: VideoFile) -> bool:
    """Whether a file is named by its address."""
    return isinstance(video, str) and video.startswith(("http://", "https://", "data:"))


def name_of(video: VideoFile) -> str:
    """What errors call a file."""
    if isinstance(video, str) and video.startswith("data:"):
        return "the file passed as a data URL"
    if isinstance(video, (str, os.PathLike)):
        return repr(os.fspath(video))
    return repr(video.name) if isinstance(getattr(video, "name", None), str) else "the file passed as bytes"


def open_source(video: VideoFile, name: str, limits: VideoLimits, kind: str = "video") -> tuple[str | io.IOBase, int]:
    """
    What PyAV or Pillow opens, a path or a file object, and its size in bytes.

    Args:
        video: The file.
        name: What errors call it.
        limits: Of its bytes, if they must be taken to know how many there are.
        kind: What it should be.

    Raises:
        FileNotFoundError: If there is no such file.
        OSError: If a URL can't be read.
        ValueError: If it is empty, or holds more bytes than `limits` allow.
    """
    if isinstance(video, str) and video.startswith("data:"):
        video = decode_data_url(video)
    if isinstance(video, (bytes, bytearray)):
        video = io.BytesIO(video)
    elif is_url(video):
        video = _download(video, limits)
    elif isinstance(video, (str, os.PathLike)):
        path = Path(video)
        if path.is_dir():
            raise ValueError(f"{name} is a folder: pass a {kind} file")
        if not path.exists():
            raise FileNotFoundError(f"there is no {kind} file {name}")
        size = path.stat().st_size
        if size == 0:
            raise ValueError(f"{name} is empty (0 bytes)")
        return str(path), size
    if not video.seekable():
        # Not more than what is allowed, and one byte that tells.
        video = io.BytesIO(video.read(-1 if math.isinf(limits.max_bytes) else int(limits.max_bytes) + 1))
    size = video.seek(0, os.SEEK_END)
    video.seek(0)
    if size == 0:
        raise ValueError(f"{name} is empty (0 bytes)")
    return video, size


def decode_data_url(url: str) -> bytes:
    """What stands in `data:video/mp4;base64,...`."""
    head, comma, content = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ValueError("a data URL must look like data:video/mp4;base64,...")
    try:
        return base64.b64decode(content, validate=True)
    except binascii.Error as error:
        raise ValueError(f"a data URL is no base64: {error}") from error


def _download(url: str, limits: VideoLimits) -> io.IOBase:
    """A temporary file with what a URL holds."""
    file = tempfile.TemporaryFile()  # noqa: SIM115 (closed by the reader)
    deadline = time.monotonic() + limits.max_seconds
    # Not compressed: a few bytes could become any number.
    options = {"follow_redirects": True, "timeout": DOWNLOAD_TIMEOUT, "headers": {"Accept-Encoding": "identity"}}
    try:
        with get_session().stream("GET", url, **options) as response:
            response.raise_for_status()
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise ValueError("it comes compressed, though it was asked for as it is")
            for chunk in response.iter_raw():
                file.write(chunk)
                limits.check("it", "bytes or more", file.tell(), limits.max_bytes)
                if time.monotonic() > deadline:
                    raise ValueError(f"it takes more than {limits.max_seconds:.0f} s")
    except Exception as error:
        file.close()
        raise OSError(f"the file at {url!r} can't be downloaded: {' '.join(str(error).split())}") from error
    file.seek(0)
    return file
