"""Run a function in a separate process, so that its GPU memory is free again when it ends.

The parent never touches CUDA. Progress, warnings and errors come back as if the function had run here. If the parent dies,
even by SIGKILL, the child exits too and releases the GPU and the run. Ctrl-C reaches the child once: it has its own
process group, and the parent forwards the signal.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from sclite.errors import DeviceError, ScliteError

Progress = Callable[..., None]
READY, PROGRESS, RESULT, ERROR, INTERRUPT = "ready", "progress", "result", "error", "interrupt"
FORWARDED = (
    2  # Ctrl-C presses that the child gets: the first asks it to save, the second to stop; the third kills it
)
SECONDS = 60  # for a child that has sent its result to exit


def run_isolated(function: Callable[..., Any], *arguments: Any, progress: Progress, log: Path) -> Any:
    """Return `function(*arguments, progress=..)`, computed in a new process. `function` is a module-level function.

    Everything the child prints is appended to `log`. Raises the ScliteError that the function raises; KeyboardInterrupt
    after Ctrl-C, however the child ends then; ScliteError for any other exception, whose traceback is in the log;
    DeviceError if the child ends without a result, as one that the system has killed does.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    log.touch()
    begin = log.stat().st_size
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_run_child, args=(there, function, arguments, str(log)))
    with _forwarded_interrupts(process) as interrupts:
        _start(process)
        there.close()
        try:
            kind, value = _receive(here, process, progress, interrupts)
            process.join(SECONDS)
        finally:
            here.close()
            process.kill()
            process.join()
    if kind == INTERRUPT or (interrupts.count and kind != ERROR):
        raise KeyboardInterrupt
    if kind == ERROR:
        raise value
    if kind is None:
        raise _error_without_result(process.exitcode, log, begin)
    return value


# -- parent --------------------------------------------------------------------------------------------------------


@dataclass
class _Interrupts:
    """How often Ctrl-C was pressed, and whether the child can receive it yet."""

    process: BaseProcess
    count: int = 0
    ready: bool = False

    def press(self, *_: object) -> None:
        self.count += 1
        if self.count > FORWARDED:
            raise KeyboardInterrupt
        if self.ready:
            os.kill(self.process.pid, signal.SIGINT)

    def set_ready(self) -> None:
        self.ready = True
        if self.count:
            os.kill(self.process.pid, signal.SIGINT)


@contextmanager
def _forwarded_interrupts(process: BaseProcess) -> Iterator[_Interrupts]:
    """Forward Ctrl-C to the child; nothing here is interrupted by it, such as a half-read message."""
    interrupts = _Interrupts(process)
    try:
        before = signal.signal(signal.SIGINT, interrupts.press)
    except ValueError:  # not the main thread, which is the one that gets Ctrl-C
        yield interrupts
        return
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)


def _start(process: BaseProcess) -> None:
    """Start the child with SIGINT blocked, so that Ctrl-C during its imports prints no traceback."""
    resource_tracker.ensure_running()  # starting this helper ends by unblocking the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _receive(
    here: Connection, process: BaseProcess, progress: Progress, interrupts: _Interrupts
) -> tuple[str | None, Any]:
    """Forward progress until the child is done; return its last message, (None, None) if it ended without one."""
    while True:
        if not wait([here], 1):
            # a child that is gone can leave the pipe open in a process that it started
            if process.exitcode is None or here.poll():
                continue
            return None, None
        try:
            kind, value = here.recv()
        except (EOFError, OSError):
            process.join(SECONDS)
            return None, None
        if kind == READY:
            interrupts.set_ready()
        elif kind == PROGRESS:
            progress(*value[0], **value[1])
        else:
            return kind, value


def _error_without_result(code: int, log: Path, begin: int) -> ScliteError:
    """The error for a child that sent no result; its output starts at `begin` in the log."""
    text = log.read_bytes()[begin:].decode("utf-8", errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    if code == 1 and lines:  # Python's own exit code after an uncaught exception
        return ScliteError(lines[-1].strip(), f"see the end of {log} for the traceback")
    return DeviceError(
        f"the worker process exited unexpectedly (code {code})",
        f"see the end of {log}; code -9 means that the system ran out of memory. Re-run to resume",
    )


# -- child ---------------------------------------------------------------------------------------------------------


def _run_child(there: Connection, function: Callable[..., Any], arguments: tuple[Any, ...], log: str) -> None:
    os.setpgrp()
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    threading.Thread(target=_exit_with, args=(multiprocessing.parent_process(),), daemon=True).start()

    def progress(*values: Any, **named: Any) -> None:
        there.send((PROGRESS, (values, named)))

    try:
        signal.sigtimedwait({signal.SIGINT}, 0)  # drop one from the terminal: the parent got it too
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        there.send((READY, None))
        there.send((RESULT, function(*arguments, progress=progress)))
    except ScliteError as error:
        there.send((ERROR, error))
    except KeyboardInterrupt:
        there.send((INTERRUPT, None))


def _exit_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)
