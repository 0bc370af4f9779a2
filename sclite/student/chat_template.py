"""Chat templates in Jinja: render messages as transformers does, whether or not the template takes a system message."""

import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from sclite.errors import DataError
from sclite.helper_process import HelperProcess
from sclite.student.base import Messages

SECONDS, BYTES, CHARACTERS = 10, 1 << 30, 4_000_000
"""Limits of one rendering: seconds, memory, and length of the text."""
TODAY = datetime(2024, 7, 26)
"""The date for templates that write today's: training, evaluation and the exported file must agree on any day."""
FAILURES = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What a template can raise, in addition to Jinja's own errors."""
_HINT = "use another base model, or fix its chat template"
_OPEN = re.compile(r"<(think|thinking|thought)>\s*\Z")


def render_chat(
    template: str,
    messages: Messages,
    tokens: Mapping[str, str] | None = None,
    *,
    generation_prompt: bool = True,
) -> str:
    """The messages in a chat template, rendered as transformers does; `tokens` are bos_token, eos_token ..

    A system message that the template rejects or drops is put before the first user message. A prompt that ends in an
    open `<think>` gets an empty block. Raises DataError if the messages cannot be rendered.
    """
    system = [message["content"] for message in messages if message["role"] == "system"]
    merged = [dict(message) for message in messages if message["role"] != "system"]
    first = next((message for message in merged if message["role"] == "user"), None)
    if first is not None:
        first["content"] = "\n\n".join([*system, first["content"]])
    reply = _render(template, messages, tokens, generation_prompt)
    if "error" in reply or not all(text.strip() in reply["text"] for text in system):
        reply = _render(template, tuple(merged), tokens, generation_prompt)
    if "error" in reply:
        raise DataError(f"the chat template cannot render the messages: {reply['error']}", _HINT)
    text = reply["text"]
    if generation_prompt and (opened := _OPEN.search(text)):
        return f"{text.rstrip()}\n\n</{opened[1]}>\n\n"
    return text


def _render(
    template: str, messages: Messages, tokens: Mapping[str, str] | None, generation_prompt: bool
) -> dict[str, str]:
    """{"text": ..} or {"error": ..}, from a separate process, because templates come with model files."""
    values = {"add_generation_prompt": generation_prompt, "enable_thinking": False, **(tokens or {})}
    try:
        return renderer.ask([template, messages, values], SECONDS)
    except (TimeoutError, EOFError) as error:
        raise DataError(f"the chat template cannot be rendered: {error}", _HINT) from None


def opens_thinking(template: str, tokens: Mapping[str, str]) -> bool:
    """Whether the template's own prompt ends in an open `<think>`, which `render_chat` closes."""
    reply = _render(template, ({"role": "user", "content": "a"},), tokens, True)
    return bool(_OPEN.search(reply.get("text", "")))


def load_renderer() -> Callable[[Any], dict[str, str]]:
    """The function of the rendering process, which returns {"text": ..} or {"error": ..}. Loads transformers."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    def render(request: Any) -> dict[str, str]:
        template, messages, values = request
        values["strftime_now"] = TODAY.strftime
        try:
            text = render_jinja_template([messages], chat_template=template, **values)[0][0]
            if len(text) > CHARACTERS:
                raise ValueError(f"it writes more than {CHARACTERS:,} characters")
            return {"text": text}
        except MemoryError:
            return {"error": f"it takes more than {BYTES >> 20} MB"}
        except (TemplateError, *FAILURES) as error:
            return {"error": str(error) or type(error).__name__}

    return render


renderer = HelperProcess("template renderer", __name__, "load_renderer", BYTES, "reinstall transformers")
"""Starting takes a second, so whatever loads a model starts it first."""
