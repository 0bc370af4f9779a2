"""A program in a terminal of its own, for tests of what people type and see."""

import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CLEARED = "\x1b[?2004h"
"""The terminal is asked to mark what is pasted: a new prompt."""


class Terminal:
    """A program in its own terminal: `send` input, `wait` for output."""

    def __init__(self, code: str, **environment: str):
        self.ours, theirs = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", **environment, "PROMPT_TOOLKIT_NO_CPR": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        command = [sys.executable, "-c", code]
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, env=environment, start_new_session=True,
            preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),  # so that Ctrl-C is its own
        )  # fmt: skip
        os.close(theirs)
        self.written = ""

    def send(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def wait(self, text: str, seconds: float = 60) -> str:
        """The output up to this text, which must come. What follows is kept for the next call."""
        end = time.monotonic() + seconds
        while text not in self.written:
            ready, _, _ = select.select([self.ours], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"{text!r} did not come: {self.written!r}"
            try:
                self.written += os.read(self.ours, 1 << 16).decode("utf-8", "replace")
            except OSError:
                raise AssertionError(f"it ended without {text!r}: {self.written!r}") from None
        before, _, self.written = self.written.partition(text)
        return before
