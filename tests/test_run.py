"""The run folder: atomic rows and files, one process at a time, manifests of finished stages."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import pytest

from sclite.config import Config
from sclite.errors import DataError, UsageError
from sclite.records import Attempt, Drop, Problem
from sclite.run import Report, Run, timed, write_text
from sclite.signature import differences, digest, digest_rows
from sclite.train.stage import training_inputs
from tests.toy import raises, wait_until


def problem(number: int, question: str = "How many?") -> Problem:
    return Problem(id=f"p{number}", question=question, answer=str(number))


def test_rows_survive_a_round_trip(run):
    rows = [problem(1), problem(2, 'line one\nline two\u2028three \\ "quoted" ½ \U0001f600'), problem(3)]
    assert run.read("problems.jsonl", Problem) == []
    with pytest.raises(DataError, match=r"problems\.jsonl is missing or empty") as error:
        run.require("problems.jsonl", Problem, "type this")
    assert error.value.hint == "type this"
    run.append("problems.jsonl", [])
    assert not run.path("problems.jsonl").exists()
    run.append("problems.jsonl", rows[:1])
    run.append("problems.jsonl", rows[1:])
    assert run.read("problems.jsonl", Problem) == rows
    run.replace("problems.jsonl", rows[:2])
    assert run.read("problems.jsonl", Problem) == rows[:2]
    unknown = Attempt(id="a", sample=0, trace="t", answer=None, correct=None)
    run.append("attempts.jsonl", [unknown])
    assert '"correct":null' in run.path("attempts.jsonl").read_text()
    assert run.read("attempts.jsonl", Attempt) == [unknown]


@pytest.mark.parametrize(("cut", "left"), [(1, 3), *((cut, 2) for cut in range(2, 60, 7)), (24, 2)])
def test_an_incomplete_last_line_is_dropped(run, cut, left):
    """A cut of one byte removes only the newline, as some editors do; others may end inside a character."""
    rows = [problem(1), problem(2), problem(3, "½" * 20)]
    run.append("problems.jsonl", rows)
    path = run.path("problems.jsonl")
    path.write_bytes(path.read_bytes()[:-cut])
    assert run.read("problems.jsonl", Problem) == rows[:left]
    run.append("problems.jsonl", [problem(4)])
    assert run.read("problems.jsonl", Problem) == [*rows[:left], problem(4)]


@pytest.mark.parametrize("line", ['{"id": 7}', "no JSON", '{"id":"a","question":"q","answer":"1","extra":1}'])
def test_a_damaged_line_is_reported_with_file_and_line(run, line):
    run.append("problems.jsonl", [problem(1)])
    with open(run.path("problems.jsonl"), "a") as file:
        file.write(line + "\n")
    run.append("problems.jsonl", [problem(3)])
    rows = run.rows("problems.jsonl", Problem)
    assert next(rows) == problem(1)  # rows are read lazily
    with raises(DataError, r"problems\.jsonl, line 2: "):
        next(rows)


def test_drops_are_replaced_stage_by_stage_and_make_no_run(run):
    run.replace_drops("a", [Drop(stage="a", id="1", reason="x"), Drop(stage="b", id="2", reason="y")])
    run.replace_drops("a", [Drop(stage="a", id="3", reason="z")])
    assert [(d.stage, d.id) for d in run.read("dropped.jsonl", Drop)] == [("b", "2"), ("a", "3")]
    assert not run.is_begun()
    run.append("problems.jsonl", [problem(1)])
    assert run.is_begun()


def test_rows_are_reordered_by_their_ids(run):
    rows = [problem(3), problem(1), problem(4), problem(2), problem(1, "the last of its id")]
    run.append("problems.jsonl", rows)
    run.reorder("problems.jsonl", Problem, ["p2", "absent", "p1", "p3"])
    assert run.read("problems.jsonl", Problem) == [rows[3], rows[4], rows[0]]
    run.reorder("none.jsonl", Problem, ["p1"])
    assert run.path("none.jsonl").read_text() == ""


def test_a_killed_writer_leaves_whole_rows_and_no_lock(tmp_path):
    script = f"""
        from sclite.records import Problem
        from sclite.run import Run
        run = Run({str(tmp_path / "run")!r})
        with run.lock():
            for number in range(10**9):
                run.append("problems.jsonl", [Problem(id=str(number), question="q" * 5000, answer="1")])
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)])
    run = Run(tmp_path / "run")
    wait_until(lambda: len(run.read("problems.jsonl", Problem)) >= 20)
    process.send_signal(signal.SIGKILL)
    process.wait()
    rows = run.read("problems.jsonl", Problem)
    assert [row.id for row in rows] == [str(n) for n in range(len(rows))]
    with run.lock():
        run.append("problems.jsonl", [problem(1)])
    assert run.read("problems.jsonl", Problem) == [*rows, problem(1)]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    write_text(tmp_path / "file.json", "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text(tmp_path / "file.json", "new")
    assert (tmp_path / "file.json").read_text() == "old"


def test_a_locked_run_is_refused_and_a_folder_that_cannot_be_created(run, tmp_path):
    with run.lock():
        refused = raises(UsageError, "another sclite process is using", hint="--run")
        with refused, Run(run.folder).lock():
            pass
    (tmp_path / "file").write_text("")
    for place in (Path("/proc/sclite"), tmp_path / "file/run"):
        with pytest.raises(UsageError, match="cannot be written"), Run(place).lock():
            pass


def test_a_stage_is_done_only_for_the_same_inputs(run):
    report = Report("sft", {"rows": 2}, {"too_long": 1}, 1.5, 0.25, {"share": 0.5})
    run.sign("sft", {"seed": 0, "data": "abc"}, report)
    manifest = run.done("sft", {"data": "abc", "seed": 0})
    report.skipped = True
    assert Report.of(manifest) == report
    assert run.done("sft", {"seed": 1, "data": "abc"}) is None
    assert run.done("dpo", {"seed": 0, "data": "abc"}) is None
    assert run.manifest("sft") == manifest
    with timed(report):
        time.sleep(0.02)
    assert report.seconds > 1.51


def test_digests_depend_on_content_not_on_order_and_name_the_embedded_student(run):
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1}) != digest({"a": 1, "b": [2, 1]})
    rows = [problem(1, "½"), problem(2)]
    others = digest_rows(rows[:1]), digest_rows(rows[::-1])
    assert digest_rows(iter(rows)) == digest_rows(rows) not in others
    found = [run.file_digest("none")]
    for number in (1, 1, 2):
        run.replace("a.jsonl", [problem(number)])
        found.append(run.file_digest("a.jsonl"))
    assert found[0] == ""
    assert found[1] == found[2] != found[3]
    inputs = training_inputs(Config.model_validate({"student": {"model": "embedded"}}), run, "sft")
    assert inputs["student.model"] == "embedded"


