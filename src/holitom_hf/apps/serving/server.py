"""The server's application: a closed list of endpoints behind a guard."""

import copy
import ipaddress
import time
from collections.abc import Collection

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from transformers.utils import logging

from ...answering.answerer import Answerer
from ...video.sources import MediaSources
from .chat import ChatHandler
from .guard import Guard, error_response
from .limits import ServingLimits
from .metrics import Metrics


logger = logging.get_logger(__name__)


def build_app(
    answerer: Answerer,
    name: str,
    num_frames: int | None = None,
    limits: ServingLimits | None = None,
    sources: MediaSources | None = None,
    hosts: Collection[str] = (),
    api_key: str | None = None,
) -> Guard:
    """
    An ASGI application with `/v1/chat/completions`, `/v1/models`, `/health` and `/metrics`.

    Args:
        answerer: With its weights loaded.
        name: What requests call the model.
        num_frames: Frames to take of each video; `None`: at most the processor's.
        limits: Of each request.
        sources: What requests may name; `None`: public hosts and no file.
        hosts: Names that the server is known by, besides `localhost` and addresses.
        api_key: What clients must send as `Authorization: Bearer ...`.
    """
    limits = limits or ServingLimits()
    sources = sources or MediaSources(max_bytes=limits.max_media_bytes, max_seconds=limits.max_fetch_seconds)
    chat, metrics, started = ChatHandler(answerer, name, sources, limits, num_frames), Metrics(), int(time.time())
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(HTTPException)
    async def as_clients_read_it(request: Request, error: HTTPException) -> JSONResponse:
        return error_response(error.status_code, str(error.detail), **(error.headers or {}))

    @app.exception_handler(Exception)
    async def not_told_on(request: Request, error: Exception) -> JSONResponse:
        return error_response(500, f"the server failed on this request ({request.scope['work'].request_id})")

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # what a page of another site may send without being asked
            return error_response(415, "pass Content-Type: application/json")
        return await chat.handle_request(await request.body(), request.scope["work"])

    def card() -> dict:
        return {"id": name, "object": "model", "created": started, "owned_by": "holitom-hf"}

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [card()]}

    @app.get("/v1/models/{model:path}")
    async def model_card(model: str) -> Response:
        if model != name:
            return error_response(404, f"this server has the model {name!r} and no other")
        return JSONResponse(card())

    @app.get("/health")
    async def health() -> dict:
        return {"status": "ok"}

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    paths = [route.path for route in app.routes]
    return Guard(app, limits, metrics, paths, hosts, api_key)


def run_server(
    answerer: Answerer,
    name: str,
    host: str,
    port: int,
    num_frames: int | None = None,
    limits: ServingLimits | None = None,
    sources: MediaSources | None = None,
    hosts: Collection[str] = (),
    api_key: str | None = None,
) -> None:
    """
    Serves until it is interrupted, with a log line for each request.

    Args:
        host: Address to listen on.
        port: Port to listen on.
        The rest: as in [`build_app`].
    """
    app = build_app(answerer, name, num_frames, limits, sources, {*hosts, host}, api_key)
    log = copy.deepcopy(uvicorn.config.LOGGING_CONFIG)
    log["loggers"][__package__] = {"handlers": ["default"], "level": "INFO", "propagate": False}
    config = uvicorn.Config(app, host=host, port=port, log_config=log, access_log=False)  # configures logging, too
    if api_key is None and not _is_loopback(host):
        logger.warning(
            "Whoever reaches %s port %d may use this server: pass --api-key, or --host 127.0.0.1.", host, port
        )
    uvicorn.Server(config).run()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
