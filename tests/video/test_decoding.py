import base64
import io
import struct
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import av
import numpy as np
import pytest

from holitom_hf.video.decoding import _VideoReader, read_video

from ..videos import join_streams, number_of, numbered_frame, write_audio, write_video


def uniform(num_frames):
    return lambda metadata: np.linspace(0, metadata.total_num_frames - 1, num_frames, dtype=int)


def every_frame(metadata):
    return np.arange(metadata.total_num_frames)


def numbers(frames) -> list[int]:
    return [number_of(frame) for frame in frames]


CONTAINERS = {"mp4": "libx264", "mkv": "libx264", "avi": "libx264", "ts": "libx264", "webm": "libvpx"}


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize(("num_frames", "gop"), [(60, 12), (60, 250), (61, 1), (7, 3), (1, 12)])
def test_every_frame_is_found_by_its_index(tmp_path, kind, num_frames, gop):
    path = write_video(tmp_path / f"clip.{kind}", num_frames, gop=gop, codec=CONTAINERS[kind])
    frames, metadata = read_video(path, every_frame)
    assert metadata.total_num_frames == num_frames
    assert numbers(frames) == list(range(num_frames))
    if num_frames == 60:
        frames, metadata = read_video(path, uniform(9))
        expected = np.linspace(0, 59, 9, dtype=int).tolist()
        assert numbers(frames) == expected
        assert metadata.frames_indices.tolist() == expected


def test_frames_may_repeat(tmp_path):
    path = write_video(tmp_path / "clip.mp4", 5)
    frames, _ = read_video(path, lambda _: np.array([0, 0, 3, 3, 4]))
    assert numbers(frames) == [0, 0, 3, 3, 4]


def test_the_pixels_are_those_of_a_plain_decoding(tmp_path):
    path = write_video(tmp_path / "clip.mp4", 50)
    with av.open(str(path)) as container:
        plain = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    frames, metadata = read_video(path, uniform(8))
    expected = np.stack([plain[i] for i in metadata.frames_indices]).transpose(0, 3, 1, 2)
    assert (frames.numpy() == expected).all()


@pytest.mark.parametrize("gop", [40, 250])
@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_frames_that_nothing_refers_to_are_left_out_and_the_others_stay_exact(tmp_path, monkeypatch, codec, gop):
    options = {"bf": "3", "b-pyramid": "normal", "x265-params": "log-level=none"}
    options = {name: value for name, value in options.items() if ("x265" in name) == (codec == "libx265")}
    path = write_video(tmp_path / "clip.mp4", 150, codec=codec, gop=gop, codec_options=options)
    with av.open(str(path)) as container:
        plain = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    decode, decoded = _VideoReader._decode, []

    def spy(self, *args):
        for stamp, frame in decode(self, *args):
            decoded.append(stamp)
            yield stamp, frame

    monkeypatch.setattr(_VideoReader, "_decode", spy)
    random = np.random.default_rng(0)
    patterns = [np.linspace(0, 149, 8, dtype=int), np.array([149]), np.array([0, 1, 2, 70, 73])]
    patterns += [np.sort(random.choice(150, count)) for count in (1, 2, 3, 5, 9, 20, 60)]
    for indices in patterns:
        decoded.clear()
        frames, _ = read_video(path, lambda _, indices=indices: indices)
        assert (frames.numpy() == plain[indices].transpose(0, 3, 1, 2)).all()
        if len(indices) == 8:
            assert len(decoded) < 120


def test_a_variable_frame_rate_is_sampled_by_index(tmp_path):
    times = [0, 1, 2, 3, 10, 11, 12, 30, 31, 60, 61, 62, 63, 64, 65, 66, 80, 81, 82, 100]
    path = write_video(tmp_path / "clip.mp4", len(times), times=times)
    assert numbers(read_video(path, every_frame)[0]) == list(range(len(times)))


def test_a_fragmented_file_has_no_count_in_its_header(tmp_path):
    path = write_video(tmp_path / "clip.mp4", 60, container_options={"movflags": "frag_keyframe+empty_moov"})
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames != 60
    frames, metadata = read_video(path, uniform(7))
    assert metadata.total_num_frames == 60
    assert numbers(frames) == np.linspace(0, 59, 7, dtype=int).tolist()


