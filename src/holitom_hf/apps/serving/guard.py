"""What every request passes first: who may ask, how much, how long; and where it is noted."""

import asyncio
import hmac
import ipaddress
from collections.abc import Collection

from starlette.responses import JSONResponse
from transformers.utils import logging

from .limits import ServingLimits
from .metrics import Metrics
from .work import REQUEST_ID, Work


logger = logging.get_logger(__name__)

OPEN_PATHS = ("/health",)  # without a key: what watches a server has none
SECONDS_TO_END = 5.0  # after the deadline, for a stream to say so


def error_response(status: int, message: str, **headers: str) -> JSONResponse:
    """An error as OpenAI's clients read it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    message = message.encode(errors="backslashreplace").decode()  # half a surrogate pair can't be sent
    content = {"error": {"message": message, "type": kind, "param": None, "code": status}}
    return JSONResponse(content, status, headers={name.replace("_", "-"): value for name, value in headers.items()})


class Guard:
    """
    ASGI middleware around the whole application: checks Host and key, reads the body within limits, cancels what
    nobody waits for, answers what went wrong, logs and counts.
    """

    def __init__(
        self,
        app,
        limits: ServingLimits,
        metrics: Metrics,
        paths: Collection[str],
        hosts=(),
        api_key: str | None = None,
    ):
        """
        Args:
            app: The application.
            limits: Of each request.
            metrics: Where requests are counted.
            paths: Those of the application; others are counted as one.
            hosts: Names that the server is known by, besides `localhost` and addresses; `*`: any.
            api_key: What clients must send as `Authorization: Bearer ...`.
        """
        self.app, self.limits, self.metrics, self.paths = app, limits, metrics, set(paths)
        self.hosts = {host.lower() for host in hosts}
        self.api_key = api_key.encode() if api_key else None
        self.num_posts = 0

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        work = Work(self.limits.max_seconds)
        asked_id = headers.get(b"x-request-id", b"").decode("latin-1")
        if REQUEST_ID.fullmatch(asked_id):
            work.request_id = asked_id
        scope["work"], status = work, None

        async def noting_send(message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", work.request_id.encode())]
            await send(message)

        self.metrics.in_progress.inc()
        self.num_posts += scope["method"] == "POST"
        try:
            response = self._refusal(scope, headers)
            if response is None:
                response = await self._answer(scope, receive, noting_send, work, headers)
            if response is not None and status is None:
                await response(scope, receive, noting_send)
        finally:
            work.cancelled.set()
            await work.held.aclose()
            self.num_posts -= scope["method"] == "POST"
            self.metrics.in_progress.dec()
            self._note(scope, work, status or 499)

    def _refusal(self, scope, headers) -> JSONResponse | None:
        """The answer to who may not ask at all."""
        if not self._is_own_host(headers.get(b"host", b"").decode("latin-1")):
            return error_response(400, "this server is not known by that Host: start it with --allowed-hosts")
        if self.api_key is not None and scope["path"] not in OPEN_PATHS:
            kind, _, key = headers.get(b"authorization", b"").partition(b" ")
            if kind.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self.api_key):
                return error_response(401, "pass the server's API key", WWW_Authenticate="Bearer")
        if scope["method"] == "POST" and self.num_posts > self.limits.max_queue:
            return error_response(
                429, f"{self.limits.max_queue} requests are being served: ask again later", Retry_After="5"
            )
        return None

    def _is_own_host(self, host: str) -> bool:
        """Whether a page of another name did not send a browser here (DNS rebinding); addresses can't be rebound."""
        name = host.lower().rpartition("]")[0].lstrip("[") if host.startswith("[") else host.lower().partition(":")[0]
        if name == "localhost" or self.hosts & {name, "*"}:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    async def _answer(self, scope, receive, send, work: Work, headers) -> JSONResponse | None:
        """Runs the application; what it did not answer itself is returned."""
        try:
            # Only those are counted; what others send is not kept.
            reading = self._body(receive, headers) if scope["method"] == "POST" else _nothing()
            body = await asyncio.wait_for(reading, work.seconds_left)
        except asyncio.TimeoutError:
            return error_response(408, f"the request took more than {work.max_seconds:.0f} s to send")
        except ConnectionError:
            return None
        if body is None:
            return error_response(413, f"the request has more than {self.limits.max_body_bytes} bytes")

        messages = iter([{"type": "http.request", "body": body, "more_body": False}])
        left = asyncio.Event()

        async def replay():
            message = next(messages, None)
            if message is None:
                await left.wait()
                message = {"type": "http.disconnect"}
            return message

        answering = asyncio.create_task(self.app(scope, replay, send))
        leaving = asyncio.create_task(_disconnect(receive))
        try:
            done, _ = await asyncio.wait(
                {answering, leaving}, timeout=work.seconds_left, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:  # whoever streams says so itself
                done, _ = await asyncio.wait({answering, leaving}, timeout=SECONDS_TO_END)
            if answering in done:
                answering.result()
                return None
            return None if leaving in done else error_response(408, f"the request took {work.max_seconds:.0f} s")
        except Exception:
            logger.exception("%s failed", work.request_id)
            return error_response(500, f"the server failed on this request ({work.request_id})")
        finally:
            work.cancelled.set()
            left.set()
            for task in (answering, leaving):
                task.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)

    async def _body(self, receive, headers) -> bytes | None:
        """The request's body, or `None` if it is too large."""
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.limits.max_body_bytes:
            return None
        body, is_more = bytearray(), True
        while is_more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionError
            body += message.get("body", b"")
            if len(body) > self.limits.max_body_bytes:
                return None
            is_more = message.get("more_body", False)
        return bytes(body)

    def _note(self, scope, work: Work, status: int) -> None:
        path = scope["path"] if scope["path"] in self.paths else "other"
        self.metrics.add(work, path, status)
        stages = " ".join(f"{stage} {seconds:.3f}" for stage, seconds in work.seconds.items())
        tokens = " ".join(f"{name} {number}" for name, number in work.tokens.items())
        logger.info(
            "%s %s %s %d %.3f s%s%s",
            work.request_id,
            scope["method"],
            path,
            status,
            work.max_seconds - work.seconds_left,
            f"; seconds: {stages}" if stages else "",
            f"; tokens: {tokens}" if tokens else "",
        )


async def _nothing() -> bytes:
    return b""


async def _disconnect(receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
