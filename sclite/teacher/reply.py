"""Parse a chat completion from any body with status 200."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from sclite.trace import THOUGHT, without_thoughts

EMPTY, REFUSAL, ONLY_REASONING, CUT_IN_REASONING = "empty", "refusal", "only_reasoning", "cut_in_reasoning"
"""Our own finish reasons: an empty reply, a refusal, no reply after the reasoning, a token budget spent on reasoning."""

_FINISH_REASONS = {
    **dict.fromkeys(("length", "max_tokens", "max_output_tokens", "model_length"), "length"),
    **dict.fromkeys(("content_filter", "content_filtered", "safety"), "content_filter"),
    **dict.fromkeys(("tool_calls", "function_call", "tool_use"), "tool_calls"),
    "unreadable": "unreadable",
}
"""The endpoints' finish reasons in OpenAI's terms; all others count as stop."""
_LARGEST_COUNT = 2**40  # tokens; SQLite's integers end at 2**63
# all but tabs and line ends
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


class UnreadableReply(ConnectionError):
    """A body with status 200 that is not a chat completion. `paid`: it may have been charged for."""

    def __init__(self, message: str, paid: bool = True):
        super().__init__(message)
        self.paid = paid


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
    reply_bytes: int  # of the reasoning and the text
    listed_usd: float | None  # the cost by LiteLLM's price list


def clean_text(text: str) -> str:
    """The text with surrogate pairs joined, lone surrogates as U+FFFD, and without control characters."""
    if text.isascii() and text.isprintable():
        return text
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return _CONTROL.sub("", whole)


def decode(body: bytes) -> object:
    """Parse the JSON body. Raises UnreadableReply if it is invalid or nested too deep for Python."""
    try:
        return json.loads(body.decode("utf-8-sig", errors="replace"))
    except RecursionError:
        raise UnreadableReply("the JSON of the reply is nested too deep") from None
    except ValueError:
        start = " ".join(clean_text(body[:80].decode(errors="replace")).split())
        why = f"the reply is not JSON: {start}" if start else "the reply is empty"
        raise UnreadableReply(why, paid=not start.startswith("<")) from None


def read(body: object, listed_usd: float | None = None) -> Completion:
    """The reply in a parsed body. Raises ErrorReply and UnreadableReply."""
    if not isinstance(body, Mapping):
        raise UnreadableReply("the reply is not a chat completion")
    error = body.get("error")  # with status 200; some endpoints send an empty one with a valid reply
    fields = error if isinstance(error, Mapping) else {"message": error}
    code, said = fields.get("code"), fields.get("message")
    if said or code is not None:
        status = int(code) if isinstance(code, (int, str)) and re.fullmatch(r"\d{3}", str(code)) else None
        status = 429 if status is None and "rate_limit" in str(code) else status
        raise ErrorReply(clean_text(str(said or f"error {code}")), status)
    choices = body.get("choices")
    found = [c for c in choices if isinstance(c, Mapping)] if isinstance(choices, list) else []
    if not found:
        raise UnreadableReply("the reply has no choices")
    choice = next((c for c in found if c.get("index") == 0), found[0])
    message = choice.get("message") or choice.get("delta") or {"content": choice.get("text")}
    if not isinstance(message, Mapping):
        raise UnreadableReply("the reply has no message")
    content = clean_text(_text(message.get("content")))
    reasoning = clean_text(_text(message.get("reasoning_content") or message.get("reasoning")))
    text, refusal = without_thoughts(content).strip(), message.get("refusal")
    if THOUGHT.match(text) or text.startswith("<|channel|>"):  # reasoning that never ends is not a reply
        text = ""

    reason = choice.get("finish_reason")
    name = (reason or "").strip().lower() if isinstance(reason, (str, type(None))) else "unreadable"
    finish = _FINISH_REASONS.get(name, "stop")  # also an unknown one: the reply is checked anyway
    if finish == "stop" and message.get("tool_calls"):
        finish = "tool_calls"
    if finish == "stop" and not text:
        finish = ONLY_REASONING if content.strip() or reasoning.strip() else EMPTY
        if isinstance(refusal, str) and refusal.strip():
            text, finish = clean_text(refusal), REFUSAL

    usage = body.get("usage")
    counts = usage if isinstance(usage, Mapping) else {}
    tokens = _count(counts.get("prompt_tokens")), _count(counts.get("completion_tokens"))
    size, reply_bytes, written = len(text.encode()), len((content + reasoning).encode()), tokens[1] or 0
    details = counts.get("completion_tokens_details")
    reported = _count(details.get("reasoning_tokens")) if isinstance(details, Mapping) else None
    # endpoints that hide the reasoning may not report it either, but a visible token has at least one byte
    reasoned = max(reported or 0, written - size)
    if finish == "length" and (not text or reply_bytes > 2 * size or 2 * reasoned > written):
        finish = CUT_IN_REASONING
    return Completion(text, finish, tokens, reply_bytes, listed_usd)


def _text(content: object) -> str:
    """The content as text. Mistral and others send a list of parts: the text parts count, the thinking parts do not."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    texts = (part.get("text") if isinstance(part, Mapping) else part for part in parts)
    return "".join(text for text in texts if isinstance(text, str))


def _count(value: object) -> int | None:
    """A token count; None unless it is a positive integer of plausible size."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= _LARGEST_COUNT:
        return None
    return int(value) if value == int(value) else None
