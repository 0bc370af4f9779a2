"""What a failed call means: retry it, drop the request, or stop. No message here contains a key."""

import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from email.utils import parsedate_to_datetime

from sclite.config import without_password
from sclite.errors import TeacherError
from sclite.teacher.reply import ErrorReply, UnreadableReply, clean

RETRY, REFUSED, STOP = "retry", "refused", "stop"
LONGEST_WAIT_SECONDS = 300.0  # a server that asks for a longer wait counts as not answering
_BACKOFF_SECONDS, _LONGEST_BACKOFF_SECONDS = 0.5, 60.0
_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD", re.I)
_PROVIDER_PREFIX = re.compile(r"^(?:(?:litellm\.)?\w*(?:Error|Exception|Timeout)\b(?:\s+-)?[:\s]+|-\s+)+")
_NO_KEY = re.compile(r"missing credentials|missing \w* ?api.?key|api_key client option must be set", re.I)
_NO_CREDIT = re.compile(r"insufficient_quota|exceeded your current quota", re.I)
_NO_MODEL = re.compile(r"\bmodels?\b", re.I)
_PASSWORD = re.compile(r"(?<=://)[^/\s@]*(?:@[^/\s@]*)*@")
_UNREACHED = ("ConnectError", "ConnectTimeout", "ProxyError", "UnsupportedProtocol", "ClientConnectorError")
"""Errors of httpx and aiohttp for a request that never reached the endpoint."""


def status(error: BaseException) -> int | None:
    """The HTTP status of a failed call, None if there was no response."""
    code = getattr(error, "status_code", None)
    return code if isinstance(code, int) else None


def headers(error: BaseException) -> Mapping[str, str]:
    """The headers of the error response; empty if there was no response."""
    response = getattr(error, "response", None)
    return getattr(error, "litellm_response_headers", None) or getattr(response, "headers", None) or {}


def classify(error: BaseException) -> str:
    """RETRY for transient errors (rate limits, server errors, timeouts, lost connections, HTML instead of JSON), STOP
    for errors that every request would meet (bad key, unknown model, no credit), REFUSED for this request alone."""
    code, text = status(error), str(error)
    if code in (401, 402) or _NO_KEY.search(text) or _NO_CREDIT.search(text):
        return STOP
    if code is not None and 300 <= code < 400:
        return STOP
    if code == 404 and _NO_MODEL.search(message(error)):
        return STOP
    if code is None or code in (408, 409, 425, 429) or code >= 500:
        return RETRY
    return REFUSED


def is_timeout(error: BaseException) -> bool:
    """Whether the call timed out; the reply may have been generated, and charged for, all the same."""
    return isinstance(error, TimeoutError) or status(error) == 408


def is_unreadable(error: BaseException) -> bool:
    """Whether the endpoint sent something that is not a chat completion."""
    return any(isinstance(link, UnreadableReply) for link in _chain(error))


def is_response(error: BaseException) -> bool:
    """Whether the endpoint itself sent this error; LiteLLM gives a status to broken connections, too."""
    return bool(headers(error)) or isinstance(error, ErrorReply)


def is_free(error: BaseException) -> bool:
    """Whether a failed request costs nothing: it never reached the endpoint, or an error status came back.

    After any other failure (a connection that broke, a body that is not a reply) the reply may have been charged for.
    """
    for link in _chain(error):
        if isinstance(link, UnreadableReply):
            return not link.paid
        response = getattr(link, "response", None)
        real = isinstance(link, ErrorReply) or type(link).__module__.partition(".")[0] in ("openai", "httpx")
        if isinstance(link, ErrorReply) or (real and (getattr(response, "status_code", 0) or 0) >= 300):
            return True
        if type(link).__name__ in _UNREACHED or isinstance(link, ConnectionRefusedError):
            return True
    return is_response(error) and (status(error) or 0) >= 300


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and its causes, outermost first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def is_overload(error: BaseException) -> bool:
    """Whether fewer concurrent calls would help."""
    return is_timeout(error) or status(error) in (429, 529) or "rate limit" in str(error).lower()


