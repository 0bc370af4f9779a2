"""What a failed call means: retry it, drop the request, or stop. No message here contains a key."""

import math
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

from sclite import config
from sclite.errors import TeacherError
from sclite.teacher.reply import ErrorReply, UnreadableReply, clean_text

RETRY, REFUSED, STOP = "retry", "refused", "stop"
LONGEST_WAIT_SECONDS = 300.0  # a server that asks for a longer wait counts as not answering
_BACKOFF_SECONDS, _LONGEST_BACKOFF_SECONDS = 0.5, 60.0
_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD", re.I)
_PROVIDER_PREFIX = re.compile(
    r"^(?:(?:litellm\.)?\w*(?:Error|Exception|Timeout)\b(?: code: \d+)?(?:\s+-)?[:\s]+|-\s+)+"
)
_JSON_TEXT = r"""(["']){}\1:\s*(["'])((?:\\.|(?!\2).)+)"""
_NO_KEY = re.compile(r"missing credentials|missing \w* ?api.?key|api_key client option must be set", re.I)
_BAD_KEY = re.compile(r"api key (?:not valid|expired)", re.I)  # Gemini's, with status 400
_NO_CREDIT = re.compile(
    r"insufficient_quota|exceeded your current quota|credit balance is too low|insufficient balance"
    r"|reached your specified api usage limits"  # Anthropic's and DeepSeek's, with status 400
    r"|budget has been exceeded",  # from LiteLLM's proxy, with status 422
    re.I,
)
_RETRY_IN = re.compile(r"retry in (\d+(?:\.\d+)?)(m?)s\b")  # Gemini's, which sends no header
_NO_MODEL = re.compile(r"\bmodels?\b", re.I)
_PASSWORD = re.compile(r"(?<=://)[^/\s@]*(?:@[^/\s@]*)*@")
_UNREACHED = ("ConnectError", "ConnectTimeout", "ProxyError", "UnsupportedProtocol", "ClientConnectorError")
"""Errors of httpx and aiohttp for a request that never reached the endpoint."""


@dataclass(frozen=True)
class Failure:
    """A failed call."""

    action: str  # RETRY, STOP if every request would fail so, REFUSED if only this one does
    status: int | None  # None and no headers if there was no response
    headers: Mapping[str, str]
    message: str  # the endpoint's own, in one line
    answered: bool  # the endpoint itself sent the error
    unreadable: bool  # it sent something that is not a chat completion
    free: bool  # it costs nothing
    overload: bool  # fewer concurrent calls would help
    no_key: bool
    no_credit: bool

    def wait_seconds(self, attempt: int, draw: float) -> float:
        """How long to wait after failed attempt `attempt` (from 1): Retry-After if sent, else exponential backoff."""
        for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
            value = self.headers.get(name, "")
            try:
                seconds = float(value) * unit
            except ValueError:
                try:
                    seconds = parsedate_to_datetime(value).timestamp() - time.time()
                except (ValueError, OverflowError):
                    continue
            if math.isfinite(seconds):
                return max(0.0, seconds) * (1 + draw / 10)
        # `draw` (0 to 1) shortens the backoff by up to half, so that workers do not all come back at once
        return min(_LONGEST_BACKOFF_SECONDS, _BACKOFF_SECONDS * 2 ** (attempt - 1)) * (1 - draw / 2)


