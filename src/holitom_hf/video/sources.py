"""What a stranger's address may have us read: no file and no host that the operator does not allow."""

import asyncio
import contextlib
import io
import ipaddress
import os
import re
import socket
import ssl
import stat
import tempfile
import urllib.parse
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path
from typing import BinaryIO

import anyio
import httpx

from .decoding import decode_data_url


MAX_REDIRECTS = 5
SECONDS_WITHOUT_A_BYTE = 10.0


class MediaSources:
    """
    Opens `http(s)` and `data` URLs, and local files of one folder.

    A host is resolved once; all its addresses must be public, and one of those is connected to, while TLS is
    verified for the host's name. The same holds for every redirect.
    """

    def __init__(
        self,
        local_path: str | os.PathLike | None = None,
        domains: Collection[str] = (),
        max_bytes: int = 2**28,
        max_seconds: float = 60.0,
        resolve: Callable[[str, int], Awaitable[list[str]]] | None = None,
        tls: ssl.SSLContext | None = None,
    ):
        """
        Args:
            local_path: Folder whose files may be read; `None`: no file.
            domains: Hosts, or `host:port`, that may be asked, wherever they are; none: every public one.
            max_bytes: Largest download or file.
            max_seconds: Longest download, from looking up the name to the last byte.
            resolve: Takes host and port, returns its addresses; `None`: the system's resolver.
            tls: Of `https`; `None`: the usual authorities.

        Raises:
            ValueError: If `local_path` is no folder.
        """
        self.local_path = Path(local_path).resolve() if local_path is not None else None
        if self.local_path is not None and not self.local_path.is_dir():
            raise ValueError(f"the path of allowed media {str(local_path)!r} is no folder")
        self.domains = {domain.lower() for domain in domains}
        self.max_bytes, self.max_seconds = max_bytes, max_seconds
        self.resolve = resolve or _resolve
        self.tls = tls if tls is not None else True

    async def open(self, url: str) -> BinaryIO:
        """
        A file with what an address holds.

        Args:
            url: `http(s)`, `data` or `file` URL, or a path: an absolute one, or one below `local_path`.

        Raises:
            ValueError: If the address is refused, can't be read, or holds too much.
        """
        scheme = re.match(r"[a-z][a-z0-9+.-]*(?=:)", url, re.IGNORECASE)
        scheme = scheme.group().lower() if scheme else "file"
        if scheme == "data":
            # Four characters of base64 are three bytes.
            self._check_size(len(url) * 3 // 4)
            return io.BytesIO(decode_data_url(url))
        name = repr(url if len(url) <= 200 else url[:200] + "...")
        if scheme == "file":
            return self._open_local(url, name)
        if scheme not in ("http", "https"):
            raise ValueError(f"{name} can't be read: pass an http, https or data URL")
        try:
            with anyio.fail_after(self.max_seconds):
                return await self._download(url)
        except TimeoutError as error:
            raise ValueError(f"{name} can't be read: it takes more than {self.max_seconds:.0f} s") from error
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
            raise ValueError(f"{name} can't be read: {str(error) or type(error).__name__}") from error

    def _open_local(self, url: str, name: str) -> BinaryIO:
        if self.local_path is None:
            raise ValueError(f"{name} is a local path, and this server reads none")
        path = url
        if url.lower().startswith("file:"):
            parts = urllib.parse.urlsplit(url)
            path = urllib.parse.unquote(parts.path) if parts.netloc in ("", "localhost") else "/\0"
        try:
            path = (self.local_path / path).resolve()
            is_inside = path.is_relative_to(self.local_path)
        except (OSError, ValueError, RuntimeError):
            is_inside = False
        # The same word whether there is such a file or not.
        if not is_inside:
            raise ValueError(f"{name} is outside the folder that this server reads")
        try:
            # A pipe or a device is neither waited for nor read.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        except OSError as error:
            raise ValueError(f"{name} can't be read: {error.strerror}") from error
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(descriptor)
            raise ValueError(f"{name} is no file")
        file = os.fdopen(descriptor, "rb")  # whose name is a number: its path is not told on
        try:
            self._check_size(status.st_size)
        except ValueError:
            file.close()
            raise
        return file

    async def _download(self, url: str) -> BinaryIO:
        # No proxy, which would look names up itself; no cookies or keys of this machine.
        async with httpx.AsyncClient(verify=self.tls, trust_env=False, timeout=SECONDS_WITHOUT_A_BYTE) as client:
            for _ in range(MAX_REDIRECTS + 1):
                async with contextlib.aclosing(await self._ask(client, httpx.URL(url))) as response:
                    if response.is_redirect:
                        url = str(httpx.URL(url).join(response.headers["Location"]))
                        continue
                    if not response.is_success:
                        raise ValueError(f"its host answers {response.status_code}")
                    return await self._take(response)
        raise ValueError(f"more than {MAX_REDIRECTS} redirects")

    async def _ask(self, client: httpx.AsyncClient, url: httpx.URL) -> httpx.Response:
        """The response of the first address that can be reached, its body not read yet."""
        host, addresses = await self._addresses(url)
        headers = {"Host": url.netloc.decode(), "Accept": "*/*", "Accept-Encoding": "identity"}
        for address in addresses:
            request = client.build_request(
                "GET", url.copy_with(host=address), headers=headers, extensions={"sni_hostname": host}
            )
            try:
                return await client.send(request, stream=True)
            except httpx.ConnectError:
                if address == addresses[-1]:
                    raise

    async def _addresses(self, url: httpx.URL) -> tuple[str, list[str]]:
        """A URL's host and the addresses to ask, or a `ValueError` if it must not be asked."""
        host = url.raw_host.decode()
        port = url.port or {"http": 80, "https": 443}.get(url.scheme)
        if port is None or not host:
            raise ValueError("only http and https addresses are read")
        if url.userinfo:
            raise ValueError("an address with a name or password in it is not read")
        is_allowed = bool(self.domains & {host.lower(), f"{host.lower()}:{port}"})
        if self.domains and not is_allowed:
            raise ValueError(f"{host} is not one of the hosts that this server asks")
        try:
            addresses = await self.resolve(host, port)
        except (OSError, UnicodeError) as error:
            raise ValueError(f"there is no host {host}") from error
        if not is_allowed and not all(map(is_public, addresses)):
            raise ValueError(f"{host} is not a public host")
        return host, sorted(set(addresses), key=lambda address: ":" in address)[:4]

    async def _take(self, response: httpx.Response) -> BinaryIO:
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise ValueError("it comes compressed, though it was asked for as it is")
        length = response.headers.get("Content-Length", "")
        self._check_size(int(length) if length.isdecimal() else 0)
        file = tempfile.TemporaryFile()  # noqa: SIM115 (the caller's)
        try:
            async for chunk in response.aiter_raw():
                file.write(chunk)
                self._check_size(file.tell())
        except BaseException:
            file.close()
            raise
        file.seek(0)
        return file

    def _check_size(self, size: int) -> None:
        if size > self.max_bytes:
            raise ValueError(f"it has {size} bytes or more, and {self.max_bytes} are allowed")


async def _resolve(host: str, port: int) -> list[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [address[0] for *_, address in found]


def is_public(address: str) -> bool:
    """Whether an address is one of the internet's, and of one host: not private, local, reserved or a tunnel."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    is_tunnel = ip.version == 6 and (ip.sixtofour is not None or ip.teredo is not None)
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or is_tunnel)