def wait_seconds(error: BaseException, attempt: int, draw: float) -> float:
    """How long to wait after failed attempt `attempt` (from 1): Retry-After if sent, else exponential backoff.

    `draw` (0 to 1) shortens the backoff by up to half, so that workers do not all come back at once.
    """
    requested = _retry_after(headers(error))
    backoff = min(_LONGEST_BACKOFF_SECONDS, _BACKOFF_SECONDS * 2 ** (attempt - 1))
    return backoff * (1 - draw / 2) if requested is None else requested * (1 + draw / 10)


def _retry_after(found: Mapping[str, str]) -> float | None:
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = found.get(name)
        if not value:
            continue
        try:
            seconds = float(value) * unit
        except ValueError:
            try:
                seconds = parsedate_to_datetime(value).timestamp() - time.time()
            except ValueError:
                continue
        if math.isfinite(seconds):
            return max(0.0, seconds)
    return None


# -- messages ------------------------------------------------------------------------------------------------------


def redact(text: str) -> str:
    """The text without passwords in URLs and without the value of any environment variable named like a secret."""
    text = _PASSWORD.sub("", text)
    for name, value in os.environ.items():
        if len(value) >= 6 and _SECRET_NAME.search(name):
            text = text.replace(value, "***")
    return text


def message(error: BaseException) -> str:
    """The endpoint's error message in one line, without LiteLLM's prefixes and without secrets."""
    body = getattr(error, "body", None)
    text = body.get("message") if isinstance(body, Mapping) else None
    if not isinstance(text, str) or not text:
        named = [link for link in _chain(error) if str(link) not in ("", "Connection error.")]
        text = str(named[0]) if named else ""
    lines = clean(redact(text)).partition("Traceback (most recent")[0].strip().splitlines()
    text = _PROVIDER_PREFIX.sub("", lines[0] if lines else "").strip() or type(error).__name__
    return text if len(text) <= 200 else text[:200] + ".."


def stop_error(error: BaseException, model: str, api_base: str, key_variable: str) -> TeacherError:
    """The error that ends the stage after a STOP: which model, where, and how to fix it."""
    where, code = _where(model, api_base), status(error)
    if code == 401 or _NO_KEY.search(str(error)):
        problem = "has no key" if _NO_KEY.search(str(error)) else "rejects the key (HTTP 401)"
        return TeacherError(
            f"{where} {problem}", f"the key comes from {key_variable}: export {key_variable}=.."
        )
    if code in (402, 429):
        return TeacherError(
            f"{where} has no credit left: {message(error)}", "add credit, then re-run to resume"
        )
    if code is not None and 300 <= code < 400:
        location = redact(headers(error).get("location", "")) or "another address"
        return TeacherError(
            f"{where} redirects to {location} (HTTP {code})", "set teacher.api_base to the final address"
        )
    return refusal_error(message(error), model, api_base, key_variable)


def refusal_error(reason: str, model: str, api_base: str, key_variable: str) -> TeacherError:
    """The error for an endpoint that refuses every request."""
    return TeacherError(
        f"{_where(model, api_base)} refuses the request: {reason}",
        f"check teacher.model and teacher.api_base; the key comes from {key_variable}",
    )


def no_answer_error(error: BaseException, model: str, api_base: str, attempts: int) -> TeacherError:
    """The error for an endpoint that does not answer, even after retries."""
    return TeacherError(
        f"{_where(model, api_base)} does not answer after {attempts} attempt{'s' * (attempts != 1)}: {message(error)}",
        "check that it is running and that teacher.api_base is correct; paid replies are kept, re-run to resume",
    )


def _where(model: str, api_base: str) -> str:
    return f"teacher {model} at {without_password(api_base)}" if api_base else f"teacher {model}"
