"""Files and addresses that a stranger may send: what they can't make the reader do."""

import base64
import contextlib
import gzip
import os
import resource
import socket
import struct
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import av
import numpy as np
import pytest

from holitom_hf.video.decoding import read_video
from holitom_hf.video.limits import CONTAINERS, VideoLimits

from ..videos import join_streams, write_video


SECRET = "TheSecretInAFile"


def uniform(num_frames):
    return lambda metadata: np.linspace(0, metadata.total_num_frames - 1, num_frames, dtype=int)


def every_frame(metadata):
    return np.arange(metadata.total_num_frames)


@contextlib.contextmanager
def inside(folder):
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def lists_of_files(folder) -> dict[str, bytes]:
    """Texts by which FFmpeg opens another file, `clip.ts` of a folder."""
    clip, port = folder / "clip.ts", free_port()
    manifest = (
        '<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration="PT2S"><Period>'
        f'<AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1"><BaseURL>{clip}</BaseURL>'
        "</Representation></AdaptationSet></Period></MPD>"
    )
    texts = {
        "m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:2,\n{clip}\n#EXT-X-ENDLIST\n",
        "ffconcat": "ffconcat version 1.0\nfile clip.ts\n",
        "sdp": f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video {port} RTP/AVP 96\n"
        "a=rtpmap:96 H264/90000\n",
        "mpd": manifest,
        "txt": f"{SECRET}\n" * 40,
        "nfo": f"{SECRET}\n" * 40,
        "srt": f"1\n00:00:01,000 --> 00:00:02,000\n{SECRET}\n",
        "ffmetadata": ";FFMETADATA1\ntitle=x\n",
    }
    return {kind: text.encode() for kind, text in texts.items()}


KINDS = ["m3u8", "ffconcat", "sdp", "mpd", "txt", "nfo", "srt", "ffmetadata"]


