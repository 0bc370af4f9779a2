"""An OpenAI-compatible server (extra `serve`): the first attempt and its review are the reasoning of an answer."""

import asyncio
import hmac
import json
import os
import re
import socket
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import uvicorn
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from sclite import console
from sclite.chat.answer import Settings, open_gguf
from sclite.chat.service import ApiError, Completion, End, Piece, Service
from sclite.config import Config
from sclite.errors import UsageError
from sclite.student.step_scores import Cutoff

T = TypeVar("T")
KEY = "SCLITE_API_KEY"
MOST_BYTES = 1_000_000
"""Maximum size of a request body."""
LEFT = "the client disconnected"
LOCAL = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d+)?", re.I)


class Api:
    """The routes; `key` is required of requests to /v1 and /metrics if it is not empty."""

    def __init__(self, service: Service, key: str = ""):
        self.service, self.key = service, key
        routes = [
            Route("/v1/chat/completions", self.complete, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
            Route("/", self.page),
        ]
        failures: Any = dict.fromkeys((ApiError, HTTPException, Exception), self.fail)
        self.app = Starlette(routes=routes, exception_handlers=failures)

    def authorize(self, request: HttpRequest, public: bool = False) -> None:
        """Raises ApiError without the right key, which a `public` route does not need."""
        host, origin = request.headers.get("host", ""), request.headers.get("origin", "")
        # without a key, neither other sites nor pages that rebind their name to this machine may use the server
        if not self.key and not LOCAL.fullmatch(host):
            message = f"the host {host!r} is not this machine; set {KEY} to allow other names"
            raise ApiError(400, message, "invalid_host")
        foreign = origin == "null" or (origin.startswith("http") and origin.partition("://")[2] != host)
        if foreign and not self.key:
            message = f"web pages of {origin} cannot use this server without a key"
            raise ApiError(403, message, "invalid_origin")
        key = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        if self.key and not public and not hmac.compare_digest(key.encode("latin-1"), self.key.encode()):
            raise ApiError(401, "the API key is missing or wrong", "invalid_api_key")

    async def complete(self, request: HttpRequest) -> Response:
        """POST /v1/chat/completions."""
        self.authorize(request)
        body = b""
        try:
            async for part in request.stream():
                body += part
                if len(body) > MOST_BYTES:
                    raise ApiError(413, f"the body is larger than {MOST_BYTES:,} bytes", "request_too_large")
            query = Completion.model_validate_json(body)
        except ClientDisconnect:
            raise ApiError(499, LEFT) from None
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise ApiError(400, f"{place or 'the body'}: {first['msg']}", None, place or None) from None
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": query.model}
        items = self.service.run(query)
        # an error before the first item gets its own status
        start = await unless_disconnected(request, anext(items))
        if query.stream:
            events = stream_events(query, head | {"object": "chat.completion.chunk"}, start, items)
            return StreamingResponse(events, 200, {"cache-control": "no-store"}, "text/event-stream")

        async def gather() -> list[Piece | End]:
            return [start, *[item async for item in items]]

        found = await unless_disconnected(request, gather())
        choices: list[dict[str, Any]] = [
            {"index": index, "message": {"role": "assistant", "content": ""}} for index in range(query.n)
        ]
        for item in found:
            choice = choices[item.index]
            if isinstance(item, Piece):
                message = choice["message"]
                message[item.field] = message.get(item.field, "") + item.text
            else:
                choice |= item.fields
        return JSONResponse(head | {"object": "chat.completion", "choices": choices, "usage": usage(found)})

    async def models(self, request: HttpRequest) -> Response:
        """GET /v1/models."""
        self.authorize(request)
        made = {"object": "model", "created": self.service.began, "owned_by": "sclite"}
        return JSONResponse({"object": "list", "data": [{"id": name} | made for name in self.service.names]})

    async def health(self, request: HttpRequest) -> Response:
        """GET /health."""
        self.authorize(request, public=True)
        return JSONResponse({"status": "ok", "model": self.service.name, "active": self.service.active})

    async def metrics(self, request: HttpRequest) -> Response:
        """GET /metrics, for Prometheus."""
        self.authorize(request)
        rows = [f"sclite_{name} {value:.15g}" for name, value in sorted(self.service.counts.items())]
        return PlainTextResponse("\n".join([*rows, f"sclite_active_choices {self.service.active}", ""]))

    async def page(self, request: HttpRequest) -> Response:
        """GET /, the chat page."""
        self.authorize(request, public=True)
        text = files("sclite.chat").joinpath("page.html").read_text(encoding="utf-8")
        policy = (
            "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"
        )
        return HTMLResponse(text, headers={"content-security-policy": policy})

    async def fail(self, _: HttpRequest, error: Exception) -> Response:
        """The response to an error. An unexpected one is logged, too."""
        if isinstance(error, HTTPException):
            error = ApiError(error.status_code, str(error.detail))
        elif not isinstance(error, ApiError):
            error = ApiError(500, f"internal error: {type(error).__name__}")
        self.service.counts[f'errors_total{{status="{error.status}"}}'] += 1
        return JSONResponse(error.body, error.status)


async def unless_disconnected(request: HttpRequest, wanted: Awaitable[T]) -> T:
    """The result of `wanted`; cancels it and raises ApiError if the client disconnects first."""
    waiting = asyncio.ensure_future(wanted)
    try:
        while not (await asyncio.wait([waiting], timeout=0.5))[0]:
            if await request.is_disconnected():
                raise ApiError(499, LEFT)
    finally:
        if not waiting.done():
            waiting.cancel()
            await asyncio.wait([waiting])
    return waiting.result()


async def stream_events(
    query: Completion, head: dict[str, Any], start: Piece | End, items: AsyncGenerator[Piece | End, None]
) -> AsyncIterator[str]:
    """Server-sent events: the role, each piece, each end, the usage if requested; a later error is an event too."""

    def chunk(**fields: Any) -> str:
        return f"data: {json.dumps(head | fields)}\n\n"

    ends: list[End] = []
    for index in range(query.n):
        yield chunk(choices=[{"index": index, "delta": {"role": "assistant"}, "finish_reason": None}])
    item: Piece | End | None = start
    try:
        while item is not None:
            said = {"index": item.index, "delta": {}, "finish_reason": None}
            if isinstance(item, Piece):
                said["delta"] = {item.field: item.text}
            else:
                ends.append(item)
                said |= item.fields
            yield chunk(choices=[said])
            item = await anext(items, None)
    except ApiError as error:
        yield f"data: {json.dumps(error.body)}\n\n"
        return
    finally:
        await items.aclose()
    if query.stream_options.include_usage:
        yield chunk(choices=[], usage=usage(ends))
    yield "data: [DONE]\n\n"


def usage(items: Sequence[Piece | End]) -> dict[str, int]:
    """The token counts of a response: the prompt once, and all generated tokens."""
    ends = [item for item in items if isinstance(item, End)]
    prompt, written = max(end.prompt_tokens for end in ends), sum(end.tokens for end in ends)
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


class Server(uvicorn.Server):
    """Finishes requests in flight at the first signal, and stops them at the second."""

    def __init__(self, service: Service, key: str = "", port: int = 0):
        options: dict[str, Any] = {"log_level": "warning", "access_log": False, "lifespan": "off"}
        super().__init__(uvicorn.Config(Api(service, key).app, port=port, **options))
        self.service = service

    def handle_exit(self, sig: int, frame: object) -> None:
        """A handler of SIGTERM and SIGINT. uvicorn's own would print a traceback per connection."""
        if self.should_exit:
            for cancel in self.service.cancels:
                cancel.set()
        elif count := self.service.active:
            console.note(f"finishing {count} answer{'s' * (count != 1)}; press Ctrl-C again to stop")
        self.should_exit = True


def run_server(
    path: Path,
    config: Config,
    cutoff: Cutoff | None,
    off: str,
    name: str,
    host: str,
    port: int,
    parallel: int | None,
    as_json: bool = False,
) -> None:
    """Serve a GGUF until SIGTERM or Ctrl-C; `off` says why answers are not reviewed. Raises UsageError."""
    key = os.environ.get(KEY, "")
    if not key and host not in ("127.0.0.1", "localhost", "::1"):
        raise UsageError(f"--host {host} is open to other machines and needs a key", f"set {KEY} to a secret")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        message = f"cannot listen on {host}:{port}: {error.strerror}"
        raise UsageError(message, "choose another --port or --host") from None
    settings = Settings.of(config, cutoff, "" if off else config.review.mode)
    with listener, open_gguf(path, config.eval.context, parallel) as engine:
        service = Service(engine, name, settings, engine.parallel)
        shown = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        served = f"{console.escape(f'{path.name} at {shown}')}/v1 as [bold]{console.escape(name)}[/]"
        console.note(f"{served}; chat at {console.escape(shown)}/")
        if as_json:
            address = {"url": f"{shown}/v1", "model": name, "file": str(path), "note": off}
            console.print_json(address, line=True)
        if off:
            console.note(f"[dim]{console.escape(off)}[/]")
        try:
            Server(service, key).run(sockets=[listener])
        finally:
            service.pool.shutdown()
