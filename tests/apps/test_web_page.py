"""The web page: its answers, what it refuses, and a click through it in a browser."""

import ctypes
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import av
import numpy as np
import pytest

from holitom_hf.answering.answerer import Answerer
from holitom_hf.bundled import BUNDLED_MODEL


gr = pytest.importorskip("gradio", reason="gradio is not installed: pip install 'holitom-hf[demo]'")


@pytest.fixture(scope="module")
def side_by_side():
    from holitom_hf.apps.web_page import SideBySide

    answerer = Answerer(str(BUNDLED_MODEL), device="cpu")
    answerer.load_model()
    return SideBySide(answerer)


def last(steps):
    *_, end = steps
    return end


def told(side_by_side, video, question="What?") -> str:
    """What a visitor reads when it goes wrong."""
    with pytest.raises(gr.Error) as raised:
        last(side_by_side.answer(video, question, 15, 0.8))
    return raised.value.message


def test_both_answers_grow_and_are_the_models_own(side_by_side, demo):
    video, question = str(demo / "clip.mp4"), "How many shapes are there?"
    steps = list(side_by_side.answer(video, question, 10, 0.7))
    plain_text, plain_figures, short_text, short_figures, picture = steps[-1]
    settings = side_by_side.settings(10, 0.7)
    assert (settings.retention_ratio, settings.similarity_threshold) == (0.1, 0.7)
    for text, figures, chosen in (
        (plain_text, plain_figures, side_by_side.plain),
        (short_text, short_figures, settings),
    ):
        prepared = side_by_side.answerer.prepare(video, question)
        side_by_side.answerer.encode(prepared)
        alone = side_by_side.answerer.generate(prepared, settings=chosen)
        assert text == alone.text
        assert f"| {alone.visual_tokens_outer} of 785" in figures
        assert f"{alone.cache_bytes / 2**20:.1f} MiB" in figures
    assert "| set | R = 10 %, tau = 0.7 |" in short_figures
    assert "| set | all tokens |" in plain_figures
    assert steps[0][2] == ""  # one after the other
    assert all(step[4] is None for step in steps[:-1])
    assert np.asarray(picture.convert("RGB")).std() > 20


def test_what_a_visitor_may_get_wrong_is_one_sentence_without_a_path(side_by_side, demo, tmp_path):
    video = str(demo / "clip.mp4")
    assert told(side_by_side, None).startswith("Upload or record a video first")
    assert told(side_by_side, video, "  ") == "Ask something about the video."
    assert told(side_by_side, video, "a" * 501) == "The question is too long: at most 500 characters."
    bad = tmp_path / "bad.mp4"
    for content in (b"", b"no video", Path(video).read_bytes()[:3000]):
        bad.write_bytes(content)
        message = told(side_by_side, str(bad))
        assert message.startswith("This file can't be read as a video.")
        assert str(tmp_path) not in message
    with av.open(str(bad), "w") as container:
        stream = container.add_stream("libx264", rate=1)
        stream.width = stream.height = 64
        for second in (0, 3700):
            frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
            frame.pts = second
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert told(side_by_side, str(bad)) == "The video is longer than 60 minutes: cut it first."


def test_an_uploaded_playlist_opens_no_file_of_the_server(side_by_side, demo, tmp_path):
    segment, playlist = tmp_path / "secret.ts", tmp_path / "upload.m3u8"
    with av.open(str(demo / "clip.mp4")) as source, av.open(str(segment), "w", format="mpegts") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    playlist.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:8\n#EXTINF:8,\n{segment}\n#EXT-X-ENDLIST\n")
    libc = ctypes.CDLL(None, use_errno=True)
    opened = libc.inotify_init1(os.O_NONBLOCK)
    assert libc.inotify_add_watch(opened, os.fsencode(segment), 0x20) >= 0  # IN_OPEN
    try:
        with av.open(str(playlist)):  # FFmpeg left to itself does open it
            assert os.read(opened, 4096)
        assert told(side_by_side, str(playlist)).startswith("This file can't be read as a video.")
        with pytest.raises(BlockingIOError):
            os.read(opened, 4096)
    finally:
        os.close(opened)


def test_it_takes_as_many_frames_as_the_command_says(side_by_side, demo, monkeypatch):
    from holitom_hf.apps.web_page import SideBySide

    processor = side_by_side.answerer.processor.video_processor
    monkeypatch.setattr(processor, "num_frames", processor.num_frames)  # put back afterwards
    *_, (_, figures, _, _, picture) = SideBySide(side_by_side.answerer, num_frames=3).answer(
        str(demo / "clip.mp4"), "What?", 100, 0.8
    )
    assert f"{3 * 49 + 1} of {3 * 49 + 1}" in figures
    assert picture is None  # of all tokens there is nothing to show


