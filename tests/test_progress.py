"""Rates, costs and time left, the progress bar in a real terminal, and lines in a log."""

import io
import re
import sys
import time

import pytest

from sclite import progress


@pytest.fixture
def clock(monkeypatch):
    """A fake clock: `clock.append(seconds)` sets the time."""
    times = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: times[-1])
    return times


def test_the_rate_is_measured_from_the_first_row(clock):
    rate = progress.Rate()
    rate.update(100, 0.5)
    for number in range(1, 12):
        clock.append(60.0 + number)  # a minute before the first row, as when LiteLLM is imported
        rate.update(100 + number, 0.5 + 0.01 * number)
        assert number > 1 or rate.line(121) == ""  # one row has no rate
    assert rate.line(121) == "1.0/s, $0.6100 of about $0.71, 10 s left"


def test_slow_steps_are_shown_by_their_seconds(clock):
    rate = progress.Rate()
    for number in range(4):
        clock.append(29.0 * number)
        rate.update(number, None)
    assert rate.line(5) == "29 s each, 58 s left"


def test_time_spent_on_a_question_does_not_count(clock, monkeypatch, capsys):
    monkeypatch.setattr(progress.console, "is_interactive", lambda: True)
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Yes\n"))
    display = progress.ProgressDisplay()
    with display.stage("templates", "templates") as report:
        for number in range(8):
            clock.append(float(number))
            report(number, 22)
        clock.append(1000.0)
        assert display.confirm("Continue?")
        for number in range(8, 13):
            clock.append(1000.0 + number / 2)
            report(number, 22)
    assert "12 of 22 2.0/s, 5 s left" in capsys.readouterr().err.splitlines()[-1]


def test_skipped_stages_do_not_change_the_time_left(clock):
    shown = progress.ProgressDisplay({"a": 10, "b": 20, "c": 30}, quiet=True)
    with shown.stage("a", "a"):
        clock.append(0.1)
    shown.done("a", "a", skipped=True)
    assert shown.seconds_left("b", 0.5) == 40
    with shown.stage("b", "b"):
        clock.append(40.1)
    shown.done("b", "b")
    assert shown.seconds_left("c", 0.0) == 60


def test_notes_and_warnings_are_printed_to_a_log(clock, capsys):
    with progress.ProgressDisplay().stage("sft", "sft: the student learns") as report:
        clock.append(31.0)
        report(1, 9, note="loss 0.5")
        report(0, 0, warning="the margin [stays] at 0")
    err = capsys.readouterr().err
    assert "1 of 9 loss 0.5" in err
    assert "warning: the margin [stays] at 0" in err


# -- the width of the terminal -------------------------------------------------------------------------------------

FIGURES = "loss 0.412, margin 0.31, accuracy 74 %, 3,204 tokens/s, 9.8 GB, 0.6/s, $0.12 of about $1.40, 4 min 2 s left"


def test_the_least_important_figures_are_dropped_first():
    assert progress.fit_to_width(FIGURES, 200) == FIGURES
    shorter = FIGURES.replace("0.6/s, ", "")
    assert progress.fit_to_width(FIGURES, len(FIGURES) - 1) == shorter
    assert progress.fit_to_width(FIGURES, len(shorter) - 1) == shorter.replace("3,204 tokens/s, ", "")
    assert (
        progress.fit_to_width(FIGURES, 62) == "loss 0.412, margin 0.31, $0.12 of about $1.40, 4 min 2 s left"
    )
    assert progress.fit_to_width(FIGURES, 5) == "4 min 2 s left"
    assert progress.fit_to_width("", 5) == ""


@pytest.mark.parametrize("columns", [60, 80, 100, 140])
def test_stage_step_and_time_left_fit_every_terminal(columns, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(columns))
    with progress.ProgressDisplay().stage("dpo", "dpo: the student prefers right reviews") as report:
        for done in range(8):
            report(done, 1500, note=FIGURES.partition(", 0.6/s")[0])
            time.sleep(0.02)
    sent = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    line = [line for line in re.split(r"[\r\n]+", sent) if "/1500" in line][-1].rstrip()
    assert line.startswith("dpo")
    assert " 7/1500 " in line
    assert re.search(r"\d (s|min \d+ s) left$", line)
    assert len(line) <= columns
    assert "…" not in line
    assert "loss 0.412" in line or columns < 80


@pytest.mark.parametrize(
    ("seconds", "warns", "headed"), [(0.0, False, False), (0.0, True, True), (0.2, False, True)]
)
def test_an_instant_stage_has_no_heading_in_a_log(seconds, warns, headed, monkeypatch, capsys):
    monkeypatch.setattr(progress, "HEADING_DELAY", 0.05)
    with progress.ProgressDisplay().stage("sft", "sft: the student learns") as report:
        time.sleep(seconds)
        if warns:
            report(1, 2, warning="the loss is falling too fast")
    time.sleep(0.1)
    lines = capsys.readouterr().err.splitlines()
    assert ("sft: the student learns" in lines) == headed
    assert len(lines) == headed + warns
    assert not warns or "too fast" in lines[-1]


def test_a_heading_is_never_printed_after_its_stage(monkeypatch):
    monkeypatch.setattr(progress, "HEADING_DELAY", 0.01)
    printed = []

    def slowly(text):
        time.sleep(0.1)
        printed.append(text)

    monkeypatch.setattr(progress.console, "note", slowly)
    with progress.ProgressDisplay().stage("sft", "heading"):
        time.sleep(0.03)
    printed.append("end")
    time.sleep(0.15)
    assert printed == ["heading", "end"]
