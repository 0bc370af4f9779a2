"""A function in a separate process: what comes back, and that the process never outlives its parent."""

import os
import pty
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest

from sclite.errors import DataError, DeviceError, GpuMemoryError, ScliteError
from sclite.isolation import run_isolated


def counts(upto, *, progress):
    for number in range(1, upto + 1):
        progress(number, upto, note=f"number {number}")
    progress(0, 0, warning="that was all")
    return {"sum": sum(range(upto + 1)), "process": os.getpid()}


def fails(*, progress):
    raise DataError("row 7 is broken", "fix it")


def runs_out_of_memory(*, progress):
    raise GpuMemoryError("warmup", 4)


def is_interrupted(*, progress):
    raise KeyboardInterrupt


def dies(*, progress):
    os.kill(os.getpid(), signal.SIGKILL)


def sleeps(path, *, progress):
    with open(path, "w") as file:
        file.write(str(os.getpid()))
    time.sleep(60)


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


def dies_of_interrupt(path, *, progress):
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _write(path, "listening")
    time.sleep(60)


def ignores_interrupts(path, *, progress):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _write(path, str(os.getpid()))
    time.sleep(60)


def dies_and_leaves_a_child(*, progress):
    if os.fork() == 0:
        time.sleep(20)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)


class ExitsWhenUnpickled:
    """An argument that ends the new process while it is unpickled."""

    def __init__(self, code):
        self.code = code

    def __reduce__(self):
        return os._exit, (self.code,)


def _write(path, text):
    with open(f"{path}.new", "w") as file:
        file.write(text)
    os.replace(f"{path}.new", path)


def prints_and_fails(*, progress):
    print("a banner")
    raise ZeroDivisionError("broken")


def nothing(*_, **__):
    pass


def test_result_progress_and_warnings_come_from_the_child(tmp_path):
    seen = []
    result = run_isolated(
        counts, 3, progress=lambda *values, **named: seen.append((values, named)), log=tmp_path / "log"
    )
    assert result["sum"] == 6
    assert result["process"] != os.getpid()
    assert seen[0] == ((1, 3), {"note": "number 1"})
    assert seen[-1] == ((0, 0), {"warning": "that was all"})
    assert len(seen) == 4


def test_errors_keep_their_type_and_fields(tmp_path):
    with pytest.raises(DataError, match="row 7 is broken") as error:
        run_isolated(fails, progress=nothing, log=tmp_path / "log")
    assert error.value.hint == "fix it"
    with pytest.raises(GpuMemoryError, match="micro-batch size 4") as error:
        run_isolated(runs_out_of_memory, progress=nothing, log=tmp_path / "log")
    assert (error.value.stage, error.value.micro_batch, error.value.code) == ("warmup", 4, 5)
    with pytest.raises(KeyboardInterrupt):
        run_isolated(is_interrupted, progress=nothing, log=tmp_path / "log")


def test_output_goes_to_the_log_and_a_crash_is_reported(tmp_path, capfd):
    with pytest.raises(ScliteError, match="ZeroDivisionError: broken") as error:
        run_isolated(prints_and_fails, progress=nothing, log=tmp_path / "log")
    assert str(tmp_path / "log") in error.value.hint
    text = (tmp_path / "log").read_text()
    assert "a banner" in text
    assert "Traceback" in text
    assert capfd.readouterr().out == ""


def test_a_killed_process_is_an_error_with_its_exit_code(tmp_path):
    with pytest.raises(DeviceError, match=r"exited unexpectedly \(code -9\)"):
        run_isolated(dies, progress=nothing, log=tmp_path / "log")


def test_an_exit_before_the_log_is_opened_is_an_error(tmp_path):
    log = tmp_path / "run" / "log"
    with pytest.raises(DeviceError, match=r"exited unexpectedly \(code 7\)"):
        run_isolated(fails, ExitsWhenUnpickled(7), progress=nothing, log=log)
    assert log.read_text() == ""


