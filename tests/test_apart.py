"""Work in a process of its own: what comes back from it, and that it does not outlive who waits for it."""

import os
import signal
import subprocess
import sys
import time

import pytest

from sclite.apart import apart
from sclite.errors import DataFault, DeviceFault, MemoryFault, ScliteError


def counts(upto, *, progress):
    for number in range(1, upto + 1):
        progress(number, upto, note=f"number {number}")
    progress(0, 0, warning="that was all")
    return {"sum": sum(range(upto + 1)), "process": os.getpid()}


def fails(*, progress):
    raise DataFault("row 7 is broken", "mend it")


def runs_out_of_memory(*, progress):
    raise MemoryFault("warm", 4)


def is_interrupted(*, progress):
    raise KeyboardInterrupt


def dies(*, progress):
    os.kill(os.getpid(), signal.SIGKILL)


def sleeps(path, *, progress):
    with open(path, "w") as file:
        file.write(str(os.getpid()))
    time.sleep(60)


def talks_and_breaks(*, progress):
    print("a banner")
    raise ZeroDivisionError("broken")


def nothing(*_, **__):
    pass


def test_result_progress_and_warnings_come_from_another_process(tmp_path):
    seen = []
    result = apart(
        counts, 3, progress=lambda *values, **named: seen.append((values, named)), log=tmp_path / "log"
    )
    assert result["sum"] == 6
    assert result["process"] != os.getpid()
    assert seen[0] == ((1, 3), {"note": "number 1"})
    assert seen[-1] == ((0, 0), {"warning": "that was all"})
    assert len(seen) == 4


def test_faults_come_back_whole(tmp_path):
    with pytest.raises(DataFault, match="row 7 is broken") as fault:
        apart(fails, progress=nothing, log=tmp_path / "log")
    assert fault.value.hint == "mend it"
    with pytest.raises(MemoryFault, match="4 rows at once") as fault:
        apart(runs_out_of_memory, progress=nothing, log=tmp_path / "log")
    assert (fault.value.stage, fault.value.micro_batch, fault.value.code) == ("warm", 4, 5)
    with pytest.raises(KeyboardInterrupt):
        apart(is_interrupted, progress=nothing, log=tmp_path / "log")


def test_what_a_library_prints_goes_to_the_log_and_a_crash_is_named(tmp_path, capfd):
    with pytest.raises(ScliteError, match="ZeroDivisionError: broken") as fault:
        apart(talks_and_breaks, progress=nothing, log=tmp_path / "log")
    assert str(tmp_path / "log") in fault.value.hint
    text = (tmp_path / "log").read_text()
    assert "a banner" in text
    assert "Traceback" in text
    assert capfd.readouterr().out == ""


def test_a_process_that_the_system_kills_is_a_fault_with_its_code(tmp_path):
    with pytest.raises(DeviceFault, match=r"ended by itself \(code -9\)"):
        apart(dies, progress=nothing, log=tmp_path / "log")


def test_it_ends_when_who_waits_for_it_is_killed(tmp_path):
    path = tmp_path / "pid"
    code = (
        "import sys; from sclite.apart import apart; from tests.test_apart import sleeps, nothing\n"
        "if __name__ == '__main__': apart(sleeps, sys.argv[1], progress=nothing, log=sys.argv[1] + 'log')"
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
