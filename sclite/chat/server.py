"""An OpenAI-compatible server whose answers are reviewed: the first attempt and the review are the reasoning."""

import asyncio
import hmac
import json
import os
import signal
import socket
import time
import uuid
from collections.abc import AsyncIterator
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from sclite import console
from sclite.chat.answer import Settings
from sclite.chat.service import RAW, ApiError, Completion, End, Piece, Service
from sclite.config import Config
from sclite.errors import UsageError
from sclite.student.llama_cpp.engine import Engine
from sclite.student.llama_cpp.probe import check_gguf

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request as HttpRequest
    from starlette.responses import Response

KEY = "SCLITE_API_KEY"
MOST_BYTES = 1_000_000
"""The largest body."""


def make_app(service: Service, key: str = "") -> "Starlette":
    """The application; `key` is required of every request to /v1 and /metrics if it is not empty."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
    from starlette.routing import Route

    def authorize(request: "HttpRequest") -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        if key and not hmac.compare_digest(given.encode("latin-1"), key.encode()):
            raise ApiError(401, "the API key is missing or wrong", "invalid_api_key")

    async def read(request: "HttpRequest") -> Completion:
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > MOST_BYTES:
                raise ApiError(413, f"the body is larger than {MOST_BYTES:,} bytes", "request_too_large")
        try:
            return Completion.model_validate_json(body)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise ApiError(400, f"{place or 'the body'}: {first['msg']}", None, place or None) from None

    async def complete(request: "HttpRequest") -> "Response":
        authorize(request)
        asked = await read(request)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": asked.model}
        began, items = time.monotonic(), service.run(asked)
        first = await anext(items)  # an error before it has a status of its own

        async def finish(found: list[Piece | End]) -> dict[str, Any]:
            choices = []
            for index in range(asked.n):
                mine = [item for item in found if item.index == index]
                message: dict[str, Any] = {"role": "assistant", "content": ""}
                for piece in mine:
                    if isinstance(piece, Piece):
                        message[piece.field] = message.get(piece.field, "") + piece.text
                end = next(item for item in mine if isinstance(item, End))
                choices.append({"index": index, "message": message, "finish_reason": end.finish} | extra(end))
            return head | {"object": "chat.completion", "choices": choices, "usage": usage(found)}

        async def events() -> AsyncIterator[str]:
            found: list[End] = []
            usual = head | {"object": "chat.completion.chunk"}

            def chunk(**fields: Any) -> str:
                return f"data: {json.dumps(usual | fields)}\n\n"

            try:
                for index in range(asked.n):
                    role = {"index": index, "delta": {"role": "assistant"}, "finish_reason": None}
                    yield chunk(choices=[role])
                item: Piece | End | None = first
                while item is not None:
                    if isinstance(item, Piece):
                        delta, end, more = {item.field: item.text}, None, {}
                    else:
                        found.append(item)
                        delta, end, more = {}, item.finish, extra(item)
                    yield chunk(choices=[{"index": item.index, "delta": delta, "finish_reason": end} | more])
                    item = await anext(items, None)
                if asked.stream_options is not None and asked.stream_options.include_usage:
                    yield chunk(choices=[], usage=usage(found))
                yield "data: [DONE]\n\n"
            except ApiError as error:
                yield f"data: {json.dumps(error.body)}\n\n"
            finally:
                await items.aclose()
                record(began)

        if asked.stream:
            return StreamingResponse(
                events(), media_type="text/event-stream", headers={"cache-control": "no-store"}
            )
        gathering = asyncio.ensure_future(gather(first, items))
        try:
            while not (await asyncio.wait([gathering], timeout=0.5))[0]:
                if await request.is_disconnected():
                    raise ApiError(499, "the client has left")
            return JSONResponse(await finish(gathering.result()))
        finally:
            gathering.cancel()
            await asyncio.wait([gathering])
            await items.aclose()
            record(began)

    def record(began: float) -> None:
        service.counts["request_seconds_count"] += 1
        service.counts["request_seconds_sum"] += time.monotonic() - began

    async def models(request: "HttpRequest") -> "Response":
        authorize(request)
        names = (service.name, service.name + RAW)
        rows = [{"id": n, "object": "model", "created": service.began, "owned_by": "sclite"} for n in names]
        return JSONResponse({"object": "list", "data": rows})

    async def health(_: "HttpRequest") -> "Response":
        return JSONResponse({"status": "ok", "model": service.name, "active": service.active})

    async def metrics(request: "HttpRequest") -> "Response":
        authorize(request)
        rows = [f"sclite_{name} {value:g}" for name, value in sorted(service.counts.items())]
        return PlainTextResponse("\n".join([*rows, f"sclite_active_choices {service.active}", ""]))

    async def page(_: "HttpRequest") -> "Response":
        text = files("sclite.chat").joinpath("page.html").read_text(encoding="utf-8")
        policy = (
            "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"
        )
        return HTMLResponse(text, headers={"content-security-policy": policy})

    async def fail(_: "HttpRequest", error: Exception) -> "Response":
        if isinstance(error, HTTPException):
            error = ApiError(error.status_code, str(error.detail))
        assert isinstance(error, ApiError)
        service.counts[f'errors_total{{status="{error.status}"}}'] += 1
        headers = {"retry-after": "1"} if error.status == 429 else None
        return JSONResponse(error.body, error.status, headers)

    routes = [
        Route("/v1/chat/completions", complete, methods=["POST"]),
        Route("/v1/models", models),
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/", page),
    ]
    local = (
        [] if key else [Middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[::1]"])]
    )
    return Starlette(
        routes=routes, middleware=local, exception_handlers={ApiError: fail, HTTPException: fail}
    )


async def gather(first: Piece | End, items: AsyncIterator[Piece | End]) -> list[Piece | End]:
    """All items in order."""
    return [first, *[item async for item in items]]


def usage(items: list[Piece | End] | list[End]) -> dict[str, int]:
    """The token counts of a response. The prompt counts once, review included in the completion."""
    ends = [item for item in items if isinstance(item, End)]
    prompt, written = max(end.prompt_tokens for end in ends), sum(end.tokens for end in ends)
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def extra(end: End) -> dict[str, Any]:
    """The steps and their review as data, beside OpenAI's fields."""
    return {} if end.answer is None else {"sclite": end.answer.as_json()}


