"""What addresses of strangers make us read: servers on loopback, some in the part of the internet."""

import asyncio
import contextlib
import gzip
import os
import socket
import ssl
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import trustme

from holitom_hf.video import sources as sources_file
from holitom_hf.video.sources import MediaSources, is_public


CONTENT = b"what is to be read" * 100


class _Sender(BaseHTTPRequestHandler):
    """`/file`, `/to/<url>`, `/endless`, `/slow`, `/headers` (a byte now and then), `/bomb`, `/large`."""

    def log_message(self, *args):
        pass

    def start(self, status=200, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def do_GET(self):
        self.server.asked.append((self.path, dict(self.headers)))
        kind, _, rest = self.path[1:].partition("/")
        with contextlib.suppress(OSError):
            if kind == "file":
                self.start(Content_Length=str(len(CONTENT)))
                self.wfile.write(CONTENT)
            elif kind == "to":
                self.start(302, Location=rest)
            elif kind == "again":
                self.start(302, Location="/again")
            elif kind == "endless":
                self.start()
                for _ in range(4096):
                    self.wfile.write(b"\0" * 2**16)
                    self.server.sent += 2**16
            elif kind == "slow":
                self.start()
                for _ in range(100):
                    self.wfile.write(b"\0")
                    time.sleep(0.1)
            elif kind == "headers":
                self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
                for _ in range(100):
                    self.wfile.write(b"a")
                    time.sleep(0.1)
            elif kind == "bomb":
                self.start(Content_Encoding="gzip")
                self.wfile.write(gzip.compress(b"\0" * 2**26))
            elif kind == "large":
                self.start(Content_Length=str(2**40))
            else:
                self.start(404)


@contextlib.contextmanager
def serving(address: str = "127.0.0.1", tls: ssl.SSLContext | None = None):
    server = ThreadingHTTPServer((address, 0), _Sender)
    server.daemon_threads = True
    server.asked, server.sent, server.port = [], 0, server.server_address[1]
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def server():
    with serving() as server:
        yield server


def read(sources: MediaSources, url: str) -> bytes:
    async def run() -> bytes:
        with await sources.open(url) as file:
            return file.read()

    return asyncio.run(run())


def allowed(**options) -> MediaSources:
    return MediaSources(domains=["127.0.0.1"], **options)


PRIVATE = [
    "0.0.0.0",
    "10.0.0.1",
    "100.64.0.1",
    "127.0.0.1",
    "127.255.255.254",
    "169.254.169.254",
    "172.16.0.1",
    "192.168.1.1",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "64:ff9b::7f00:1",
    "2001:0:1::1",
    "2002:7f00:1::1",
    "fc00::1",
    "fe80::1%lo",
    "ff02::1",
]


@pytest.mark.parametrize("address", PRIVATE)
def test_what_is_no_address_of_one_host_on_the_internet_is_not_public(address):
    assert not is_public(address)


def test_addresses_of_the_internet_are_public():
    assert all(map(is_public, ["8.8.8.8", "172.32.0.1", "2606:4700:4700::1111"]))


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "[::1]", "2130706433", "0x7f000001", "127.1", "0", "[::ffff:127.0.0.1]", "127.0.0.1."],
)
def test_a_private_host_is_not_asked_however_it_is_written(server, host):
    with pytest.raises(ValueError, match=r"is not a public host|there is no host|can't be read"):
        read(MediaSources(), f"http://{host}:{server.port}/file")
    assert server.asked == []


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/x", "gopher://127.0.0.1:1/_x", "rtsp://127.0.0.1/x", "concat:a|b"])
def test_other_protocols_are_not_spoken(url):
    with pytest.raises(ValueError, match="pass an http, https or data URL"):
        read(allowed(), url)


@pytest.mark.parametrize("url", ["http://", "http:///x", "http://[/x", "http://a b/x", "http://x:y@127.0.0.1/x"])
def test_what_is_no_address_is_refused(url):
    with pytest.raises(ValueError, match="can't be read"):
        read(allowed(), url)


