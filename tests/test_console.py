"""The live line: rows per second, money and time left, from what this command has done and nothing else."""

import pytest

from sclite import console


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test turns on: `clock.append(seconds)`."""
    times = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: times[-1])
    return times


def test_the_rate_counts_from_the_first_row_and_not_from_the_start(clock):
    rate = console.Rate()
    rate.tell(100, 0.5)
    for number in range(1, 12):
        clock.append(60.0 + number)  # a minute passes before the first row: LiteLLM is imported, rows are few
        rate.tell(100 + number, 0.5 + 0.01 * number)
    assert rate.line(121) == "1.0/s, $0.6100 of about $0.71, 10 s left"


def test_the_time_that_a_question_takes_is_no_work(clock):
    rate = console.Rate()
    for number in range(8):
        clock.append(float(number))
        rate.tell(number, None)
    clock.append(1000.0)
    rate.restart()
    for number in range(8, 13):
        clock.append(1000.0 + number / 2)
        rate.tell(number, None)
    assert rate.line(22) == "2.0/s, 5 s left"


def test_before_there_are_two_rows_nothing_is_said(clock):
    rate = console.Rate()
    rate.tell(0, None)
    clock.append(1.0)
    rate.tell(1, None)
    assert rate.line(10) == ""


def test_a_skipped_stage_tells_nothing_of_how_fast_the_machine_is(clock):
    screen = console.Screen({"a": 10, "b": 20, "c": 30}, quiet=True)
    with screen.stage("a", "a"):
        clock.append(0.1)
    screen.done("a", "a", skipped=True)
    assert screen.left("b", 0.5) == 40
    with screen.stage("b", "b"):
        clock.append(40.1)
    screen.done("b", "b")
    assert screen.left("c", 0.0) == 60


def test_figures_of_the_moment_and_warnings_reach_a_log(clock, capsys):
    with console.Screen().stage("sft", "sft: the student learns") as progress:
        clock.append(31.0)
        progress(1, 9, note="loss 0.5")
        progress(0, 0, warning="the margin [stays] at 0")
    told = capsys.readouterr().err
    assert "1 of 9 loss 0.5" in told
    assert "warning: the margin [stays] at 0" in told
