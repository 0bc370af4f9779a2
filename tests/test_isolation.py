"""A function in a separate process: its results and errors, and that it never outlives its parent."""

import atexit
import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time
from dataclasses import dataclass

import pytest

from sclite.errors import DataError, DeviceError, GpuMemoryError, ScliteError
from sclite.isolation import run_isolated
from sclite.progress import no_progress


def counts(upto, *, progress):
    for number in range(1, upto + 1):
        progress(number, upto, note=f"number {number}")
    progress(0, 0, warning="that was all")
    return {"sum": sum(range(upto + 1)), "process": os.getpid()}


def raises(error, *, progress):
    print("a banner")
    atexit.register(print, "a farewell", flush=True)
    raise error


def dies(*, progress):
    os.kill(os.getpid(), signal.SIGKILL)


def dies_and_leaves_a_child(path, *, progress):
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    _write(path, child)
    os.kill(os.getpid(), signal.SIGKILL)


def sleeps(path, handler=signal.default_int_handler, *, progress):
    signal.signal(signal.SIGINT, handler)
    _write(path, os.getpid())
    time.sleep(60)
    _write(f"{path}.finished", "")


def counts_interrupts(path, *, progress):
    """Write how often Ctrl-C came within a second of the first, and whether the terminal could have sent it."""
    times = []
    signal.signal(signal.SIGINT, lambda *_: times.append(1))
    _write(path, "listening")
    while not times:
        time.sleep(0.01)
    time.sleep(1)
    _write(path, f"{len(times)} times, {'not ' * (os.getpgrp() == os.getpid())}in the terminal's group")
    raise KeyboardInterrupt


@dataclass
class ExitsWhenUnpickled:
    """An argument that ends the new process while it is unpickled."""

    code: int

    def __reduce__(self):
        return os._exit, (self.code,)


def _write(path, text):
    with open(f"{path}.new", "w") as file:
        file.write(str(text))
    os.replace(f"{path}.new", path)


def read(path):
    """The text of a file, once it is there."""
    deadline = time.monotonic() + 60
    while not os.path.exists(path) and time.monotonic() < deadline:
        time.sleep(0.01)
    return path.read_text()


def test_result_progress_and_warnings_come_from_the_child(tmp_path):
    seen = []

    def progress(*values, **named):
        seen.append((*values, named))

    result = run_isolated(counts, 3, progress=progress, log=tmp_path / "log")
    assert result["sum"] == 6
    assert result["process"] != os.getpid()
    numbers = [(n, 3, {"note": f"number {n}"}) for n in (1, 2, 3)]
    assert seen == [*numbers, (0, 0, {"warning": "that was all"})]


@pytest.mark.parametrize(
    ("error", "fields"),
    [
        (DataError("row 7 is broken", "fix it"), {"message": "row 7 is broken", "hint": "fix it", "code": 3}),
        (GpuMemoryError("warmup", 4), {"stage": "warmup", "micro_batch": 4, "code": 5}),
        (KeyboardInterrupt(), {}),
    ],
)
def test_errors_keep_their_type_and_fields(tmp_path, error, fields):
    with pytest.raises(type(error)) as found:
        run_isolated(raises, error, progress=no_progress, log=tmp_path / "log")
    assert {name: getattr(found.value, name) for name in fields} == fields


def test_output_goes_to_the_log_and_a_crash_is_reported(tmp_path, capfd):
    with pytest.raises(ScliteError, match="ZeroDivisionError: broken") as error:
        run_isolated(raises, ZeroDivisionError("broken"), progress=no_progress, log=tmp_path / "log")
    assert str(tmp_path / "log") in error.value.hint
    text = (tmp_path / "log").read_text()
    assert "a banner" in text
    assert text.index("Traceback") < text.index("a farewell")
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("function", "arguments", "code"),
    [(dies, (), -9), (counts, (ExitsWhenUnpickled(7),), 7), (counts, (ExitsWhenUnpickled(1),), 1)],
)
def test_dead_process_is_an_error_with_its_exit_code(tmp_path, function, arguments, code):
    log = tmp_path / "run/log"
    log.parent.mkdir()
    log.write_text("ZeroDivisionError: yesterday's\n")  # an old traceback is not reported again
    with pytest.raises(DeviceError, match=rf"exited unexpectedly \(code {code}\)"):
        run_isolated(function, *arguments, progress=no_progress, log=log)


def test_dead_process_is_noticed_even_if_a_grandchild_keeps_the_pipe(tmp_path):
    with pytest.raises(DeviceError, match=r"code -9"):
        run_isolated(dies_and_leaves_a_child, tmp_path / "pid", progress=no_progress, log=tmp_path / "log")
    os.kill(int(read(tmp_path / "pid")), signal.SIGKILL)  # it is still there


def test_child_ends_when_its_parent_is_killed(tmp_path):
    path = tmp_path / "pid"
    waiting = start("sleeps", path)
    child = int(read(path))
    waiting.kill()
    waiting.wait()
    deadline = time.monotonic() + 30
    while os.path.exists(f"/proc/{child}") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{child}")


def start(function, path, **settings):
    """A Python process that runs a function of this module in isolation; it exits with 130 after Ctrl-C."""
    code = (
        "import pathlib, sys\nfrom sclite.isolation import run_isolated\nfrom sclite.progress import no_progress\nfrom tests import test_isolation as module\n"
        "path = pathlib.Path(sys.argv[2])\nfunction = getattr(module, sys.argv[1])\n"
        "try: run_isolated(function, path, progress=no_progress, log=path.with_name('log'))\n"
        "except KeyboardInterrupt: sys.exit(130)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([sys.executable, "-c", code, function, str(path)], env=environment, **settings)


def test_ctrl_c_in_a_terminal_reaches_the_child_once(tmp_path):
    path = tmp_path / "signal"
    leader, terminal = pty.openpty()
    waiting = start("counts_interrupts", path, stdin=terminal, start_new_session=True,
                    preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))  # fmt: skip
    read(path)
    os.write(leader, b"\x03")
    assert waiting.wait() == 130
    assert path.read_text() == "1 times, not in the terminal's group"


def test_ctrl_c_during_startup_prints_nothing(tmp_path, capfd):
    threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        run_isolated(sleeps, tmp_path / "pid", progress=no_progress, log=tmp_path / "log")
    assert capfd.readouterr() == ("", "")
    assert (tmp_path / "log").read_text() == ""


@pytest.mark.parametrize(("handler", "presses"), [(signal.SIG_DFL, 1), (signal.SIG_IGN, 3)])
def test_ctrl_c_ends_every_child_the_third_by_force(tmp_path, handler, presses):
    def press():
        read(tmp_path / "pid")  # the child is listening
        for _ in range(presses):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)

    threading.Thread(target=press, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        run_isolated(sleeps, tmp_path / "pid", handler, progress=no_progress, log=tmp_path / "log")
    assert not os.path.exists(f"/proc/{read(tmp_path / 'pid')}")
    assert not (tmp_path / "pid.finished").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