def test_a_domain_that_the_operator_allows_is_asked_and_no_other(server):
    url = f"http://127.0.0.1:{server.port}/file"
    assert read(allowed(), url) == CONTENT
    assert read(MediaSources(domains=[f"127.0.0.1:{server.port}"]), url) == CONTENT
    for domains in (["127.0.0.1:1"], ["example.com"], ["1127.0.0.1"]):
        with pytest.raises(ValueError, match="is not one of the hosts that this server asks"):
            read(MediaSources(domains=domains), url)
    assert len(server.asked) == 2


def test_a_redirect_to_another_host_is_not_followed_where_that_host_is_refused(server, monkeypatch):
    # One address of loopback plays the internet, the others are as private as they are.
    monkeypatch.setattr(sources_file, "is_public", lambda address: address == "127.0.0.1")
    with serving("127.0.0.2") as inner:
        url = f"http://127.0.0.1:{server.port}/to/"
        assert read(MediaSources(), url + "/file") == CONTENT
        assert read(MediaSources(), f"{url}{url}/file") == CONTENT
        for target in (f"http://127.0.0.2:{inner.port}/file", f"//127.0.0.2:{inner.port}/file"):
            with pytest.raises(ValueError, match=r"127\.0\.0\.2 is not a public host"):
                read(MediaSources(), url + target)
        assert inner.asked == []
    for target in ("file:///etc/hostname", "ftp://127.0.0.1/x"):
        with pytest.raises(ValueError, match="only http and https"):
            read(MediaSources(), url + target)
    with pytest.raises(ValueError, match="more than 5 redirects"):
        read(MediaSources(), f"http://127.0.0.1:{server.port}/again")


def test_a_name_is_resolved_once_and_the_checked_address_is_asked(server, monkeypatch):
    monkeypatch.setattr(sources_file, "is_public", lambda address: address == "127.0.0.1")
    answers = [["127.0.0.1"], ["127.0.0.2"]]
    looked_up = []

    async def rebinding(host, port):
        looked_up.append(host)
        return answers[len(looked_up) - 1]

    with serving("127.0.0.2"):
        url = f"http://rebinding.test:{server.port}/file"
        assert read(MediaSources(resolve=rebinding), url) == CONTENT
        assert looked_up == ["rebinding.test"]
        assert server.asked[0][1]["Host"] == f"rebinding.test:{server.port}"
        with pytest.raises(ValueError, match=r"rebinding\.test is not a public host"):
            read(MediaSources(resolve=rebinding), url)

    async def both(host, port):
        return ["127.0.0.1", "127.0.0.2"]

    with pytest.raises(ValueError, match="is not a public host"):
        read(MediaSources(resolve=both), url)


def test_tls_is_verified_for_the_name_though_the_address_is_asked():
    authority = trustme.CA()
    serving_tls, asking_tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert("videos.test").configure_cert(serving_tls)
    authority.configure_trust(asking_tls)

    async def here(host, port):
        return ["127.0.0.1"]

    with serving(tls=serving_tls) as server:
        names = ["videos.test", "others.test"]
        sources = MediaSources(domains=names, resolve=here, tls=asking_tls)
        assert read(sources, f"https://videos.test:{server.port}/file") == CONTENT
        with pytest.raises(ValueError, match="CERTIFICATE_VERIFY_FAILED"):
            read(sources, f"https://others.test:{server.port}/file")
        with pytest.raises(ValueError, match="CERTIFICATE_VERIFY_FAILED"):
            read(MediaSources(domains=names, resolve=here), f"https://videos.test:{server.port}/file")
        assert len(server.asked) == 1


def test_a_download_ends_where_the_limit_is(server):
    url = f"http://127.0.0.1:{server.port}/"
    with pytest.raises(ValueError, match="bytes or more, and 1000000 are allowed"):
        read(allowed(max_bytes=10**6), url + "endless")
    assert server.sent < 2**25
    with pytest.raises(ValueError, match="it has 1099511627776 bytes or more"):
        read(allowed(), url + "large")
    with pytest.raises(ValueError, match="it comes compressed"):
        read(allowed(), url + "bomb")
    assert all(headers["Accept-Encoding"] == "identity" for _, headers in server.asked)
    with pytest.raises(ValueError, match="its host answers 404"):
        read(allowed(), url + "nothing")
    with pytest.raises(ValueError, match="bytes or more, and 10 are allowed"):
        read(allowed(max_bytes=10), "data:video/mp4;base64," + "A" * 100)


