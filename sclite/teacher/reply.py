"""What a chat completion says, read from any body that came with status 200."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sclite.trace import without_thoughts

EMPTY, REFUSAL, ONLY_REASONING = "empty", "refusal", "only_reasoning"
"""Finish reasons of our own, for replies that say nothing, decline, or never get beyond their reasoning."""

_LENGTH = ("length", "max_tokens", "max_output_tokens", "model_length")
_FILTERED = ("content_filter", "content_filtered", "safety")
_CALLS = ("tool_calls", "function_call", "tool_use")
_LARGEST_COUNT = 2**40  # tokens; SQLite's integers end at 2**63
_CONTROL = re.compile(
    r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]"
)  # not tab and line ends


class UnreadableReply(ConnectionError):
    """A body with status 200 that is no chat completion. `paid`: the teacher may have written, and charged for, it."""

    def __init__(self, message: str, paid: bool = True):
        super().__init__(message)
        self.paid = paid


class ErrorReply(ConnectionError):
    """An error in a body with status 200; `status_code` is the one that it names, None where it names none."""

    def __init__(self, message: str, status_code: int | None):
        super().__init__(message)
        self.status_code = status_code


@dataclass(frozen=True)
class Said:
    """A reply as it was read.

    `tokens` (sent, written) are None where the endpoint does not count, or not in numbers. `written_bytes` counts the
    text and the reasoning before it; `listed_usd` is what LiteLLM's price list makes of the reply.
    """

    text: str
    finish_reason: str
    tokens: tuple[int | None, int | None]
    written_bytes: int = 0
    listed_usd: float | None = None


def clean(text: str) -> str:
    """The text with halves of surrogate pairs joined, lone ones as U+FFFD, and without control characters."""
    if text.isascii() and text.isprintable():
        return text
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return _CONTROL.sub("", whole)


def decode(body: bytes) -> Any:
    """The JSON of a body. Raises UnreadableReply where it is none, or nested deeper than Python reads."""
    try:
        return json.loads(body.decode("utf-8-sig", errors="replace"))
    except RecursionError:
        raise UnreadableReply("a reply of JSON that is nested too deep") from None
    except ValueError:
        said = " ".join(clean(body[:80].decode(errors="replace")).split())
        html = said.startswith("<")
        raise UnreadableReply(
            f"a reply that is no JSON: {said}" if said else "an empty reply", paid=not html
        ) from None


def read(body: Any, listed_usd: float | None = None) -> Said:
    """The reply in a decoded body. Raises ErrorReply and UnreadableReply."""
    if not isinstance(body, Mapping):
        raise UnreadableReply("a reply that is no chat completion")
    _raise_error(body.get("error"))
    choice = _first_choice(body)
    message = choice.get("message") or choice.get("delta") or {"content": choice.get("text")}
    if not isinstance(message, Mapping):
        raise UnreadableReply("a reply without a message")
    content = clean(_text(message.get("content")))
    reasoning = clean(_text(message.get("reasoning_content") or message.get("reasoning")))
    text, refusal = without_thoughts(content).strip(), message.get("refusal")
    finish = _finish(choice.get("finish_reason"))
    if finish == "stop" and message.get("tool_calls"):
        finish = "tool_calls"
    if finish == "stop" and not text.strip():
        finish = ONLY_REASONING if content.strip() or reasoning.strip() else EMPTY
        if isinstance(refusal, str) and refusal.strip():
            text, finish = clean(refusal), REFUSAL
    written = len(content.encode()) + len(reasoning.encode())
    return Said(text, finish, _tokens(body.get("usage")), written, listed_usd)


def _raise_error(error: Any) -> None:
    """Some endpoints put an error into a body with status 200, some an empty one beside a good reply."""
    if isinstance(error, Mapping):
        code, said = error.get("code"), error.get("message")
        if not said and code is None:
            return
        status = int(code) if isinstance(code, int) or (isinstance(code, str) and code.isdecimal()) else None
        if status is None and "rate_limit" in str(code):
            status = 429
        raise ErrorReply(clean(str(said or f"error {code}")), status)
    if error:
        raise ErrorReply(clean(str(error)), None)


def _first_choice(body: Mapping[str, Any]) -> Mapping[str, Any]:
    choices = body.get("choices")
    found = [c for c in choices if isinstance(c, Mapping)] if isinstance(choices, list) else []
    if not found:
        raise UnreadableReply("a reply without any choice")
    return next((c for c in found if c.get("index") == 0), found[0])


def _text(content: Any) -> str:
    """A content as text: of a list of parts (Mistral and others) those that are text, without the thinking ones."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    texts = (part.get("text") if isinstance(part, Mapping) else part for part in parts)
    return "".join(text for text in texts if isinstance(text, str))


def _finish(reason: Any) -> str:
    """Why a reply ended, in OpenAI's words. A word that nobody knows is no reason against it: the reply is checked."""
    if not isinstance(reason, (str, type(None))):
        return "unreadable"
    name = (reason or "").strip().lower()
    for ours, theirs in (("length", _LENGTH), ("content_filter", _FILTERED), ("tool_calls", _CALLS)):
        if name in theirs:
            return ours
    return "stop"


def _tokens(usage: Any) -> tuple[int | None, int | None]:
    if not isinstance(usage, Mapping):
        return None, None
    return _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))


def _count(value: Any) -> int | None:
    """A number of tokens; None for what is no whole number above 0, or absurd."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return int(value) if number and 0 < value <= _LARGEST_COUNT and value == int(value) else None
