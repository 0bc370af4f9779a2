"""What a failed call means: retry it, drop the request, or stop. No message here contains a key."""

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from sclite import config
from sclite.errors import TeacherError
from sclite.teacher.reply import ErrorReply, clean_text

RETRY, REFUSED, STOP = "retry", "refused", "stop"
_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD", re.I)
_PROVIDER_PREFIX = re.compile(
    r"^(?:(?:litellm\.)?\w*(?:Error|Exception|Timeout)\b(?: code: \d+)?(?:\s+-)?[:\s]+|-\s+)+"
)
_JSON_MESSAGE = re.compile(r"""(["'])message\1:\s*(["'])((?:\\.|(?!\2).)+)""", re.S)
_NO_KEY = re.compile(r"missing credentials|missing \w* ?api.?key|api_key client option must be set", re.I)
_BAD_KEY = re.compile(r"api key (?:not valid|expired)", re.I)  # Gemini's, with status 400
_NO_CREDIT = re.compile(
    r"insufficient_quota|exceeded your current quota|credit balance is too low|insufficient balance"
    r"|reached your specified api usage limits"  # Anthropic's and DeepSeek's, with status 400
    r"|budget has been exceeded",  # from LiteLLM's proxy, with status 422
    re.I,
)
_RETRY_IN = re.compile(r"retry in (\d+(?:\.\d+)?)s\b")  # Gemini's, which sends no header
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
    free: bool  # it costs nothing
    overload: bool  # fewer concurrent calls would help
    late: bool  # no reply in time
    no_key: bool
    no_credit: bool
    retry_after: float | None  # seconds, as the endpoint asks


def read_failure(error: BaseException) -> Failure:
    """Interpret an error of LiteLLM, OpenAI's SDK, httpx or a socket."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    text, code = str(error), getattr(error, "status_code", None)
    status = code if isinstance(code, int) else None
    # LiteLLM makes up a response without headers for a broken connection
    responses: list[Any] = [getattr(each, "response", None) for each in chain]
    responses = [response for response in responses if getattr(response, "headers", None)]
    headers = getattr(error, "litellm_response_headers", None) or (responses[0].headers if responses else {})

    body = getattr(error, "body", None)
    shown = body.get("message") if isinstance(body, Mapping) else None
    if not isinstance(shown, str) or not shown:
        shown = next((str(each) for each in chain if str(each) not in ("", "Connection error.")), "")
    inner = _JSON_MESSAGE.search(shown)
    line = " ".join(redact(inner[3].replace('\\"', '"') if inner else shown).split())
    message = _PROVIDER_PREFIX.sub("", clean_text(line)) or type(error).__name__
    message = message if len(message) <= 200 else message[:200] + ".."

    no_key, pause = bool(_NO_KEY.search(text)), _RETRY_IN.search(text)
    no_credit = _NO_CREDIT.search(text) and ("PerDay" in text or not (pause or "PerMinute" in text))
    redirected, unknown = 300 <= (status or 0) < 400, status == 404 and _NO_MODEL.search(message)
    if status in (401, 402) or no_key or no_credit or redirected or unknown or _BAD_KEY.search(text):
        action = STOP
    else:
        transient = status is None or status in (408, 409, 425, 429) or status >= 500
        action = RETRY if transient else REFUSED

    # after a connection that broke, or a body that is not a reply, the reply may have been charged for
    unreached = any(
        type(each).__name__ in _UNREACHED or isinstance(each, ConnectionRefusedError) for each in chain
    )
    refused = isinstance(error, ErrorReply) or any(response.status_code >= 300 for response in responses)
    late, retry_after = isinstance(error, TimeoutError), float(pause[1]) if pause else None
    with suppress(KeyError, ValueError):  # it may be a date
        retry_after = float(headers["retry-after"])
    return Failure(
        action,
        status,
        headers,
        message,
        free=refused or unreached or no_key,  # LiteLLM's error for a missing key: nothing was sent
        overload=late or status in (408, 429, 529) or "rate limit" in text.lower(),
        late=late,
        no_key=no_key,
        no_credit=bool(no_credit),
        retry_after=retry_after,
    )


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
