"""Run a function in a separate process, so that its GPU memory is free again when it ends.

The parent never touches CUDA. Progress, warnings and errors come back as if the function had run here. If the parent dies,
even by SIGKILL, the child exits too and releases the GPU and the run. Ctrl-C reaches the child once: it has its own
process group, and the parent forwards the signal.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from sclite.errors import DeviceError, ScliteError
from sclite.progress import Progress

Result = TypeVar("Result")
PROGRESS, RESULT, ERROR, CRASH = "progress", "result", "error", "crash"
# Ctrl-C presses that the child gets: the first asks it to save, the second to stop; the third kills it
FORWARDED = 2
SECONDS = 60  # for a child to exit after it has sent its result


def run_isolated(
    function: Callable[..., Result], *arguments: object, progress: Progress, log: Path
) -> Result:
    """Return `function(*arguments, progress=..)`, computed in a new process. `function` is a module-level function.

    Everything the child prints is appended to `log`. Raises the ScliteError that the function raises; KeyboardInterrupt
    after Ctrl-C, however the child then ends; ScliteError for any other exception, whose traceback is in the log;
    DeviceError if the child ends without a result, for example because the system killed it.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_run_child, args=(there, function, arguments, log))
    presses: list[int] = []

    def forward(number: int, _: object) -> None:
        """Forward Ctrl-C to the child, so that it interrupts nothing here, such as a half-read message."""
        presses.append(number)
        if len(presses) > FORWARDED:
            raise KeyboardInterrupt
        with suppress(BrokenPipeError):
            here.send(number)

    kind: str = ""
    value: Any = None
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which the child inherits
    try:
        process.start()
        signal.signal(signal.SIGINT, forward)
        there.close()
        try:
            with suppress(EOFError, OSError):
                # a child that has exited can leave the pipes open in a process that it started
                while here.poll(1.0) or process.exitcode is None:
                    if not here.poll():
                        continue
                    kind, value = here.recv()
                    if kind != PROGRESS:
                        break
                    progress(*value[0], **value[1])
            process.join(SECONDS)
        finally:
            process.kill()
            process.join()
            here.close()
    finally:
        signal.signal(signal.SIGINT, handler)
    if kind == ERROR:
        raise value
    if presses:
        raise KeyboardInterrupt
    if kind == RESULT:
        return value
    if kind == CRASH:
        raise ScliteError(value, f"see the end of {log} for the traceback")
    hint = f"see the end of {log}; code -9 means that the system ran out of memory. Re-run to resume"
    raise DeviceError(f"the worker process exited unexpectedly (code {process.exitcode})", hint)


def _run_child(
    there: Connection, function: Callable[..., object], arguments: tuple[object, ...], log: Path
) -> None:
    os.setpgrp()  # from here on Ctrl-C comes only from the parent
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)

    def listen() -> None:
        with suppress(EOFError, OSError):
            while True:
                os.kill(os.getpid(), there.recv())
        os._exit(1)  # the parent is dead

    def progress(*values: object, **named: object) -> None:
        there.send((PROGRESS, (values, named)))

    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Thread(target=listen, daemon=True).start()
        there.send((RESULT, function(*arguments, progress=progress)))
    except (ScliteError, KeyboardInterrupt) as error:
        there.send((ERROR, error))
    except Exception as error:
        there.send((CRASH, f"{type(error).__name__}: {error}".splitlines()[0]))
        raise
