"""A helper process for code that can hang, crash or use up all memory: one JSON line in, one out, within limits."""

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import wait
from typing import Any

from sclite.errors import ScliteError

STARTUP_SECONDS = 120.0  # a library is imported in seconds, but in a minute on a swapping machine
COMMAND = "import sys; from sclite.helper_process import serve; serve(*sys.argv[1:])"


class HelperProcess:
    """Answers requests with the function that `function()` of `module` returns. Thread-safe.

    The process starts on demand, and restarts after it was killed. It may use `memory` bytes more than the libraries that
    it has loaded, and ends with this process, however that one ends. `name` and `hint` are for the error if it cannot start.
    """

    def __init__(self, name: str, module: str, function: str, memory: int, hint: str):
        self.name, self.hint = name, hint
        self.arguments = [module, function, str(memory)]
        self.process: subprocess.Popen[bytes] | None = None
        self.ready = False
        self.lock = threading.RLock()

    def start(self) -> subprocess.Popen[bytes]:
        """Start the process if it is not running, without waiting for it to load its libraries."""
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self.end()
                path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
                self.process = subprocess.Popen(
                    [sys.executable, "-P", "-c", COMMAND, *self.arguments],
                    env={**os.environ, "PYTHONPATH": path},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    process_group=0,  # Ctrl-C in a terminal is not for it
                )
            return self.process

    def ask(self, request: Any, seconds: float) -> Any:
        """The reply to a JSON value. Raises ScliteError if the process cannot start.

        Raises TimeoutError if the reply takes longer, and EOFError if the process ends without one.
        """
        with self.lock:
            process = self.start()
            try:
                if not self.ready:
                    try:
                        why = _exchange(process, "", STARTUP_SECONDS)
                    except (TimeoutError, EOFError) as error:
                        why = str(error)
                    if why:
                        raise ScliteError(f"the {self.name} failed to start: {why}", self.hint)
                    self.ready = True
                return _exchange(process, json.dumps([seconds, request]) + "\n", seconds)
            except BaseException:  # the reply to an interrupted request would be read as that to the next one
                self.end()
                raise

    def end(self) -> None:
        """Kill the process; the next request starts another."""
        with self.lock:
            process, self.process, self.ready = self.process, None, False
            if process is not None:
                # the end of the block closes the pipes, perhaps with text that could not be written
                with suppress(OSError), process:
                    process.kill()


def _exchange(process: subprocess.Popen[bytes], line: str, seconds: float) -> Any:
    """Send a line and read one."""
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(BrokenPipeError):
        process.stdin.write(line.encode())
        process.stdin.flush()
    if not wait([process.stdout.fileno()], seconds):
        raise TimeoutError(f"it took more than {seconds:g} seconds")
    reply = process.stdout.readline()
    if not reply.endswith(b"\n"):
        raise EOFError(f"its process ended with code {process.wait()}")
    return json.loads(reply)


def serve(module: str, function: str, memory: str) -> None:
    """The helper's side: load the function, report "" or why that failed, then answer line by line until stdin closes."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to stderr instead
    try:
        answer: Callable[[Any], Any] = getattr(importlib.import_module(module), function)()
    except ImportError as error:
        print(json.dumps(str(error)), file=replies, flush=True)
        return
    with open("/proc/self/statm", encoding="ascii") as file:
        limit = int(file.read().split()[0]) * resource.getpagesize() + int(memory)
    with suppress(ValueError):  # the system's own limit is lower
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    print(json.dumps(""), file=replies, flush=True)
    for line in sys.stdin:
        seconds, request = json.loads(line)
        # if the parent dies while this hangs where no Python code runs, only the kernel's alarm can end it
        signal.setitimer(signal.ITIMER_REAL, seconds + 1)
        reply = answer(request)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(reply), file=replies, flush=True)
