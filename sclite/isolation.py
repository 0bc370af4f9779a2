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
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

from sclite.errors import DeviceError, ScliteError
from sclite.progress import Progress

Result = TypeVar("Result")
PROGRESS, RESULT, ERROR, INTERRUPT = "progress", "result", "error", "interrupt"
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
    log.touch()
    begin = log.stat().st_size
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_run_child, args=(there, function, arguments, str(log)))
    presses: list[int] = []

    def forward(number: int, _: object) -> None:
        """Forward Ctrl-C to the child, so that it interrupts nothing here, such as a half-read message."""
        presses.append(number)
        if len(presses) > FORWARDED or process.pid is None:
            raise KeyboardInterrupt
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)

    handler = signal.signal(signal.SIGINT, forward)
    try:
        # the child starts with SIGINT blocked: Ctrl-C during its imports waits, and prints no traceback
        resource_tracker.ensure_running()  # starting this helper ends by unblocking the signal
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        there.close()
        try:
            kind, value = _receive(here, process, progress)
            process.join(SECONDS)
        finally:
            here.close()
            process.kill()
            process.join()
    finally:
        signal.signal(signal.SIGINT, handler)
    if kind == INTERRUPT or (presses and kind != ERROR):
        raise KeyboardInterrupt
    if kind == ERROR:
        raise value
    if kind == RESULT:
        return value
    output = log.read_bytes()[begin:].decode("utf-8", errors="replace").strip()
    if process.exitcode == 1 and output:  # Python's own exit code after an uncaught exception
        # the first line after the frames; what was printed may follow it
        lines = output.rpartition("Traceback (most recent call last):")[2].strip("\n").splitlines()
        error = next((line for line in lines if line[:1].strip()), lines[-1])
        raise ScliteError(error.strip(), f"see the end of {log} for the traceback")
    hint = f"see the end of {log}; code -9 means that the system ran out of memory. Re-run to resume"
    raise DeviceError(f"the worker process exited unexpectedly (code {process.exitcode})", hint)


def _receive(here: Connection, process: BaseProcess, progress: Progress) -> tuple[str | None, Any]:
    """Forward progress until the child is done; return its last message, (None, None) if it ended without one."""
    while True:
        if not wait([here], 1):
            # a child that has exited can leave the pipe open in a process that it started
            if process.exitcode is None or here.poll():
                continue
            return None, None
        try:
            kind, value = here.recv()
        except (EOFError, OSError):
            process.join(SECONDS)
            return None, None
        if kind != PROGRESS:
            return kind, value
        progress(*value[0], **value[1])


def _run_child(
    there: Connection, function: Callable[..., object], arguments: tuple[object, ...], log: str
) -> None:
    os.setpgrp()  # from here on Ctrl-C comes only from the parent; a pending one is merged with the parent's
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)

    parent = multiprocessing.parent_process()
    assert parent is not None, "only runs in a child process"
    threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()

    def progress(*values: object, **named: object) -> None:
        there.send((PROGRESS, (values, named)))

    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        there.send((RESULT, function(*arguments, progress=progress)))
    except ScliteError as error:
        there.send((ERROR, error))
    except KeyboardInterrupt:
        there.send((INTERRUPT, None))
