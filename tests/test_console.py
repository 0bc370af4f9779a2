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