def test_times_are_of_second_runs_in_both_columns(demo, monkeypatch):
    """The first run at a length is slower than all that follow: it must not fall into one column alone."""
    from holitom_hf.apps.web_page import SideBySide

    answerer = Answerer(str(BUNDLED_MODEL), device="cpu")
    answerer.load_model()
    page, generate, runs = SideBySide(answerer), answerer.generate, []
    encode, encoded = answerer.encode, []

    def noted_encoding(prepared):
        encode(prepared)
        encoded.append(prepared.num_frames)
        prepared.seconds["encode"] = 100.0 * len(encoded)

    def noted(prepared, max_new_tokens, streamer, settings):
        runs.append((prepared.num_frames, settings.retention_ratio))
        result = generate(prepared, max_new_tokens, streamer, settings)
        result.seconds["first_token"] = 1000.0 * len(runs)
        return result

    monkeypatch.setattr(answerer, "generate", noted)
    monkeypatch.setattr(answerer, "encode", noted_encoding)
    for num_frames, first in ((16, 3), (16, 5), (9, 9), (16, 11)):
        answerer.processor.video_processor.num_frames = num_frames
        *_, (_, plain, _, short, _) = page.answer(str(demo / "clip.mp4"), "What shape is white?", 20, 0.8)
        found = [re.search(r"first token \| ([\d.]+) s \(([\d.]+) s vision", figures) for figures in (plain, short)]
        vision = 100.0 * len(encoded)  # the last encoding, in both
        # The runs that are shown, counted from the first.
        assert [float(match[1]) - vision for match in found] == [1000.0 * first, 1000.0 * (first + 1)]
        assert [float(match[2]) for match in found] == [vision, vision]
    assert [number for number, _ in runs] == [16] * 6 + [9] * 4 + [16] * 2
    assert encoded == [16, 16, 16, 9, 9, 16]
    assert [ratio for _, ratio in runs] == [page.plain.retention_ratio, 0.2] * 6


def test_a_fault_of_ours_tells_nothing_of_the_machine(side_by_side, demo, monkeypatch):
    def broken(**kwargs):
        raise RuntimeError(f"CUDA error in {demo}")

    monkeypatch.setattr(side_by_side.answerer.model, "generate", broken)
    message = told(side_by_side, str(demo / "clip.mp4"))
    assert message == "Something went wrong here. Try another video or question."


@pytest.fixture(scope="module")
def server():
    """The command, as a user starts it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "holitom_hf", "demo", "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None, process.stdout.read()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).read()
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.2)
        yield port
    finally:
        process.terminate()
        process.communicate()


def test_only_this_machine_gets_in(server):
    listening = Path("/proc/net/tcp").read_text()
    addresses = re.findall(rf"([0-9A-F]{{8}}):{server:04X} 00000000:0000 0A", listening)
    assert addresses == ["0100007F"]


class TestBrowser:
    @pytest.fixture(scope="class")
    def page(self, server):
        playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
        chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        if chromium is None:
            pytest.skip("no Chromium on this machine")
        quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
        with playwright.sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=chromium, args=quiet)
            page = browser.new_page(viewport={"width": 1200, "height": 1300})
            page.goto(f"http://127.0.0.1:{server}/")
            yield page
            browser.close()

    def test_a_click_through_with_a_real_file(self, page, demo, tmp_path):
        page.locator("input[type=file]").first.set_input_files(str(demo / "clip.mp4"))
        page.locator("video").first.wait_for(timeout=30_000)
        page.get_by_label("Question").fill("Which way does the white square move?")
        page.get_by_role("button", name="Ask").click()
        page.wait_for_function(
            "['uncompressed', 'holitom'].every(id => document.querySelector(`#${id} textarea`).value)", timeout=90_000
        )
        page.get_by_text("KV cache").nth(1).wait_for(timeout=30_000)
        answers = [page.locator(f"#{name} textarea").input_value() for name in ("uncompressed", "holitom")]
        assert answers == ["down", "down"]
        assert page.get_by_text("R = 15 %, tau = 0.8").count() == 1
        assert page.get_by_text("it counts as standing still").is_visible()
        page.wait_for_timeout(1500)
        page.screenshot(path=tmp_path / "page.png", full_page=True)

    def test_a_bad_file_gets_one_clear_message(self, page, tmp_path):
        bad = tmp_path / "bad.mp4"
        bad.write_bytes(b"no video at all")
        page.reload()
        page.locator("input[type=file]").first.set_input_files(str(bad))
        page.wait_for_timeout(1500)
        page.get_by_label("Question").fill("What?")
        page.get_by_role("button", name="Ask").click()
        toast = page.get_by_text("can't be read as a video")
        toast.first.wait_for(timeout=30_000)
        body = page.content()
        assert "Traceback" not in body
        assert str(tmp_path) not in body