@pytest.mark.parametrize("claimed", [10, 600])
def test_a_header_that_lies_about_the_number_of_frames_is_not_believed(tmp_path, claimed):
    path = write_video(tmp_path / "clip.avi", 60)
    data = bytearray(path.read_bytes())
    data[data.index(b"avih") + 8 + 16 :][:4] = struct.pack("<I", claimed)
    place = data.index(b"avih") + 8 + 16  # dwTotalFrames
    data[place : place + 4] = struct.pack("<I", claimed)
    place = data.index(b"strh") + 8 + 32  # dwLength of the stream
    data[place : place + 4] = struct.pack("<I", claimed)
    path.write_bytes(data)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == claimed
    frames, metadata = read_video(path, uniform(5))
    assert metadata.total_num_frames == 60
    assert numbers(frames) == [0, 14, 29, 44, 59]


def test_a_stream_without_time_stamps_is_counted(tmp_path):
    path = write_video(tmp_path / "clip.h264", 30, container_format="h264")
    frames, metadata = read_video(path, uniform(4))
    assert metadata.total_num_frames == 30
    assert numbers(frames) == [0, 9, 19, 29]


@pytest.mark.parametrize("rotation", [90, -90, 180])
def test_rotation_metadata_is_applied(tmp_path, rotation):
    upright = write_video(tmp_path / "upright.mp4", 3, size=(160, 64))
    turned = write_video(tmp_path / "turned.mp4", 3, size=(160, 64), rotation=rotation)
    plain, _ = read_video(upright, every_frame)
    frames, _ = read_video(turned, every_frame)
    expected = np.rot90(plain.numpy(), rotation // 90, axes=(2, 3))
    assert frames.shape == expected.shape
    assert (frames.numpy() == expected).all()


def test_odd_sizes_are_read_whole(tmp_path):
    path = tmp_path / "odd.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 161, 67, "bgr0"
        for number in range(4):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number, 161, 67), format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    frames, _ = read_video(path, every_frame)
    assert (frames.numpy() == np.stack([numbered_frame(n, 161, 67) for n in range(4)]).transpose(0, 3, 1, 2)).all()


@pytest.mark.parametrize("how", ["path", "string", "bytes", "file", "stream", "buffer"])
def test_a_video_may_be_a_path_bytes_or_a_file(tmp_path, how):
    path = write_video(tmp_path / "clip.mp4", 20, with_audio=True)

    class Unseekable(io.RawIOBase):
        def __init__(self):
            self.file = io.BytesIO(path.read_bytes())

        def read(self, size=-1):
            return self.file.read(size)

        def seekable(self):
            return False

    with path.open("rb") as file:
        video = {
            "path": path,
            "string": str(path),
            "bytes": path.read_bytes(),
            "file": file,
            "stream": Unseekable(),
            "buffer": io.BytesIO(path.read_bytes()),
        }[how]
        frames, _ = read_video(video, uniform(3))
        assert numbers(frames) == [0, 9, 19]
        assert not file.closed


class _Handler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=tmp_path))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_video_may_be_a_url(tmp_path, server):
    write_video(tmp_path / "clip.mp4", 20)
    assert numbers(read_video(f"{server}/clip.mp4", uniform(3))[0]) == [0, 9, 19]


def test_few_frames_of_a_long_video_are_decoded_by_seeking(tmp_path, monkeypatch):
    """Counts frames that leave the decoder, for a short video and one of six times its length."""
    decoded = {}
    from holitom_hf.video import decoding as video_decoding

    plain_decode = video_decoding._VideoReader._decode

    def counting(self, *args):
        for frame in plain_decode(self, *args):
            decoded[self.name] = decoded.get(self.name, 0) + 1
            yield frame

    monkeypatch.setattr(video_decoding._VideoReader, "_decode", counting)
    for kind in ("mp4", "mkv"):
        counts = []
        for num_frames in (160, 1000):
            path = write_video(tmp_path / f"{num_frames}.{kind}", num_frames, gop=5, size=(64, 32))
            read_video(path, uniform(8))
            counts.append(decoded[repr(str(path))])
        # At most a group of pictures for each frame, and one for the end.
        assert max(counts) <= 8 * 5 + 2 * 5, counts


