"""Chat templates in Jinja: render messages as transformers does, whether or not the template takes a system message."""

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sclite.errors import DataError
from sclite.student.base import Messages

TODAY = datetime(2024, 7, 26)
"""The date for templates that write today's: training, evaluation and the exported file must agree on any day."""
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
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    failures = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
    values: dict[str, Any] = {"add_generation_prompt": generation_prompt, "enable_thinking": False}
    values |= {"strftime_now": TODAY.strftime, **(tokens or {})}
    system = [message["content"] for message in messages if message["role"] == "system"]
    merged = [dict(message) for message in messages if message["role"] != "system"]
    first = next((message for message in merged if message["role"] == "user"), None)
    if first is not None:
        first["content"] = "\n\n".join([*system, first["content"]])
    for chat in (list(messages), merged):
        failure, text = None, ""
        try:
            text = render_jinja_template([chat], chat_template=template, **values)[0][0]
        except failures as error:
            failure = error
        if failure is None and all(part.strip() in text for part in system):
            break
    if failure is not None:
        message = f"the chat template cannot render the messages: {failure}"
        raise DataError(message, "use another base model, or fix its chat template") from failure
    if generation_prompt and (opened := _OPEN.search(text)):
        return f"{text.rstrip()}\n\n</{opened[1]}>\n\n"
    return text