@pytest.mark.parametrize("how", ["path", "bytes", "file", "data"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_list_of_files_or_a_text_is_no_video(tmp_path, kind, how):
    write_video(tmp_path / "clip.ts", 20)
    content = lists_of_files(tmp_path)[kind]
    path = tmp_path / f"list.{kind}"
    path.write_bytes(content)
    with inside(tmp_path), path.open("rb") as file:
        video = {
            "path": path.name,
            "bytes": content,
            "file": file,
            "data": "data:video/mp4;base64," + base64.b64encode(content).decode(),
        }[how]
        start = time.monotonic()
        with pytest.raises(ValueError, match="can't be read as a video"):
            read_video(video, every_frame)
    assert time.monotonic() - start < 5


def test_an_uploaded_sdp_opens_no_socket(tmp_path):
    port = free_port()
    content = lists_of_files(tmp_path)["sdp"].replace(b"video ", b"video %d RTP/AVP 96\nm=video " % port, 1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        # While the reader is at it, the port must stay free for others.
        done = threading.Event()
        failures = []

        def watch():
            while not done.is_set():
                try:
                    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                        probe.bind(("127.0.0.1", port))
                except OSError as error:
                    failures.append(error)
                time.sleep(0.001)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            with pytest.raises(ValueError, match="can't be read"):
                read_video(content, every_frame)
        finally:
            done.set()
            watcher.join()
        assert failures == []
        taken.bind(("127.0.0.1", port))


def test_pictures_by_number_are_no_video(tmp_path):
    for number in range(3):
        with av.open(str(tmp_path / f"{number}.png"), "w", format="image2") as container:
            stream = container.add_stream("png", rate=1)
            stream.width, stream.height, stream.pix_fmt = 32, 32, "rgb24"
            frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
            container.mux(stream.encode())
    (tmp_path / "%d.png").write_bytes((tmp_path / "0.png").read_bytes())
    with pytest.raises(ValueError, match="can't be read"):
        read_video(str(tmp_path / "%d.png"), every_frame)


@pytest.mark.parametrize("name", ["http:clip.mp4", "concat:clip.mp4", "a:b.mp4", "pipe:0", "-x.mp4"])
def test_a_name_is_a_name_and_no_protocol(tmp_path, name):
    content = write_video(tmp_path / "clip.mp4", 9).read_bytes()
    (tmp_path / name).write_bytes(content)
    with inside(tmp_path):
        frames, _ = read_video(name, every_frame)
    assert len(frames) == 9


def test_no_container_on_the_list_is_one_that_opens_others():
    names = set(CONTAINERS.split(","))
    assert not names & {
        "hls",
        "dash",
        "concat",
        "sdp",
        "rtsp",
        "rtp",
        "image2",
        "tty",
        "lavfi",
        "sap",
        "webm_dash_manifest",
    }
    for name in ("mp4", "matroska", "webm", "avi", "flv", "gif", "mpegts", "mpeg", "ogg", "asf"):
        assert av.ContainerFormat(name, "r").name.split(",")[0] in names


# ---- what small files claim ----


def box(kind: bytes, *parts: bytes) -> bytes:
    content = b"".join(parts)
    return struct.pack(">I", 8 + len(content)) + kind + content


def full(kind: bytes, *parts: bytes) -> bytes:
    return box(kind, b"\0\0\0\0", *parts)


def mp4_that_claims(num_samples: int, kind: bytes = b"vide", each: int = 2) -> bytes:
    """Some 600 bytes whose sample table says one size for all of many samples, `each` time units apart."""
    entry = b"\0" * 6 + struct.pack(">H", 1) + b"\0" * 16 + struct.pack(">HH", 64, 64) + b"\0" * 14
    stbl = box(
        b"stbl",
        full(b"stsd", struct.pack(">I", 1), box(b"mp4v", entry, b"\0" * 32, struct.pack(">Hh", 24, -1))),
        full(b"stts", struct.pack(">III", 1, num_samples, each)),
        full(b"stsc", struct.pack(">IIII", 1, 1, num_samples, 1)),
        full(b"stsz", struct.pack(">II", 1, num_samples)),
        full(b"stco", struct.pack(">II", 1, 32)),
    )
    mdia = box(
        b"mdia",
        full(b"mdhd", struct.pack(">IIIII", 0, 0, 25, num_samples, 0)),
        full(b"hdlr", b"\0" * 4, kind, b"\0" * 13),
        box(b"minf", stbl),
    )
    tkhd = full(b"tkhd", struct.pack(">IIIII", 0, 0, 1, 0, num_samples), b"\0" * 60)
    mvhd = full(b"mvhd", struct.pack(">IIII", 0, 0, 25, num_samples), b"\0" * 80)
    return box(b"ftyp", b"isom\0\0\0\0isom") + box(b"moov", mvhd, box(b"trak", tkhd, mdia)) + box(b"mdat", b"\0" * 64)


def gif_of(width: int, height: int) -> bytes:
    """A GIF of one frame without a pixel in it."""
    head = b"GIF89a" + struct.pack("<HH", width, height) + b"\x80\0\0" + b"\0\0\0\xff\xff\xff"
    picture = b"\x2c" + struct.pack("<HHHH", 0, 0, width, height) + b"\0" + b"\x02\x02\x44\x01\0"
    return head + picture * 3 + b"\x3b"


def matroska_that_lasts(path, num_frames: int) -> bytes:
    """Two frames, the second as late as the last of many."""
    return write_video(path, 2, times=[0, num_frames - 1], size=(16, 16)).read_bytes()


def memory_of(code: str, content: bytes, tmp_path) -> tuple[str, float]:
    """What a process of its own prints that reads a file, and its largest memory in MB over what imports take."""
    (tmp_path / "claims").write_bytes(content)
    script = (
        "import resource, numpy as np\n"
        "from holitom_hf.video.decoding import read_video\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "before, video = peak(), open('claims', 'rb').read()\n"
        f"try:\n    {code}\n"
        "except ValueError as error:\n    print(error)\n"
        "print(peak() - before)\n"
    )
    limit = lambda: resource.setrlimit(resource.RLIMIT_CPU, (60, 60))  # noqa: E731
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120, preexec_fn=limit
    )
    assert result.returncode == 0, result.stderr
    *message, peak = result.stdout.strip().splitlines()
    return "\n".join(message), float(peak)


READ = "read_video(video, lambda found: np.linspace(0, found.total_num_frames - 1, 32, dtype=int))"


@pytest.mark.parametrize("kind", ["samples", "sound", "gif", "times"])
def test_what_a_small_file_claims_is_never_allocated(tmp_path, kind):
    content, message = {
        "samples": (lambda: mp4_that_claims(70_000_000), "samples by its header, more than"),
        "sound": (lambda: mp4_that_claims(70_000_000, b"soun"), "samples by its header, more than"),
        "gif": (lambda: gif_of(8192, 8192), "or its frames have more than 35389440 pixels"),
        "times": (lambda: matroska_that_lasts(tmp_path / "c.mkv", 80_000_000), "frames by its time stamps, more than"),
    }[kind]
    content = content()
    assert len(content) < 2500
    printed, peak = memory_of(READ, content, tmp_path)
    assert message in printed
    assert peak < 120


def test_sound_that_is_taken_by_chunks_may_have_any_number_of_samples(tmp_path):
    path = tmp_path / "clip.mov"
    with av.open(str(path), "w") as container:
        video, sound = container.add_stream("libx264", rate=25), container.add_stream("pcm_s16le", rate=48000)
        video.width = video.height = 64
        for number in range(50):
            frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
            frame.pts = number
            container.mux(video.encode(frame))
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 3840), np.int16), format="s16", layout="stereo")
            samples.sample_rate, samples.pts = 48000, number * 1920
            container.mux(sound.encode(samples))
        container.mux(video.encode())
    frames, _ = read_video(path, every_frame, VideoLimits(max_frames=100))
    assert len(frames) == 50


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_bytes": 1000}, "bytes, more than the 1000 that are allowed"),
        ({"max_pixels": 160 * 64 - 1}, "has 10240 pixels in a frame, more than the 10239"),
        ({"max_frames": 59}, "has 60 (samples|frames) by its .*, more than the 59"),
        ({"max_memory": 8 * 160 * 64 * 3 - 1}, "has 245760 bytes in the frames asked for, more than the 245759"),
        ({"max_seconds": 0}, "takes more than 0 s to decode"),
    ],
)
@pytest.mark.parametrize("kind", ["mp4", "mkv", "ts"])
def test_each_limit_holds_where_it_says(tmp_path, kind, limits, message):
    path = write_video(tmp_path / f"clip.{kind}", 60)
    with pytest.raises(ValueError, match=message):
        read_video(path, uniform(8), VideoLimits(**limits))
    exact = {name: value + 1 for name, value in limits.items() if name not in ("max_bytes", "max_seconds")}
    if exact and "max_frames" not in exact:
        assert len(read_video(path, uniform(8), VideoLimits(**exact))[0]) == 8