@pytest.mark.parametrize("kind", ["slow", "headers"])
def test_a_download_has_its_time_in_all(server, kind):
    start = time.monotonic()
    with pytest.raises(ValueError, match="it takes more than 1 s"):
        read(allowed(max_seconds=1), f"http://127.0.0.1:{server.port}/{kind}")
    assert time.monotonic() - start < 4


def test_a_name_that_does_not_resolve_in_time_is_given_up():
    async def never(host, port):
        await asyncio.sleep(60)

    with pytest.raises(ValueError, match="it takes more than 1 s"):
        read(MediaSources(resolve=never, max_seconds=1), "http://never.test/")


def test_no_proxy_and_no_key_of_this_machine_is_used(server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("all_proxy", "http://127.0.0.1:9")
    assert read(allowed(), f"http://127.0.0.1:{server.port}/file") == CONTENT
    assert not {"Authorization", "Cookie"} & set(server.asked[0][1])


class TestLocalFiles:
    @pytest.fixture
    def folder(self, tmp_path):
        folder = tmp_path / "videos"
        (folder / "deep").mkdir(parents=True)
        (folder / "deep" / "a clip.mp4").write_bytes(CONTENT)
        (tmp_path / "secret").write_text("secret")
        (tmp_path / "videos2").mkdir()
        (tmp_path / "videos2" / "x").write_text("secret")
        (folder / "link").symlink_to(tmp_path / "secret")
        return folder

    def test_none_is_read_unless_the_operator_names_a_folder(self, folder):
        for url in (str(folder / "deep" / "a clip.mp4"), "clip.mp4", "file:///etc/passwd", "/etc/passwd", "~/x", ""):
            with pytest.raises(ValueError, match="is a local path, and this server reads none"):
                read(MediaSources(), url)

    def test_files_of_the_folder_are_read(self, folder):
        sources, path = MediaSources(folder), folder / "deep" / "a clip.mp4"
        for url in (str(path), "deep/a clip.mp4", path.as_uri(), f"file://localhost{path.as_uri()[7:]}"):
            assert read(sources, url) == CONTENT

    def test_files_outside_are_not_however_they_are_named(self, folder):
        sources = MediaSources(folder)
        outside = [
            "/etc/passwd",
            "../secret",
            "deep/../../secret",
            str(folder / ".." / "secret"),
            str(folder.parent / "videos2" / "x"),
            "link",
            "file:///etc/passwd",
            "file:///etc/there/is/none",
            f"file://{folder}/%2e%2e/secret",
            f"file://example.com{folder}/deep/a%20clip.mp4",
            "a\0b",
            "file:%00",
        ]
        for url in outside:
            with pytest.raises(ValueError, match="is outside the folder that this server reads") as raised:
                read(sources, url)
            assert "secret" not in str(raised.value).replace(repr(url), "")

    def test_only_files_of_a_size_are_read_and_nothing_is_waited_for(self, folder):
        sources = MediaSources(folder, max_bytes=10)
        os.mkfifo(folder / "pipe")
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(folder / "socket"))
            for name, message in (
                ("deep", "is no file"),
                ("pipe", "is no file"),
                ("socket", "can't be read"),
                ("none", "can't be read: No such file"),
                ("x" * 5000, "can't be read|outside the folder"),
                ("deep/a clip.mp4", "bytes or more, and 10 are allowed"),
            ):
                with pytest.raises(ValueError, match=message) as raised:
                    read(sources, name)
                assert str(folder) not in str(raised.value)

    def test_the_folder_must_be_there(self, folder):
        with pytest.raises(ValueError, match="is no folder"):
            MediaSources(folder / "none")
