"""Rates, costs and time left; the progress bar in a real terminal, and log lines."""

import io
import itertools
import re
import sys
import time
from contextlib import contextmanager

import pytest

from sclite import progress


@pytest.fixture
def clock(monkeypatch):
    """A fake clock: `clock.append(seconds)` sets the time."""
    times = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: times[-1])
    return times


def test_the_rate_is_measured_from_the_first_row_and_slow_in_seconds(clock):
    rate, rate_total = progress.Rate(), 121
    rate.update(100, 100 / rate_total, 0.5)
    for number in range(1, 12):
        clock.append(60.0 + number)  # a minute before the first row, as while LiteLLM is imported
        rate.update(100 + number, (100 + number) / rate_total, 0.5 + 0.01 * number)
        assert number > 2 or rate.line() == ""  # one row has no rate
    rate.total = rate_total
    assert rate.line() == "$0.6100 of about $0.71, 1.0/s"
    assert rate.seconds_left() == pytest.approx(10)
    rate = progress.Rate()
    for number in range(4):
        clock.append(29.0 * number)
        rate.update(number, number / 5, None)
    assert rate.line() == "29 s each"
    assert rate.seconds_left() == pytest.approx(58)
    for number in range(1, 40):  # no row, but other work: those that are written are being reviewed
        clock.append(87.0 + 5 * number)
        rate.update(3, 0.6 + number / 100, None)
    assert rate.line() == ""


# (tokens, seconds) of the first 56 of 59 recorded steps of SmolLM2's SFT; other programs took the cores near the end
RECORDED = """
4705:19.1 3899:13.0 3280:7.2 3270:6.5 3705:8.5 3166:7.3 3181:6.0 4383:11.8 3050:5.8 3796:8.7 2569:6.3
2510:4.9 4103:13.1 2740:5.6 3107:5.9 3667:9.8 3768:9.1 3248:6.2 3949:9.4 3643:8.0 4066:12.0 3132:6.1
3550:6.9 3230:6.9 3318:8.4 4631:17.4 2635:5.9 4239:12.9 3030:6.3 3212:6.5 2540:6.9 3089:6.1 4535:13.8
3073:6.7 4470:13.9 2612:7.4 2663:6.0 3862:10.2 3829:10.0 3011:6.5 3216:11.7 3256:12.4 3296:9.4 3459:12.3
3248:6.4 3885:10.5 3844:9.1 4032:10.2 3600:13.3 3195:12.6 4041:18.2 3226:12.2 2985:11.8 3373:12.8 4576:21.5
3152:14.9
"""
STEPS = [(int(tokens), float(seconds)) for tokens, seconds in (pair.split(":") for pair in RECORDED.split())]


def follow(display, clock, stage, steps, seen, loading=10.0):
    """Run a stage with these (tokens, seconds) steps; adds (clock, seconds left as shown, None: estimating) to `seen`."""
    total = sum(tokens for tokens, _ in steps)
    with display.stage(stage, stage) as report:
        clock.append(clock[-1] + loading)
        report(0, len(steps))
        for number, (_, seconds) in enumerate(steps, 1):
            clock.append(clock[-1] + seconds)
            report(number, len(steps), share=sum(tokens for tokens, _ in steps[:number]) / total)
            end = display.countdown.end
            seen.append((clock[-1], end and max(0.0, end - clock[-1])))
    display.done(stage, stage)