def test_frames_that_are_decoded_are_counted_where_no_header_does(tmp_path):
    path = write_video(tmp_path / "clip.h264", 60, container_format="h264")
    with pytest.raises(ValueError, match="has 40 frames to decode, more than the 39"):
        read_video(path, uniform(4), VideoLimits(max_frames=39))


def test_a_frame_larger_than_the_header_says_is_not_decoded(tmp_path):
    parts = [write_video(tmp_path / f"{width}.ts", 10, size=(width, 64)) for width in (160, 640)]
    path = join_streams(tmp_path / "sizes.ts", parts)
    with pytest.raises(ValueError, match="changes its size"):
        read_video(path, every_frame)
    limits = VideoLimits(max_pixels=160 * 64)
    with pytest.raises(ValueError, match="has 40960 pixels in a frame, more than the 10240"):
        read_video(path, every_frame, limits)


# ---- what addresses send ----


class _Sender(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.asked.append(dict(self.headers))
        getattr(self, self.path.strip("/"))()

    def endless(self):
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(4096):
                self.wfile.write(b"\0" * 2**16)
                self.server.sent += 2**16

    def slow(self):
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(100):
                self.wfile.write(b"\0")
                time.sleep(0.05)

    def bomb(self):
        content = gzip.compress(b"\0" * 2**26)
        self.send_response(200)
        self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def sender():
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Sender)
    server.asked, server.sent = [], 0
    server.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_download_ends_where_the_limit_is(sender):
    with pytest.raises(OSError, match=r"can't be downloaded: it has .* bytes or more, more than the 1000000"):
        read_video(f"{sender.address}/endless", every_frame, VideoLimits(max_bytes=1_000_000))
    assert sender.sent < 2**25  # what sockets hold, not all of 256 MB


def test_a_download_has_its_time_in_all(sender):
    start = time.monotonic()
    with pytest.raises(OSError, match="it takes more than 1 s"):
        read_video(f"{sender.address}/slow", every_frame, VideoLimits(max_seconds=1))
    assert time.monotonic() - start < 3


def test_a_download_is_asked_for_as_it_is_and_taken_no_other_way(sender):
    with pytest.raises(OSError, match="it comes compressed"):
        read_video(f"{sender.address}/bomb", every_frame)
    assert sender.asked[0]["Accept-Encoding"] == "identity"
