"""Work in a process of its own, so that what it held on the card is free again when it ends.

The process that waits never touches CUDA. Progress, warnings and faults come back as if the work were done here; when
the waiting process is gone, even by a SIGKILL, the working one ends too and holds neither the card nor the run. Ctrl-C
reaches the work once: it is in a process group of its own, and who waits passes the signal on.
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
from pathlib import Path
from typing import Any

from sclite.errors import DeviceError, ScliteError

Progress = Callable[..., None]
READY, PROGRESS, RESULT, FAULT, INTERRUPT = "ready", "progress", "result", "fault", "interrupt"
PATIENCE = 2  # times that Ctrl-C is passed on: the first asks the work to save, the second to stop; the third kills it
SECONDS = 60  # for a process that has told its result to end


def apart(work: Callable[..., Any], *arguments: Any, progress: Progress, log: Path) -> Any:
    """What `work(*arguments, progress=..)` returns, done in a new process. `work` is a function of a module.

    What the process prints goes to the end of `log`. Raises the ScliteError that the work raises; KeyboardInterrupt after
    Ctrl-C, however the process ends then; ScliteError for any other exception, whose traceback stands in the log;
    DeviceFault where the process ends without a word, as one does that the system has killed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    log.touch()
    begin = log.stat().st_size
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_work, args=(there, work, arguments, str(log)))
    with _passing_on(process) as pressed:
        _start(process)
        there.close()
        try:
            kind, value = _listen(here, process, progress, pressed)
            process.join(SECONDS)
        finally:
            here.close()
            process.kill()
            process.join()
    if kind == INTERRUPT or (pressed.times and kind != FAULT):
        raise KeyboardInterrupt
    if kind == FAULT:
        raise value
    if kind is None:
        raise _ended(process.exitcode, log, begin)
    return value


# -- who waits -----------------------------------------------------------------------------------------------------


@dataclass
class _Pressed:
    """How often Ctrl-C was pressed, and whether the process can be told of it yet."""

    process: Any
    times: int = 0
    ready: bool = False

    def again(self, *_: Any) -> None:
        self.times += 1
        if self.times > PATIENCE:
            raise KeyboardInterrupt
        if self.ready:
            os.kill(self.process.pid, signal.SIGINT)

    def now_ready(self) -> None:
        self.ready = True
        if self.times:
            os.kill(self.process.pid, signal.SIGINT)


@contextmanager
def _passing_on(process: Any) -> Iterator[_Pressed]:
    """Ctrl-C goes to the process and breaks nothing off here, such as a message that is half read."""
    pressed = _Pressed(process)
    try:
        before = signal.signal(signal.SIGINT, pressed.again)
    except ValueError:  # not in the main thread: then Ctrl-C comes to somebody else
        yield pressed
        return
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _start(process: Any) -> None:
    """Start it with Ctrl-C held back, so that none breaks into its imports and speaks to the terminal."""
    resource_tracker.ensure_running()  # starting this helper ends by letting the signal through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _listen(here: Connection, process: Any, progress: Progress, pressed: _Pressed) -> tuple[str | None, Any]:
    """Pass progress on until the work has ended; how it did, and with what. (None, None): without a word."""
    while True:
        if not wait([here], 1):
            # it may be gone and the pipe still open, in a process that it has started
            if process.exitcode is None or here.poll():
                continue
            return None, None
        try:
            kind, value = here.recv()
        except (EOFError, OSError):
            process.join(SECONDS)
            return None, None
        if kind == READY:
            pressed.now_ready()
        elif kind == PROGRESS:
            progress(*value[0], **value[1])
        else:
            return kind, value


def _ended(code: int, log: Path, begin: int) -> ScliteError:
    """The fault of a process that has sent no result; what it printed stands in the log from `begin` on."""
    text = log.read_bytes()[begin:].decode("utf-8", errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    if code == 1 and lines:  # Python's own code after an exception that nobody has caught
        return ScliteError(lines[-1].strip(), f"the whole traceback stands at the end of {log}")
    return DeviceError(
        f"the process that did the work ended by itself (code {code})",
        f"its last words stand in {log}; -9 means that the system was out of memory. The same command goes on",
    )


# -- who works -----------------------------------------------------------------------------------------------------


def _work(there: Connection, work: Callable[..., Any], arguments: tuple[Any, ...], log: str) -> None:
    os.setpgrp()
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()

    def progress(*values: Any, **named: Any) -> None:
        there.send((PROGRESS, (values, named)))

    try:
        signal.sigtimedwait({signal.SIGINT}, 0)  # one from the terminal, before: who waits has had it too
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        there.send((READY, None))
        there.send((RESULT, work(*arguments, progress=progress)))
    except ScliteError as error:
        there.send((FAULT, error))
    except KeyboardInterrupt:
        there.send((INTERRUPT, None))


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)
