"""Chat templates in Jinja: messages to text as transformers renders them, and what to do about a system message."""

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

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sclite.errors import DataError
from sclite.student.base import Messages

SECONDS, STARTING, BYTES, CHARACTERS = 10, 60, 1 << 30, 4_000_000
"""Of one rendering: seconds, seconds for its process to start, its memory, and the longest text."""
_OPEN = re.compile(r"<(think|thinking|thought)>\s*\Z")


def render_chat(template: str, messages: Messages, *, generation_prompt: bool = True, **tokens: Any) -> str:
    """The messages as the chat template writes them, as transformers renders it; `tokens` are bos_token, eos_token ..

    A model file brings the template, so it is rendered in a process of its own with limits on time, memory and length. A
    prompt that leaves `<think>` open gets an empty block. A system message for which there is no place, and DataFault: as
    in `render_complete`.
    """

    def render(these: Messages) -> str:
        values = {
            "messages": [dict(message) for message in these],
            "tools": None,
            "documents": None,
            "add_generation_prompt": generation_prompt,
            "enable_thinking": False,
        }
        return _in_process({"template": template, "values": values | tokens})

    text = render_complete(messages, render)
    return (
        f"{text.rstrip()}\n\n</{opened[1]}>\n\n"
        if generation_prompt and (opened := _OPEN.search(text))
        else text
    )


def opens_thinking(template: str, **tokens: Any) -> bool:
    """Whether the template's own prompt ends in an open `<think>`, which `render_chat` closes."""
    values = {
        "messages": [{"role": "user", "content": "a"}],
        "add_generation_prompt": True,
        "enable_thinking": False,
    }
    return bool(_OPEN.search(_in_process({"template": template, "values": values | tokens})))


def render_complete(messages: Messages, render: Callable[[Messages], str]) -> str:
    """What `render` makes of the messages, with nothing left out.

    Where it refuses or leaves out a system message, its text goes before the first user message, with an empty line
    between. Raises DataFault when the messages cannot be rendered at all.
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
    raise DataError(
        f"the chat template cannot render the messages: {reason}",
        "use another base model, or correct its chat template",
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


# -- the process that renders ------------------------------------------------------------------------------------------


class _Renderer:
    """The one process that renders; started when first needed, killed where a template exceeds its time."""

    def __init__(self) -> None:
        self.lock, self.process = threading.Lock(), None

    def ask(self, request: str) -> str:
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
                self._line(STARTING)
            self.process.stdin.write(f"{request}\n".encode())
            self.process.stdin.flush()
            return self._line(SECONDS)

    def _line(self, seconds: float) -> str:
        """The next line of the process; kills it and raises DataFault where none comes."""
        end, line, out = time.monotonic() + seconds, b"", self.process.stdout.fileno()
        while not line.endswith(b"\n"):
            ready = select.select([out], [], [], max(0.0, end - time.monotonic()))[0]
            part = os.read(out, 1 << 16) if ready else b""
            if not part:
                self.process.kill()
                self.process.wait()
                reason = "its process ended" if ready else f"it took more than {seconds} seconds"
                raise DataError(
                    f"the chat template cannot be rendered: {reason}",
                    "use another base model, or correct its chat template",
                )
            line += part
        return line.decode()


_renderer = _Renderer()


def _in_process(request: dict[str, Any]) -> str:
    answer = json.loads(_renderer.ask(json.dumps(request)))
    if "error" in answer:
        raise TemplateError(answer["error"])
    return answer["text"]


def serve() -> None:
    """Render what comes on standard input, a JSON object a line, until it ends."""
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    with open(0, encoding="utf-8") as requests, open(1, "w", encoding="utf-8") as answers:
        answers.write("ready\n")
        answers.flush()
        for line in requests:
            request = json.loads(line)
            try:
                answer = {"text": _rendered(request["template"], request["values"])}
            except MemoryError:
                answer = {"error": f"it takes more than {BYTES >> 20} MB"}
            except _FAILURES as error:
                answer = {"error": str(error) or type(error).__name__}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


_FAILURES = (
    *(TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError),
)


def _rendered(template: str, values: dict[str, Any]) -> str:
    parts, length = [], 0
    for part in _template(template).generate(**values):
        parts.append(part)
        length += len(part)
        if length > CHARACTERS:
            raise ValueError(f"it writes more than {CHARACTERS:,} characters")
    return "".join(parts)


@functools.cache
def _template(source: str):
    """The compiled chat template, in the environment that transformers gives it."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_fail, strftime_now=lambda form: datetime.now().strftime(form))
    return environment.from_string(source)
