"""HTTP clients that do not trust the server: bounded, uncompressed replies, and no redirects."""

import os
import resource
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from sclite.errors import UsageError

if TYPE_CHECKING:
    import httpx

MAX_BODY_BYTES = 4 * 2**20
"""128,000 tokens as JSON take less than 1 MiB, 3 MiB with every character escaped."""
_KEEP_ALIVE_SECONDS = 4.0  # uvicorn, and so vLLM, closes idle connections after 5
_OTHER_FILES = 128  # open files other than connections


def open_client() -> "httpx.AsyncClient":
    """A client for one call at a time: each request costs httpcore's pool time quadratic in its connections."""
    import httpx

    limits = httpx.Limits(keepalive_expiry=_KEEP_ALIVE_SECONDS)
    return bound_client(httpx.AsyncClient(limits=limits, timeout=None, verify=_certificates()))


@cache
def _certificates() -> "ssl.SSLContext | str | bool":
    from litellm.llms.custom_httpx.http_handler import get_ssl_configuration

    return get_ssl_configuration()


def bound_client(client: "httpx.AsyncClient") -> "httpx.AsyncClient":
    """Restrict what the client accepts, and return it."""
    client.follow_redirects = False  # 301 to 303 would repeat the request as a GET, others elsewhere
    client.event_hooks = {"request": [_request_identity], "response": [_bound_body]}
    return client


def bound_litellm() -> None:
    """Restrict every client that LiteLLM creates for asynchronous calls in the same way. Idempotent."""
    from litellm.llms.custom_httpx.http_handler import AsyncHTTPHandler
    from litellm.llms.openai.common_utils import BaseOpenAILLM

    for owner, name in ((AsyncHTTPHandler, "create_client"), (BaseOpenAILLM, "_get_async_http_client")):
        make = getattr(owner, name)
        if not hasattr(make, "bounds"):
            static = isinstance(owner.__dict__[name], staticmethod)
            made = _wrap(make)
            setattr(owner, name, staticmethod(made) if static else made)


def _wrap(make: Callable[..., Any]) -> Callable[..., Any]:
    def made(*arguments: Any, **named: Any) -> Any:
        client = make(*arguments, **named)
        return client and bound_client(client)

    made.bounds = True
    return made


async def _request_identity(request: "httpx.Request") -> None:
    request.headers["Accept-Encoding"] = "identity"


async def _bound_body(response: "httpx.Response") -> None:
    import httpx

    # acknowledge the headers now: a server that sends the body separately waits for it, 40 ms if left to Linux
    option = getattr(socket, "TCP_QUICKACK", None)  # Linux only
    stream = response.extensions.get("network_stream")
    found = stream and stream.get_extra_info("socket")
    if option is not None and found is not None:
        found.setsockopt(socket.IPPROTO_TCP, option, 1)
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":  # 1 kB of gzip may hold 1 MB
        raise httpx.DecodingError(f"a reply compressed with {encoding}, which was not requested")
    response.stream = _limited_stream()(response.stream)


@cache
def _limited_stream() -> type:
    import httpx

    class Limited(httpx.AsyncByteStream):
        def __init__(self, stream: httpx.AsyncByteStream):
            self.stream = stream

        async def __aiter__(self) -> AsyncIterator[bytes]:
            size = 0
            async for chunk in self.stream:
                size += len(chunk)
                if size > MAX_BODY_BYTES:
                    raise httpx.ReadError(f"a reply of more than {MAX_BODY_BYTES >> 20} MiB")
                yield chunk

        async def aclose(self) -> None:
            await self.stream.aclose()

    return Limited


# -- before the first request --------------------------------------------------------------------------------------


def check_certificates() -> None:
    """Raise UsageError if SSL_CERT_FILE holds no certificates: every call would fail."""
    path = os.environ.get("SSL_CERT_FILE")
    if not path:
        return
    try:
        ssl.create_default_context(cafile=path)
    except OSError as error:  # ssl.SSLError among them
        why = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        raise UsageError(
            f"SSL_CERT_FILE={path} {why}",
            "fix the path, or unset SSL_CERT_FILE to use the system's certificates",
        ) from None


def allow_connections(count: int, setting: str = "teacher.concurrency") -> None:
    """Raise the limit on open files for this many connections; UsageError if the system forbids it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + _OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UsageError(
            f"{setting} = {count} needs {needed} open files, and this system allows {hard}",
            f"lower it with --set {setting}={max(1, hard - _OTHER_FILES)}, or raise the limit (ulimit -Hn)",
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
