"""Chat templates in Jinja: render messages as transformers does, whether or not the template takes a system message."""

import functools
import json
import os
import re
import resource
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sclite.errors import DataError
from sclite.student.base import Messages

SECONDS, STARTING, BYTES, CHARACTERS = 10, 60, 1 << 30, 4_000_000
"""Limits of one rendering: seconds, seconds for its process to start, memory, and length of the text."""
_HINT = "use another base model, or fix its chat template"
_OPEN = re.compile(r"<(think|thinking|thought)>\s*\Z")


def render_chat(template: str, messages: Messages, *, generation_prompt: bool = True, **tokens: str) -> str:
    """The messages in a chat template, rendered as transformers does; `tokens` are bos_token, eos_token ..

    Templates come with model files, so they are rendered in a separate process with limits on time, memory and length.
    A prompt that ends in an open `<think>` gets an empty block. For a template without a system role, and for
    DataError, see `render_complete`.
    """
    text = render_complete(messages, lambda these: _render(template, these, generation_prompt, tokens))
    if generation_prompt and (opened := _OPEN.search(text)):
        return f"{text.rstrip()}\n\n</{opened[1]}>\n\n"
    return text


def opens_thinking(template: str, **tokens: str) -> bool:
    """Whether the template's own prompt ends in an open `<think>`, which `render_chat` closes."""
    return bool(_OPEN.search(_render(template, ({"role": "user", "content": "a"},), True, tokens)))


def render_complete(messages: Messages, render: Callable[[Messages], str]) -> str:
    """What `render` makes of the messages, with nothing missing.

    If it refuses or drops a system message, the message is merged into the first user message (`merge_system`). Raises
    DataError if the messages cannot be rendered at all.
    """
    reason = ""
    for these in (messages, merge_system(messages)):
        try:
            text = render(these)
        except (TemplateError, TypeError) as error:
            reason = str(error)
            continue
        if all(message["content"].strip() in text for message in these if message["role"] == "system"):
            return text
    raise DataError(f"the chat template cannot render the messages: {reason}", _HINT)


def merge_system(messages: Messages) -> Messages:
    """The same chat with its system message moved to the start of the first user message, before an empty line."""
    system = [message["content"] for message in messages if message["role"] == "system"]
    rest = [dict(message) for message in messages if message["role"] != "system"]
    for message in rest:
        if system and message["role"] == "user":
            message["content"] = "\n\n".join([*system, message["content"]])
            break
    return tuple(rest)


# -- in this process: send a request to the renderer -------------------------------------------------------------------


def _render(template: str, messages: Messages, generation_prompt: bool, tokens: dict[str, str]) -> str:
    values = {
        "messages": messages,
        "tools": None,
        "documents": None,
        "add_generation_prompt": generation_prompt,
        "enable_thinking": False,
    }
    reply = json.loads(_renderer.send(json.dumps({"template": template, "values": values | tokens})))
    if "error" in reply:
        raise TemplateError(reply["error"])
    return reply["text"]


class _Renderer:
    """The rendering process: started when first needed, killed if a template exceeds its time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None

    def send(self, request: str) -> str:
        """The reply to a request, one line each. Raises DataError if the process ends or takes too long."""
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                command = [sys.executable, "-c", "from sclite.student.chat_template import serve; serve()"]
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                )
                self._read_line(self.process, STARTING)
            self.process.stdin.write(f"{request}\n".encode())
            self.process.stdin.flush()
            return self._read_line(self.process, SECONDS)

    def _read_line(self, process: "subprocess.Popen[bytes]", seconds: float) -> str:
        end, line, out = time.monotonic() + seconds, b"", process.stdout.fileno()
        while not line.endswith(b"\n"):
            ready = select.select([out], [], [], max(0.0, end - time.monotonic()))[0]
            part = os.read(out, 1 << 16) if ready else b""
            if not part:
                process.kill()
                process.wait()
                reason = "its process ended" if ready else f"it took more than {seconds} seconds"
                raise DataError(f"the chat template cannot be rendered: {reason}", _HINT)
            line += part
        return line.decode()


_renderer = _Renderer()


# -- in the rendering process ------------------------------------------------------------------------------------------

_FAILURES = (
    *(TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError),
)


def serve() -> None:
    """Render requests from standard input, one JSON object per line, until it closes."""
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    with open(0, encoding="utf-8") as requests, open(1, "w", encoding="utf-8") as replies:
        replies.write("ready\n")
        replies.flush()
        for line in requests:
            request = json.loads(line)
            try:
                parts, length = [], 0
                for part in _compile(request["template"]).generate(**request["values"]):
                    parts.append(part)
                    length += len(part)
                    if length > CHARACTERS:
                        raise ValueError(f"it writes more than {CHARACTERS:,} characters")
                reply = {"text": "".join(parts)}
            except MemoryError:
                reply = {"error": f"it takes more than {BYTES >> 20} MB"}
            except _FAILURES as error:
                reply = {"error": str(error) or type(error).__name__}
            replies.write(json.dumps(reply) + "\n")
            replies.flush()


@functools.cache
def _compile(source: str) -> Template:
    """The compiled chat template, in the same environment as in transformers."""

    def tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(
        raise_exception=raise_exception, strftime_now=lambda form: datetime.now().strftime(form)
    )
    return environment.from_string(source)


class _Generation(Extension):
    """`{% generation %}` marks the text to train on; here it renders its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)