def test_an_old_traceback_in_the_log_is_not_reported_again(tmp_path):
    (tmp_path / "log").write_text("ZeroDivisionError: of yesterday\n")
    with pytest.raises(DeviceError, match=r"exited unexpectedly \(code 1\)"):
        run_isolated(fails, ExitsWhenUnpickled(1), progress=nothing, log=tmp_path / "log")


def test_a_dead_process_is_noticed_though_a_grandchild_holds_the_pipe(tmp_path):
    began = time.monotonic()
    with pytest.raises(DeviceError, match=r"code -9"):
        run_isolated(dies_and_leaves_a_child, progress=nothing, log=tmp_path / "log")
    assert time.monotonic() - began < 15


# -- Ctrl-C --------------------------------------------------------------------------------------------------------


def press_ctrl_c(path, times: int = 1):
    """Press Ctrl-C `times` times once `path` exists: the child is listening."""

    def press():
        deadline = time.monotonic() + 60
        while not os.path.exists(path) and time.monotonic() < deadline:
            time.sleep(0.01)
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)

    threading.Thread(target=press, daemon=True).start()


def test_ctrl_c_in_a_terminal_reaches_the_child_once(tmp_path):
    path, script = tmp_path / "signal", tmp_path / "script.py"
    script.write_text(
        "import sys; from pathlib import Path; from sclite.isolation import run_isolated\n"
        "from tests.test_isolation import counts_interrupts, nothing\n"
        "if __name__ == '__main__':\n"
        "    try: run_isolated(counts_interrupts, sys.argv[1], progress=nothing, log=Path(sys.argv[1] + '.log'))\n"
        "    except KeyboardInterrupt: sys.exit(130)\n"
    )
    pid, terminal = pty.fork()
    if pid == 0:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        os.execve(sys.executable, [sys.executable, str(script), str(path)], environment)
    deadline = time.monotonic() + 60
    while not path.is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.write(terminal, b"\x03")
    with suppress(OSError):  # the terminal's end
        while os.read(terminal, 1000):
            pass
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    assert path.read_text() == "1 times, not in the terminal's group"


def test_ctrl_c_during_startup_prints_nothing(tmp_path, capfd):
    threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        run_isolated(sleeps, str(tmp_path / "pid"), progress=nothing, log=tmp_path / "log")
    assert capfd.readouterr() == ("", "")
    assert (tmp_path / "log").read_text() == ""


def test_a_child_killed_by_ctrl_c_counts_as_interrupted(tmp_path):
    press_ctrl_c(tmp_path / "signal")
    with pytest.raises(KeyboardInterrupt):
        run_isolated(dies_of_interrupt, str(tmp_path / "signal"), progress=nothing, log=tmp_path / "log")


def test_the_third_ctrl_c_kills_a_child_that_ignores_it(tmp_path):
    press_ctrl_c(tmp_path / "signal", times=3)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_isolated(ignores_interrupts, str(tmp_path / "signal"), progress=nothing, log=tmp_path / "log")
    assert time.monotonic() - began < 15
    assert not os.path.exists(f"/proc/{(tmp_path / 'signal').read_text()}")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_child_ends_when_its_parent_is_killed(tmp_path):
    path = tmp_path / "pid"
    code = (
        "import sys; from pathlib import Path; from sclite.isolation import run_isolated; from tests.test_isolation import sleeps, nothing\n"
        "if __name__ == '__main__': run_isolated(sleeps, sys.argv[1], progress=nothing, log=Path(sys.argv[1] + 'log'))"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    waiting = subprocess.Popen([sys.executable, str(script), str(path)], env=environment)
    deadline = time.monotonic() + 60
    while not (path.is_file() and path.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    working = int(path.read_text())
    waiting.kill()
    waiting.wait()
    while os.path.exists(f"/proc/{working}") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{working}")