@pytest.mark.parametrize("steps", [STEPS, sorted(STEPS)], ids=["as recorded", "growing"])
def test_the_time_left_falls_on_recorded_steps(clock, capsys, steps):
    seen = []
    follow(progress.ProgressDisplay(), clock, "sft", steps, seen)
    assert [left for _, left in seen[:2]] == [None, None]
    known = [(now, left) for now, left in seen if left is not None]
    assert len(known) > len(steps) - 5
    rises = [later / left for (_, left), (_, later) in itertools.pairwise(known[:-5]) if later > left]
    assert len(rises) <= 2
    assert all(ratio < 1.4 for ratio in rises)
    for now, left in known[len(known) // 4 :]:  # the truth, known afterwards
        assert left == pytest.approx(clock[-1] - now, rel=0.35, abs=35)


def test_the_time_left_of_a_plan_waits_for_the_speed_of_this_machine(clock, capsys):
    """Loading LiteLLM took three times as long as the planned first stage: the others did not take three times as long."""
    plan = {"templates": 7, "sft": 65, "attempts": 33, "warmup": 80, "dpo": 52, "eval": 90}
    display, seen = progress.ProgressDisplay(plan), []
    follow(display, clock, "templates", [(1, 0.01)] * 200, seen, loading=20.0)
    assert {left for _, left in seen} == {None}
    total = sum(tokens for tokens, _ in STEPS)
    for stage in list(plan)[1:]:
        steps = [(tokens, 1.2 * plan[stage] * tokens / total) for tokens, _ in STEPS]
        follow(display, clock, stage, steps, seen, 2.0)
    known = [(now, left) for now, left in seen if left is not None]
    assert known[0][0] < 20 + 20
    assert all(later <= 1.25 * left + 2 for (_, left), (_, later) in itertools.pairwise(known))
    for now, left in known:
        assert left == pytest.approx(clock[-1] - now, rel=0.3, abs=10)


def test_time_spent_on_a_question_does_not_count(clock, monkeypatch, capsys):
    monkeypatch.setattr(progress.console, "is_interactive", lambda: True)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Yes\n"))
    display, rates = progress.ProgressDisplay(), []
    monkeypatch.setattr(display, "_log", record_figures(rates))
    with display.stage("templates", "templates") as report:
        for number in range(8):
            clock.append(float(number))
            report(number, 22)
        clock.append(1000.0)
        assert display.confirm("Continue?")
        for number in range(8, 15):
            clock.append(1000.0 + number / 2)
            report(number, 22)
    assert rates[-1] == "4 s left, 2.0/s"


def record_figures(into):
    """A display that keeps the figures of every update."""

    @contextmanager
    def log(text, figures):
        yield into.append, lambda done, total: into.append(figures())

    return log


def test_skipped_stages_do_not_change_the_time_left(clock):
    shown = progress.ProgressDisplay({"a": 15, "b": 20, "c": 30}, quiet=True)
    with shown.stage("a", "a"):
        clock.append(0.1)
    shown.done("a", "a", skipped=True)
    assert shown.seconds_left("b", 0.5) is None  # nothing was measured
    with shown.stage("b", "b"):
        clock.append(40.1)
    shown.done("b", "b")
    assert shown.seconds_left("c", 0.0) == 60


@pytest.fixture
def hurried(monkeypatch):
    """A log with short intervals for its heading and lines."""
    monkeypatch.setattr(progress, "HEADING_DELAY", 0.01)
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.05)


def test_notes_warnings_and_numbers_of_stages_are_printed_to_a_log(hurried, capsys):
    with progress.ProgressDisplay().stage("sft", "sft: the student learns") as report:
        report(1, 9, note="loss 0.5")
        report(0, 0, warning="the margin [stays] at 0")
        time.sleep(0.2)
    err = capsys.readouterr().err
    assert "1 of 9 0 s so far, estimating time left, loss 0.5" in err
    assert "warning: the margin [stays] at 0" in err
    display = progress.ProgressDisplay({"export": 1, "eval": 2})
    for name in ("export", "eval", "export"):  # eval exports the students that training has not
        with display.stage(name, f"{name}: work"):
            time.sleep(0.1)
    headings = [line.partition(":")[0] for line in capsys.readouterr().err.splitlines() if line[0] != " "]
    assert headings == ["1/2 export", "2/2 eval", "export"]


@pytest.mark.parametrize("note", ["", "reference of 8 of 16 reviews"])
def test_a_log_continues_before_the_first_row(hurried, capsys, note):
    """A stage that loads a model for a minute is not silent, and its notes have no count."""
    with progress.ProgressDisplay().stage("dpo", "dpo: the student learns") as report:
        if note:
            report(0, 0, note=note)
        time.sleep(0.3)
    heading, first, second, *_ = capsys.readouterr().err.splitlines()
    assert heading == "dpo: the student learns"
    assert first == second == f"  0 s so far, {note}".rstrip(", ")


NOTE = "loss 0.412, margin 0.31, accuracy 74 %, 3,204 tokens/s, 9.8 GB"


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (20, ""),
        (60, ""),
        (80, ", loss 0.412, margin 0.31"),
        (100, ", loss 0.412, margin 0.31, accuracy 74 %"),
        (180, f", {NOTE}"),
    ],
)
def test_a_narrow_terminal_drops_the_least_important_figures(columns, shown, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(columns))
    with progress.ProgressDisplay().stage("dpo", "dpo: the student prefers right reviews") as report:
        for done in range(8):
            report(done, 1500, note=NOTE)
            time.sleep(0.05 if done < 7 else 0.3)
    sent = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    if columns == 20:  # too narrow for any figure
        assert "loss" not in sent
        return
    line = [line for line in re.split(r"[\r\n]+", sent) if "/1500" in line][-1].rstrip()
    assert line[1:].startswith(" dpo")  # behind a spinner
    assert "0/?" not in sent
    assert " 7/1500 " in line
    assert re.search(r" 7/1500 0:00:0\d ", line)
    assert line.endswith(f" estimating time left{shown}")
    assert len(line) <= columns


@pytest.mark.parametrize(
    ("seconds", "warns", "headed"), [(0, False, False), (0, True, True), (0.2, False, True)]
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


def test_a_heading_is_never_printed_after_its_stage(hurried, monkeypatch):
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
