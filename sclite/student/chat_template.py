"""Chat templates in Jinja: render messages as transformers does, whether or not the template takes a system message."""

import json
import os
import re
import resource
import subprocess
import sys
import threading
from collections.abc import Mapping
from datetime import datetime
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from sclite.errors import DataError
from sclite.student.base import Messages

SECONDS, STARTING, BYTES, CHARACTERS = 10, 60, 1 << 30, 4_000_000
"""Limits of one rendering: seconds, seconds for its process to start, memory, and length of the text."""
TODAY = datetime(2024, 7, 26)
"""The date for templates that write today's: training, evaluation and the exported file must agree on any day."""
FAILURES = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What a template can raise, beside Jinja's own errors."""
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

    A system message that the template refuses or drops is put before the first user message. A prompt that ends in an
    open `<think>` gets an empty block. Raises DataError if the messages cannot be rendered.
    """
    system = [message["content"] for message in messages if message["role"] == "system"]
    merged = [dict(message) for message in messages if message["role"] != "system"]
    first = next((message for message in merged if message["role"] == "user"), None)
    if first is not None:
        first["content"] = "\n\n".join([*system, first["content"]])
    reply = _renderer.render(template, messages, tokens, generation_prompt)
    if "error" in reply or not all(text.strip() in reply["text"] for text in system):
        reply = _renderer.render(template, tuple(merged), tokens, generation_prompt)
    if "error" in reply:
        raise DataError(f"the chat template cannot render the messages: {reply['error']}", _HINT)
    text = reply["text"]
    if generation_prompt and (opened := _OPEN.search(text)):
        return f"{text.rstrip()}\n\n</{opened[1]}>\n\n"
    return text


def start_renderer() -> None:
    """Start the process that renders, which takes a second, while the caller loads a model."""
    with _renderer.lock:
        _renderer.start()


def opens_thinking(template: str, tokens: Mapping[str, str]) -> bool:
    """Whether the template's own prompt ends in an open `<think>`, which `render_chat` closes."""
    reply = _renderer.render(template, ({"role": "user", "content": "a"},), tokens, True)
    return bool(_OPEN.search(reply.get("text", "")))


class _Renderer:
    """Renders in a process of its own, within limits, because templates come with model files; restarts if killed."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.pipe: Connection
        self.ready = False

    def start(self) -> "subprocess.Popen[bytes]":
        """The process, which is started if there is none, without waiting for it."""
        if self.process is not None and self.process.poll() is None:
            return self.process
        self.pipe, there = Pipe()
        code = f"from sclite.student.chat_template import serve; serve({there.fileno()})"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            pass_fds=[there.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            process_group=0,  # Ctrl-C in a terminal is not for it
        )
        there.close()
        self.ready = False
        return self.process

    def render(
        self, template: str, messages: Messages, tokens: Mapping[str, str] | None, generation_prompt: bool
    ) -> dict[str, str]:
        """{"text": ..} or {"error": ..}. Raises DataError if the process ends or takes too long."""
        values = {"add_generation_prompt": generation_prompt, "enable_thinking": False, **(tokens or {})}
        request = json.dumps([template, messages, values]).encode()
        with self.lock:
            process = self.start()
            try:
                if not self.ready:
                    self._exchange(b"", STARTING)
                    self.ready = True
                return json.loads(self._exchange(request, SECONDS))
            except BaseException:  # an interrupted exchange would leave its reply to the next request
                process.kill()
                process.wait()
                raise

    def _exchange(self, request: bytes, seconds: float) -> bytes:
        reason = f"it took more than {seconds} seconds"
        try:
            self.pipe.send_bytes(request)
            if self.pipe.poll(seconds):
                return self.pipe.recv_bytes()
        except (EOFError, OSError):
            reason = "its process ended"
        raise DataError(f"the chat template cannot be rendered: {reason}", _HINT)


_renderer = _Renderer()


def serve(descriptor: int) -> None:
    """Render what comes through a pipe until it closes; runs in the rendering process."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    with open("/proc/self/statm", encoding="ascii") as file:
        limit = int(file.read().split()[0]) * resource.getpagesize() + BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    pipe = Connection(descriptor)
    pipe.send_bytes(pipe.recv_bytes())
    while True:
        try:
            template, messages, values = json.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            values["strftime_now"] = TODAY.strftime
            text = render_jinja_template([messages], chat_template=template, **values)[0][0]
            if len(text) > CHARACTERS:
                raise ValueError(f"it writes more than {CHARACTERS:,} characters")
            reply = {"text": text}
        except MemoryError:
            reply = {"error": f"it takes more than {BYTES >> 20} MB"}
        except (TemplateError, *FAILURES) as error:
            reply = {"error": str(error) or type(error).__name__}
        pipe.send_bytes(json.dumps(reply).encode())