def test_a_file_with_few_keyframes_is_decoded_once(tmp_path, monkeypatch):
    decoded = []
    from holitom_hf.video import decoding as video_decoding

    plain_decode = video_decoding._VideoReader._decode

    def counting(self, *args):
        for frame in plain_decode(self, *args):
            decoded.append(frame)
            yield frame

    monkeypatch.setattr(video_decoding._VideoReader, "_decode", counting)
    options = {"x264-params": "scenecut=0"}
    path = write_video(tmp_path / "clip.mp4", 200, gop=1000, size=(64, 32), codec_options=options)
    frames, _ = read_video(path, uniform(8))
    assert len(frames) == 8
    assert len(decoded) == 200


def test_a_data_url_is_decoded_as_its_file(tmp_path):
    content = write_video(tmp_path / "clip.mp4", 12).read_bytes()
    url = "data:video/mp4;base64," + base64.b64encode(content).decode()
    frames, _ = read_video(url, every_frame)
    assert numbers(frames) == list(range(12))
    for broken, message in ((url.replace(";base64", ""), "must look like"), (url[:-3] + "!", "is no base64")):
        with pytest.raises(ValueError, match=message) as raised:
            read_video(broken, every_frame)
        assert len(str(raised.value)) < 200


class TestBadFiles:
    def check(self, video, error, match):
        with pytest.raises(error, match=match) as raised:
            read_video(video, uniform(4))
        assert "\n" not in str(raised.value)

    def test_a_missing_file(self, tmp_path):
        self.check(tmp_path / "no.mp4", FileNotFoundError, r"there is no video file '.*no\.mp4'")

    def test_a_folder(self, tmp_path):
        self.check(tmp_path, ValueError, r"is a folder: pass a video file")

    def test_an_empty_file(self, tmp_path):
        (tmp_path / "empty.mp4").touch()
        self.check(tmp_path / "empty.mp4", ValueError, r"'.*empty\.mp4' is empty \(0 bytes\)")
        self.check(b"", ValueError, r"the file passed as bytes is empty")

    def test_a_file_that_is_no_video(self, tmp_path):
        (tmp_path / "text.mp4").write_text("This is no video. " * 100)
        self.check(tmp_path / "text.mp4", ValueError, r"text\.mp4' can't be read as a video: it is no video file")

    @pytest.mark.parametrize("kind", ["mp4", "mkv", "avi"])
    def test_a_truncated_file(self, tmp_path, kind):
        path = write_video(tmp_path / f"clip.{kind}", 250, gop=10)
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        self.check(path, ValueError, rf"clip\.{kind}' .*cut off")

    def test_a_truncated_file_whose_index_comes_first(self, tmp_path):
        path = write_video(tmp_path / "clip.mp4", 250, gop=10, container_options={"movflags": "faststart"})
        data = path.read_bytes()
        path.write_bytes(data[: len(data) * 2 // 3])
        self.check(path, ValueError, r"clip\.mp4' is cut off: it lists frames beyond its end")

    def test_audio_only(self, tmp_path):
        path = write_audio(tmp_path / "sound.mp4")
        self.check(path, ValueError, r"sound\.mp4' has no video stream, only audio")

    def test_a_video_without_a_frame(self, tmp_path):
        path = tmp_path / "none.mkv"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=25)
            stream.width = stream.height = 64
            stream.pix_fmt = "yuv420p"
            container.start_encoding()
        self.check(path, ValueError, r"none\.mkv' (has no frame that can be decoded|can't be read as a video)")

    def test_a_url_that_is_not_there_or_cannot_be_reached(self, server):
        self.check(f"{server}/no.mp4", OSError, r"the file at 'http.*no\.mp4' can't be downloaded: .*404")
        self.check("http://127.0.0.1:9/clip.mp4", OSError, r"can't be downloaded")

    def test_a_size_that_changes(self, tmp_path):
        parts = [write_video(tmp_path / f"{width}.ts", 10, size=(width, 64)) for width in (160, 320)]
        path = join_streams(tmp_path / "sizes.ts", parts)
        with pytest.raises(ValueError, match=r"sizes\.ts' changes its size between frames"):
            read_video(path, every_frame)
