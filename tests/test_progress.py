"""Rates, costs and time left; the progress bar in a real terminal, and log lines."""

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


def test_the_pace_is_measured_from_the_first_row_and_slow_in_seconds(clock):
    pace = progress.Pace()
    pace.update(100, 121, 0.5)
    for number in range(1, 12):
        clock.append(60.0 + number)  # a minute before the first row, as while LiteLLM is imported
        pace.update(100 + number, 121, 0.5 + 0.01 * number, note="2 repairs")
        assert number > 2 or pace.figures() == f"{100 + number}/121, estimating time left, 2 repairs"
    assert pace.figures() == "111/121, 10 s left, $0.6100 of about $0.71, 1.0/s, 2 repairs"
    clock.append(75.0)
    assert pace.figures().startswith("111/121, 6 s left")
    pace = progress.Pace()
    for number in range(4):
        clock.append(29.0 * number)
        pace.update(number, 5)
    assert pace.figures() == "3/5, 58 s left, 29 s each"


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


@pytest.mark.parametrize("steps", [STEPS, sorted(STEPS)], ids=["as recorded", "growing"])
def test_the_time_left_is_right_on_recorded_steps(clock, steps):
    pace, total, known = progress.Pace(), sum(tokens for tokens, _ in steps), []
    for number, (_, seconds) in enumerate(steps, 1):
        clock.append(clock[-1] + seconds)
        share = sum(tokens for tokens, _ in steps[:number]) / total
        pace.update(number, len(steps), share=share)
        if pace.end is not None:
            known.append((clock[-1], pace.end - clock[-1]))
    assert len(known) > len(steps) - 5
    for now, left in known[len(known) // 4 :]:  # the truth, known afterwards
        assert left == pytest.approx(clock[-1] - now, rel=0.35, abs=60)


def test_time_spent_on_a_question_does_not_count(clock, monkeypatch, capsys):
    monkeypatch.setattr(progress.console, "is_interactive", lambda: True)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Yes\n"))
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    display = progress.ProgressDisplay()
    with display.stage("templates", "templates") as report:
        for number in range(8):
            clock.append(float(number))
            report(number, 22)
        clock.append(1000.0)
        assert display.confirm("Continue?")
        for number in range(8, 15):
            clock.append(1000.0 + number / 2)
            report(number, 22)
    assert "14/22, 4 s left, 2.0/s" in capsys.readouterr().err


@pytest.mark.parametrize("note", ["", "reference of 8 of 16 reviews"])
def test_a_log_has_lines_before_the_first_row_and_warnings_at_once(monkeypatch, capsys, note):
    """A stage that loads a model for a minute is not silent."""
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.05)
    with progress.ProgressDisplay().stage("dpo", "dpo: the student [learns]") as report:
        report(0, 0, note=note)
        report(0, 0, warning="the margin [stays] at 0")
        time.sleep(0.3)
        report(1, 9, note=note)
        time.sleep(0.2)
    warning, first, second, *_, last = capsys.readouterr().err.splitlines()
    assert warning == "warning: the margin [stays] at 0"
    assert first == second == f"dpo: the student [learns] (0 s so far{note and ', '}{note})"
    assert last.startswith("dpo: the student [learns] (0 s so far, 1/9, estimating time left")


def test_a_short_stage_only_has_its_closing_line_in_a_log(capsys):
    display = progress.ProgressDisplay()
    with display.stage("sft", "sft: the student learns") as report:
        report(1, 2)
    display.done("sft", "sft: 2 rows")
    display.done("dpo", "dpo: 2 pairs", skipped=True)
    assert capsys.readouterr().err.splitlines() == [
        "✓ sft: 2 rows 0 s",
        "✓ dpo: 2 pairs · up to date, skipped",
    ]


@pytest.mark.parametrize("columns", [40, 80, 180])
def test_a_narrow_terminal_cuts_off_the_least_important_figures(columns, monkeypatch, capsys):
    note = "loss 0.412, margin 0.31, accuracy 74 %, 3,204 tokens/s, 9.8 GB"
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(columns))
    with progress.ProgressDisplay().stage("dpo", "dpo: the student prefers right reviews") as report:
        for done in range(8):
            report(done, 1500, note=note)
            time.sleep(0.05 if done < 7 else 0.3)
    sent = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    line = [line for line in re.split(r"[\r\n]+", sent) if " dpo" in line][-1].rstrip()
    assert line[1:].startswith(" dpo")  # behind a spinner
    assert len(line) <= columns
    shown = line.partition(" 0:00:0")[2][2:]
    assert f"7/1500, estimating time left, {note}".startswith(shown.rstrip("…"))
    assert len(shown) >= min(columns - 30, 60)
