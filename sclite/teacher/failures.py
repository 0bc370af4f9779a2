"""What a failed call means: try again, leave this request out, or stop everything. Nothing here names a key."""

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
LONGEST_WAIT_SECONDS = 300.0  # a server that wants a longer pause counts as one that does not answer
_BACKOFF_SECONDS, _LONGEST_BACKOFF_SECONDS = 0.5, 60.0
_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD", re.I)
_PROVIDER_PREFIX = re.compile(r"^(?:(?:litellm\.)?\w*(?:Error|Exception|Timeout)\b(?:\s+-)?[:\s]+|-\s+)+")
_NO_KEY = re.compile(r"missing credentials|missing \w* ?api.?key|api_key client option must be set", re.I)
_NO_CREDIT = re.compile(r"insufficient_quota|exceeded your current quota", re.I)
_PASSWORD = re.compile(r"(?<=://)[^/\s@]*(?:@[^/\s@]*)*@")
_UNREACHED = ("ConnectError", "ConnectTimeout", "ProxyError", "UnsupportedProtocol", "ClientConnectorError")
"""Classes of httpx and aiohttp for a request that never reached the endpoint."""
_NO_MODEL = re.compile(r"\bmodels?\b", re.I)


def status(error: BaseException) -> int | None:
    """The HTTP status of a failed call, None where no reply came."""
    code = getattr(error, "status_code", None)
    return code if isinstance(code, int) else None


def headers(error: BaseException) -> Mapping[str, str]:
    """The headers of the reply that says so; empty where no reply came."""
    response = getattr(error, "response", None)
    return getattr(error, "litellm_response_headers", None) or getattr(response, "headers", None) or {}


def verdict(error: BaseException) -> str:
    """RETRY for what may pass (rate limits, server errors, time-outs, lost connections, HTML instead of JSON), STOP
    for what no other request can escape (a bad key, an unknown model, no credit), REFUSED for this request alone."""
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


def timed_out(error: BaseException) -> bool:
    """Whether the time limit of a call has passed; its reply may be written, and paid for, all the same."""
    return isinstance(error, TimeoutError) or status(error) == 408


def unreadable(error: BaseException) -> bool:
    """Whether the endpoint has answered, but with something that is no chat completion."""
    return any(isinstance(link, UnreadableReply) for link in _chain(error))


def answered(error: BaseException) -> bool:
    """Whether the endpoint has said so itself; LiteLLM gives a status to connections that broke, too."""
    return bool(headers(error)) or isinstance(error, ErrorReply)


def unpaid(error: BaseException) -> bool:
    """Whether a failed request costs nothing: it never reached the endpoint, or came back with an error status.

    All others may have been written, and charged for: a connection that broke, a body that is no reply.
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
    return answered(error) and (status(error) or 0) >= 300


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what caused it, the outermost first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def overloaded(error: BaseException) -> bool:
    """Whether fewer calls at once would help."""
    return timed_out(error) or status(error) in (429, 529) or "rate limit" in str(error).lower()


def wait_seconds(error: BaseException, attempt: int, draw: float) -> float:
    """How long to wait after failed attempt `attempt` (from 1): what Retry-After says, else an exponential back-off
    of which `draw` (0 to 1) takes up to a half away, so that workers do not return all at once."""
    asked = _retry_after(headers(error))
    backoff = min(_LONGEST_BACKOFF_SECONDS, _BACKOFF_SECONDS * 2 ** (attempt - 1))
    return backoff * (1 - draw / 2) if asked is None else asked * (1 + draw / 10)


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


# -- words ---------------------------------------------------------------------------------------------------------


def scrub(text: str) -> str:
    """The text without passwords in URLs, and without any value of an environment variable named like a secret."""
    text = _PASSWORD.sub("", text)
    for name, value in os.environ.items():
        if len(value) >= 6 and _SECRET_NAME.search(name):
            text = text.replace(value, "***")
    return text


def message(error: BaseException) -> str:
    """What the endpoint said, in one line without LiteLLM's wrapping and without secrets."""
    body = getattr(error, "body", None)
    said = body.get("message") if isinstance(body, Mapping) else None
    if not isinstance(said, str) or not said:
        named = [link for link in _chain(error) if str(link) not in ("", "Connection error.")]
        said = str(named[0]) if named else ""
    lines = clean(scrub(said)).partition("Traceback (most recent")[0].strip().splitlines()
    said = _PROVIDER_PREFIX.sub("", lines[0] if lines else "").strip() or type(error).__name__
    return said if len(said) <= 200 else said[:200] + ".."


def stop(error: BaseException, model: str, api_base: str, key_variable: str) -> TeacherError:
    """The fault that ends the stage: which model, where, and what to do about it."""
    where, code = _where(model, api_base), status(error)
    if code == 401 or _NO_KEY.search(str(error)):
        said = "has no key" if _NO_KEY.search(str(error)) else "refuses the key (HTTP 401)"
        return TeacherError(f"{where} {said}", f"the key comes from {key_variable}: export {key_variable}=..")
    if code in (402, 429):
        return TeacherError(
            f"{where} has no credit left: {message(error)}", "add credit, then type the same again"
        )
    if code is not None and 300 <= code < 400:
        moved = scrub(headers(error).get("location", "")) or "another address"
        return TeacherError(
            f"{where} redirects to {moved} (HTTP {code})", "set teacher.api_base to the address that answers"
        )
    return refusing(message(error), model, api_base, key_variable)


def refusing(said: str, model: str, api_base: str, key_variable: str) -> TeacherError:
    """The fault for an endpoint that refuses whatever it is asked."""
    return TeacherError(
        f"{_where(model, api_base)} says: {said}",
        f"check teacher.model and teacher.api_base; the key comes from {key_variable}",
    )


def silent(error: BaseException, model: str, api_base: str, attempts: int) -> TeacherError:
    """The fault for an endpoint that does not answer, however often it is asked."""
    return TeacherError(
        f"{_where(model, api_base)} does not answer after {attempts} {'try' if attempts == 1 else 'tries'}: "
        f"{message(error)}",
        "see that it runs and that teacher.api_base is right; what was paid for is kept, type the same again",
    )


def _where(model: str, api_base: str) -> str:
    return f"teacher {model} at {without_password(api_base)}" if api_base else f"teacher {model}"