def test_differences_name_the_setting_and_both_values_but_no_hashes():
    before, now = {"lora": {"r": 8}, "seed": 0}, {"lora": {"r": 16}, "seed": 0}
    assert differences(before, now) == ["lora.r: 8 before, 16 now"]
    assert differences(before, before) == []
    letters = {"student.model": "qwen/qwen-4-mini"}, {"student.model": "qwen/qwen-5-mini"}  # sixteen
    assert differences(*letters) == ["student.model: qwen/qwen-4-mini before, qwen/qwen-5-mini now"]
    for other in ("fedcba9876543210", None):
        assert differences({"x.jsonl": "0123456789abcdef"}, {"x.jsonl": other}) == ["x.jsonl changed"]


@pytest.mark.parametrize("error", [UsageError("unknown quantization"), DataError("no such file")])
def test_a_mistyped_value_is_not_saved(run, error):
    with suppress(type(error)), run.recording(Config(seed=2)):
        raise error
    assert not run.path("run.toml").exists()
    with run.recording(Config(seed=1)):
        pass
    kept = run.path("run.toml").read_text()
    assert "seed = 1" in kept
    with suppress(type(error)), run.recording(Config(seed=3)):
        run.mark_started("templates")
        run.replace("problems.jsonl", [problem(1)])
        run.sign("problems", {}, Report("problems"))
        raise error
    assert run.path("run.toml").read_text() == kept
    with suppress(type(error)), run.recording(Config(seed=3)):
        run.write_json("done/templates.json", {})  # a stage has produced something
        raise error
    assert "seed = 3" in run.path("run.toml").read_text()
