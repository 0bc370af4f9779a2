"""Read a chat completion from a body with status 200."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sclite.trace import THOUGHT, without_thoughts

EMPTY, CUT_IN_REASONING = "empty", "cut_in_reasoning"
"""Our own finish reasons: there is no reply, or only reasoning; the token budget was spent on reasoning."""


class ErrorReply(ConnectionError):
    """An error in a body with status 200; `status_code` is the one in the body, None if there is none."""

    def __init__(self, message: str, status_code: int | None):
        super().__init__(message)
        self.status_code = status_code


@dataclass(frozen=True)
class Completion:
    """A parsed reply."""

    text: str
    finish_reason: str
    tokens: tuple[int | None, int | None]  # of prompt and completion; None without valid counts
    body: Mapping[str, Any]


def clean_text(text: str) -> str:
    """The text with surrogate pairs joined, and lone surrogates, which cannot be stored, as U+FFFD."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def read(body: object) -> Completion:
    """The reply in a parsed body. Raises ErrorReply; ConnectionError if it is no chat completion."""
    if not isinstance(body, Mapping):
        raise ConnectionError("the reply is not a chat completion")
    error = body.get("error")  # with status 200; some endpoints send an empty one with a valid reply
    fields = error if isinstance(error, Mapping) else {"message": error}
    if fields.get("message"):
        code = fields.get("code")
        raise ErrorReply(str(fields["message"]), code if isinstance(code, int) else None)
    try:
        choice = body["choices"][0]
        message, reason = choice["message"], choice.get("finish_reason")
        found = [message.get("content"), message.get("reasoning_content") or message.get("reasoning")]
        # Mistral sends a list of parts: the text parts count, the thinking parts do not
        found = [
            "".join(str(part.get("text", "")) for part in each) if isinstance(each, list) else each
            for each in found
        ]
    except (AttributeError, LookupError, TypeError):
        raise ConnectionError("the reply has no choices") from None
    content, reasoning = (clean_text(each) if isinstance(each, str) else "" for each in found)
    text = without_thoughts(content).strip()
    if THOUGHT.match(text) or text.startswith("<|channel|>"):  # reasoning that never ends is not a reply
        text = ""

    counts = body.get("usage")
    usage: Mapping[str, Any] = counts if isinstance(counts, Mapping) else {}
    details = usage.get("completion_tokens_details")
    reported = details.get("reasoning_tokens") if isinstance(details, Mapping) else None
    # a count is None unless it is a positive integer of plausible size
    prompt, written, thought = (
        value if type(value) is int and 0 < value < 2**31 else None
        for value in (usage.get("prompt_tokens"), usage.get("completion_tokens"), reported)
    )
    size, whole = len(text.encode()), len((content + reasoning).encode())
    # an unknown reason counts as stop: the reply is checked anyway
    finish = reason if reason in ("length", "content_filter") else "stop"
    if finish == "stop" and not text:
        finish = EMPTY
    elif finish == "length":
        # endpoints that hide the reasoning may not report it either, but a visible token has at least one byte
        reasoned = max(thought or 0, (written or 0) - size)
        if not text or whole > 2 * size or 2 * reasoned > (written or 0):
            finish = CUT_IN_REASONING
    return Completion(text, finish, (prompt, written), body)