def run_server(
    path: Path,
    config: Config,
    threshold: float | None,
    *,
    off: str,
    name: str,
    host: str,
    port: int,
    parallel: int | None,
) -> None:
    """Serve a GGUF until SIGTERM or Ctrl-C, then finish what is in flight. Raises UsageError.

    `off`: why answers are not reviewed, "" if they are.
    """
    try:
        import uvicorn
    except ImportError:
        raise UsageError("uvicorn and starlette are not installed", "pip install 'sclite[serve]'") from None
    key = os.environ.get(KEY, "")
    if not key and host not in ("127.0.0.1", "localhost", "::1"):
        raise UsageError(f"--host {host} is open to other machines and needs a key", f"set {KEY} to a secret")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise UsageError(
            f"cannot listen on {host}:{port}: {error.strerror}", "choose another --port"
        ) from None
    check_gguf(path)
    with listener, Engine(path, parallel=parallel, context=config.eval.context) as engine:
        settings = Settings(
            mode="" if off else config.review.mode,
            threshold=threshold or 0.0,
            rounds=max(1, config.review.rounds),
            max_tokens=config.eval.max_tokens,
            prompt_folder=config.prompts.folder,
        )
        service = Service(engine, name, settings, engine.parallel)
        shown = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        console.note(
            f"{console.escape(path.name)} at {shown}/v1 as [bold]{console.escape(name)}[/]; chat at {shown}/"
        )
        if off:
            console.note(f"[dim]{console.escape(off)}[/]")
        server = uvicorn.Server(uvicorn.Config(make_app(service, key), log_level="warning", access_log=False))
        before = {
            number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:  # uvicorn finishes what is in flight, then raises the signal again
            server.run(sockets=[listener])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            service.pool.shutdown()
