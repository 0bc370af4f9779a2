"""Chat templates in Jinja: messages to text as transformers renders them, and what to do about a system message."""

import functools
import json
from collections.abc import Callable
from datetime import datetime

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sclite.errors import DataFault
from sclite.student.base import Messages


def render_chat(template: str, messages: Messages, *, generation_prompt: bool = True, **tokens: str) -> str:
    """The messages as the chat template writes them, as transformers renders it; `tokens` are bos_token, eos_token ..

    A system message for which there is no place, and DataFault: as in `render_whole`.
    """

    def render(these: Messages) -> str:
        return _template(template).render(
            messages=[dict(message) for message in these],
            tools=None,
            documents=None,
            add_generation_prompt=generation_prompt,
            enable_thinking=False,
            **tokens,
        )

    return render_whole(messages, render)


def render_whole(messages: Messages, render: Callable[[Messages], str]) -> str:
    """What `render` makes of the messages, with nothing left out.

    Where it refuses or leaves out a system message, its text goes before the first user message, with an empty line
    between. Raises DataFault when the messages cannot be rendered at all.
    """
    reason = ""
    for these in (messages, merge_system(messages)):
        try:
            text = render(these)
        except (TemplateError, TypeError) as fault:
            reason = str(fault)
            continue
        if all(message["content"].strip() in text for message in these if message["role"] == "system"):
            return text
    raise DataFault(
        f"the chat template cannot render the messages: {reason}",
        "use another base model, or mend its template",
    )


def merge_system(messages: Messages) -> Messages:
    """The same chat without a system message: its text opens the first user message."""
    system = [message["content"] for message in messages if message["role"] == "system"]
    rest = [dict(message) for message in messages if message["role"] != "system"]
    for message in rest:
        if system and message["role"] == "user":
            message["content"] = "\n\n".join([*system, message["content"]])
            break
    return tuple(rest)


class _Generation(Extension):
    """`{% generation %}` marks what is trained on; here it is nothing but its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _fail(message):
    raise TemplateError(message)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@functools.cache
def _template(source: str):
    """The compiled chat template, in the environment that transformers gives it."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_fail, strftime_now=lambda form: datetime.now().strftime(form))
    return environment.from_string(source)
