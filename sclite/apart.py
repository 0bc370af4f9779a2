"""Work in a process of its own, so that what it held on the card is free again when it ends.

The process that waits never touches CUDA. Progress, warnings and faults come back as if the work were done here; when
the waiting process is gone, even by a SIGKILL, the working one ends too and holds neither the card nor the run.
"""

import multiprocessing
import os
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from sclite.errors import DeviceFault, ScliteError

Progress = Callable[..., None]
PROGRESS, RESULT, FAULT, INTERRUPT = "progress", "result", "fault", "interrupt"


def apart(work: Callable[..., Any], *arguments: Any, progress: Progress, log: Path) -> Any:
    """What `work(*arguments, progress=..)` returns, done in a new process. `work` is a function of a module.

    What the process prints goes to the end of `log`. Raises the ScliteError or KeyboardInterrupt that the work raises;
    ScliteError for any other exception, whose traceback stands in the log; DeviceFault where the process ends without a
    word, as one does that the system has killed.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_work, args=(there, work, arguments, str(log)))
    process.start()
    there.close()
    try:
        try:
            kind, value = _listen(here, process, progress, log)
        except KeyboardInterrupt:  # the terminal sends Ctrl-C to both: the work saves and says so
            kind, value = _listen(here, process, progress, log)
    finally:
        here.close()
        process.join(timeout=60)
        process.kill()
    if kind == INTERRUPT:
        raise KeyboardInterrupt
    if kind == FAULT:
        raise value
    return value


def _listen(here: Connection, process: Any, progress: Progress, log: Path) -> tuple[str, Any]:
    """Pass progress on until the work has ended; how it did, and with what."""
    while True:
        wait([here])  # a message, or the end of the other side
        try:
            kind, value = here.recv()
        except EOFError:
            process.join()
            raise _ended(process.exitcode, log) from None
        if kind == PROGRESS:
            progress(*value[0], **value[1])
        else:
            return kind, value


def _ended(code: int, log: Path) -> ScliteError:
    """The fault of a process that has sent no result."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    if code == 1 and lines:  # Python's own code after an exception that nobody has caught
        return ScliteError(lines[-1].strip(), f"the whole traceback stands at the end of {log}")
    return DeviceFault(
        f"the process that did the work ended by itself (code {code})",
        f"its last words stand in {log}; -9 means that the system was out of memory. The same command goes on",
    )


def _work(there: Connection, work: Callable[..., Any], arguments: tuple[Any, ...], log: str) -> None:
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()

    def progress(*values: Any, **named: Any) -> None:
        there.send((PROGRESS, (values, named)))

    try:
        there.send((RESULT, work(*arguments, progress=progress)))
    except ScliteError as fault:
        there.send((FAULT, fault))
    except KeyboardInterrupt:
        there.send((INTERRUPT, None))


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)
