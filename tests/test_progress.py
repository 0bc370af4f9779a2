"""The live line: rows per second, money and time left, from what this command has done and nothing else."""

import fcntl
import os
import pty
import re
import struct
import sys
import termios
import time
from contextlib import suppress

import pytest

from sclite import progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test turns on: `clock.append(seconds)`."""
    times = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: times[-1])
    return times


def test_the_rate_counts_from_the_first_row_and_not_from_the_start(clock):
    rate = progress.Rate()
    rate.update(100, 0.5)
    for number in range(1, 12):
        clock.append(60.0 + number)  # a minute passes before the first row: LiteLLM is imported, rows are few
        rate.update(100 + number, 0.5 + 0.01 * number)
    assert rate.line(121) == "1.0/s, $0.6100 of about $0.71, 10 s left"


def test_the_time_that_a_question_takes_is_no_work(clock):
    rate = progress.Rate()
    for number in range(8):
        clock.append(float(number))
        rate.update(number, None)
    clock.append(1000.0)
    rate.restart()
    for number in range(8, 13):
        clock.append(1000.0 + number / 2)
        rate.update(number, None)
    assert rate.line(22) == "2.0/s, 5 s left"


def test_before_there_are_two_rows_nothing_is_said(clock):
    rate = progress.Rate()
    rate.update(0, None)
    clock.append(1.0)
    rate.update(1, None)
    assert rate.line(10) == ""


def test_a_skipped_stage_tells_nothing_of_how_fast_the_machine_is(clock):
    shown = progress.ProgressDisplay({"a": 10, "b": 20, "c": 30}, quiet=True)
    with shown.stage("a", "a"):
        clock.append(0.1)
    shown.done("a", "a", skipped=True)
    assert shown.seconds_left("b", 0.5) == 40
    with shown.stage("b", "b"):
        clock.append(40.1)
    shown.done("b", "b")
    assert shown.seconds_left("c", 0.0) == 60


def test_figures_of_the_moment_and_warnings_reach_a_log(clock, capsys):
    with progress.ProgressDisplay().stage("sft", "sft: the student learns") as report:
        clock.append(31.0)
        report(1, 9, note="loss 0.5")
        report(0, 0, warning="the margin [stays] at 0")
    told = capsys.readouterr().err
    assert "1 of 9 loss 0.5" in told
    assert "warning: the margin [stays] at 0" in told


# -- the width of the terminal -------------------------------------------------------------------------------------

FIGURES = "loss 0.412, margin 0.31, accuracy 74 %, 3,204 tokens/s, 9.8 GB, 0.3/s, $0.12 of about $1.40, 4 min 2 s left"


def test_what_matters_least_is_left_away_first_and_whole():
    assert progress.fit_to_width(FIGURES, 200) == FIGURES
    shorter = FIGURES.replace("0.3/s, ", "")
    assert progress.fit_to_width(FIGURES, len(FIGURES) - 1) == shorter
    assert progress.fit_to_width(FIGURES, len(shorter) - 1) == shorter.replace("3,204 tokens/s, ", "")
    assert (
        progress.fit_to_width(FIGURES, 62) == "loss 0.412, margin 0.31, $0.12 of about $1.40, 4 min 2 s left"
    )
    assert progress.fit_to_width(FIGURES, 5) == "4 min 2 s left"
    assert progress.fit_to_width("", 5) == ""


SCRIPT = """
import time
from sclite.progress import ProgressDisplay
with ProgressDisplay().stage("dpo", "dpo: the student prefers right reviews") as report:
    for done in range(8):
        report(done, 1500, note="loss 0.412, margin 0.31, accuracy 74 %, evaluation loss 0.500, 3,204 tokens/s, 9.8 GB")
        time.sleep(0.15)
"""


def frames(columns: int) -> list[str]:
    """What a terminal of so many columns is sent, line by line, without its colours."""
    pid, terminal = pty.fork()
    if pid == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR", "CI")}
        environment |= {"TERM": "xterm-256color", "PYTHONPATH": os.pathsep.join(sys.path)}
        os.execve(sys.executable, [sys.executable, "-c", SCRIPT], environment)
    sent = b""
    with suppress(OSError):  # the terminal's end
        while piece := os.read(terminal, 4096):
            sent += piece
    os.waitpid(pid, 0)
    return [
        line for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", sent.decode())) if line
    ]


@pytest.mark.parametrize("columns", [60, 80, 100, 140])
def test_in_a_real_terminal_the_stage_its_steps_and_the_time_left_can_always_be_read(columns):
    timed = [line for line in frames(columns) if "/1500" in line][-1].rstrip()
    assert timed.startswith("dpo")
    assert re.search(r" [1-7]/1500 ", timed)
    assert re.search(r"\d (s|min \d+ s) left$", timed)
    assert len(timed) <= columns
    assert "…" not in timed
    if columns >= 80:
        assert "loss 0.412" in timed


@pytest.mark.parametrize(
    ("seconds", "warns", "headed"), [(0.0, False, False), (0.0, True, True), (0.2, False, True)]
)
def test_in_a_log_a_stage_with_nothing_to_do_has_no_heading(seconds, warns, headed, monkeypatch, capsys):
    monkeypatch.setattr(progress, "HEADING_DELAY", 0.05)
    with progress.ProgressDisplay().stage("sft", "sft: the student learns") as report:
        time.sleep(seconds)
        if warns:
            report(1, 2, warning="the loss is falling too fast")
    time.sleep(0.1)
    said = capsys.readouterr().err.splitlines()
    assert ("sft: the student learns" in said) == headed
    assert len(said) == headed + warns
    assert not warns or "too fast" in said[-1]


def test_a_heading_never_comes_after_its_stage(monkeypatch):
    monkeypatch.setattr(progress, "HEADING_DELAY", 0.01)
    said = []

    def slowly():
        time.sleep(0.1)
        said.append("heading")

    with progress._heading(slowly):
        time.sleep(0.03)
    said.append("end")
    time.sleep(0.15)
    assert said == ["heading", "end"]