def read_failure(error: BaseException) -> Failure:
    """Interpret an error of LiteLLM, OpenAI's SDK, httpx or a socket."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    text, code = str(error), getattr(error, "status_code", None)
    status = code if isinstance(code, int) else None
    response = getattr(error, "response", None)
    headers = getattr(error, "litellm_response_headers", None) or getattr(response, "headers", None) or {}

    body = getattr(error, "body", None)
    shown = body.get("message") if isinstance(body, Mapping) else None
    if not isinstance(shown, str) or not shown:
        shown = next((str(link) for link in chain if str(link) not in ("", "Connection error.")), "")
    # the message inside JSON, then that of the provider behind OpenRouter
    inner = [re.search(_JSON_TEXT.format(key), shown, re.S) for key in ("message", "raw")]
    escaped = [found[3].replace("\\/", "/").encode("latin-1", "backslashreplace") for found in inner if found]
    shown = ": ".join(text.decode("unicode_escape", "replace") for text in escaped) or shown
    lines = clean_text(redact(shown)).partition("Traceback (most recent")[0].strip().splitlines()
    message = _PROVIDER_PREFIX.sub("", lines[0] if lines else "").strip() or type(error).__name__
    message = message if len(message) <= 200 else message[:200] + ".."

    no_key, pause = bool(_NO_KEY.search(text)), _RETRY_IN.search(text)
    no_credit = _NO_CREDIT.search(text) and ("PerDay" in text or not (pause or "PerMinute" in text))
    redirected, unknown = 300 <= (status or 0) < 400, status == 404 and _NO_MODEL.search(message)
    if status in (401, 402) or no_key or no_credit or redirected or unknown or _BAD_KEY.search(text):
        action = STOP
    else:
        transient = status is None or status in (408, 409, 425, 429) or status >= 500
        action = RETRY if transient else REFUSED

    # LiteLLM gives a status to broken connections, too
    answered = bool(headers) or isinstance(error, ErrorReply)
    # after a connection that broke, or a body that is not a reply, the reply may have been charged for
    free = isinstance(error, ErrorReply) or (answered and (status or 0) >= 300)
    for link in chain:
        real = type(link).__module__.partition(".")[0] in ("openai", "httpx")
        received = real and (getattr(getattr(link, "response", None), "status_code", 0) or 0) >= 300
        unreached = type(link).__name__ in _UNREACHED or isinstance(link, ConnectionRefusedError)
        free = free or received or unreached
    free = free or no_key  # LiteLLM's own error: nothing was sent
    if isinstance(error, UnreadableReply):
        free = not error.paid
    if pause:
        headers = {f"retry-after{'-ms' * bool(pause[2])}": pause[1], **headers}
    slow = isinstance(error, TimeoutError) or status in (408, 429, 529)
    return Failure(
        action, status, headers, message, answered,
        unreadable=isinstance(error, UnreadableReply),
        free=free,
        overload=slow or "rate limit" in text.lower(),
        no_key=no_key,
        no_credit=bool(no_credit),
    )  # fmt: skip


def redact(text: str) -> str:
    """The text without passwords in URLs and without the value of any environment variable named like a secret."""
    text = _PASSWORD.sub("", text)
    for name, value in os.environ.items():
        if len(value) >= 6 and _SECRET_NAME.search(name):
            text = text.replace(value, "***")
    return text


def teacher_error(
    failure: Failure, settings: config.Teacher, key_variable: str, attempts: int = 0
) -> TeacherError:
    """The error that ends the stage, after `attempts` without an answer (0: it refuses every request)."""
    address, status = config.without_password(settings.api_base), failure.status
    where = f"teacher {settings.model} at {address}" if address else f"teacher {settings.model}"
    if attempts:
        hint = "check that it is running and that teacher.api_base is correct"
        if failure.overload and status in (429, 529):
            hint = "lower teacher.concurrency, or set teacher.requests_per_minute"
        elif failure.overload:
            hint += "; if it is only slow, raise teacher.timeout_seconds or lower teacher.concurrency"
        hint += "; paid replies are kept, re-run to resume"
        problem = f"does not answer after {attempts} attempt{'s' * (attempts != 1)}: {failure.message}"
    elif failure.no_key or status == 401:
        problem = "has no key" if failure.no_key else "rejects the key (HTTP 401)"
        hint = f"the key comes from {key_variable}: export {key_variable}=..."
    elif failure.no_credit or status in (402, 429):
        problem, hint = f"has no credit left: {failure.message}", "add credit, then re-run to resume"
    elif status is not None and 300 <= status < 400:
        location = redact(failure.headers.get("location", "")) or "another address"
        problem = f"redirects to {location} (HTTP {status})"
        hint = "set teacher.api_base to the final address"
    else:
        problem = f"refuses the request: {failure.message}"
        hint = f"check teacher.model and teacher.api_base; the key comes from {key_variable}"
    return TeacherError(f"{where} {problem}", hint)
