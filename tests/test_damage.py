"""Damaged files of a run: the last intact state is used, losses are reported, and the suggested fix works."""

import sqlite3
from pathlib import Path

import pytest

from sclite.errors import DataError
from sclite.records import Drop, Problem
from sclite.run import Report
from tests.damages import damages, survive
from tests.toy import raises, write_rows


def problem(number: int) -> Problem:
    return Problem(id=f"p{number}", question=f"What is 1 + 1, for the {number}th time?", answer="2")


def test_a_stage_is_signed_with_all_its_rows_and_done_until_some_are_lost(run, capsys):
    run.replace("problems.jsonl", map(problem, range(64)))
    run.sign("problems", {}, Report("problems"), {"problems.jsonl": 64})
    assert run.done("problems", {}) is not None
    text = run.path("problems.jsonl").read_text()
    run.path("problems.jsonl").write_text(text.replace("the 63th", "the last"))
    assert run.done("problems", {}) is not None
    run.path("problems.jsonl").write_text(text[:-9])
    assert run.done("problems", {}) is None
    assert "63 of 64 rows are intact" in capsys.readouterr().err


DAMAGES = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "binary": lambda data: bytes(range(256)),
    "wrong shape": lambda data: b"[1, 2]",
    "other fields": lambda data: b'{"stage": "sft", "inputs": 3}',
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_manifest_is_reported_with_its_remedy(run, damage):
    run.sign("sft", {"seed": 0}, Report("sft", {"rows": 2}))
    path = run.path("done/sft.json")
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with raises(DataError, "is damaged", hint="remove it and re-run to repeat sft"):
        run.done("sft", {"seed": 0})
    path.unlink()
    assert run.manifest("sft") is None


@pytest.fixture
def built(build, teacher_of_sums):
    """`build-data` on twelve problems: (a function that re-runs it, the requests so far)."""
    write_rows("mine.jsonl", [{"question": problem(n).question, "answer": "2"} for n in range(12)])

    def call():
        ended = build("mine.jsonl")
        assert ended.code == 0, ended.err

    call()
    return call, teacher_of_sums.requests


@pytest.mark.parametrize("damage", ["empty", "truncated", "binary", "a line", "begun.json", "absent"])
def test_damaged_templates_are_restored_from_the_ledger(built, sclite, damage):
    build, asked = built
    paid, path = len(asked), Path("runs/default/templates.jsonl")
    whole = path.read_bytes()
    if damage == "a line":
        path.write_bytes(whole.replace(b'"trace"', b'"trce"', 1))
        ended = sclite("train", "--only", "sft", "--set", "student.model=embedded")
        assert ended.code == 3
        assert "templates.jsonl, line 1" in ended.error
        assert "run `sclite build-data --run runs/default` to restore the rows" in ended.hint
    elif damage == "begun.json":
        Path("runs/default/templates.begun.json").write_bytes(b"\0")
        path.write_bytes(whole[:-20])
    elif damage == "absent":
        path.unlink()
    else:
        path.write_bytes(DAMAGES[damage](whole))
    build()
    assert path.read_bytes() == whole
    assert len(asked) == paid


def test_damaged_drops_are_skipped_with_a_warning(run, capsys):
    run.replace("dropped.jsonl", [Drop(stage="a", id=str(n), reason="x") for n in range(3)])
    lines = run.path("dropped.jsonl").read_bytes().splitlines(keepends=True)
    run.path("dropped.jsonl").write_bytes(lines[0] + b"\xff\xfe{\n" + lines[2])
    run.replace_drops("b", [Drop(stage="b", id="9", reason="y")])
    assert [drop.id for drop in run.read("dropped.jsonl", Drop)] == ["0", "2", "9"]
    assert "dropped.jsonl: line 2 damaged" in capsys.readouterr().err


def test_a_locked_ledger_is_not_reported_as_damaged(built, sclite):
    Path("runs/default/done/templates.json").unlink()
    other = sqlite3.connect("runs/default/ledger.sqlite", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    try:
        ended = sclite("build-data", "mine.jsonl", "--set", "teacher.model=openai/replay")
    finally:
        other.execute("ROLLBACK")
        other.close()
    assert ended.code in (1, 2, 3)
    assert "locked" in ended.error
    assert "another program has it open" in ended.hint


@pytest.mark.parametrize("text", [b"no database " * 100, b"SQLite format 3\0" + b"\xff" * 5000])
def test_a_damaged_ledger_does_not_cost_finished_work(built, sclite, text):
    build, asked = built
    paid, ledger = len(asked), Path("runs/default/ledger.sqlite")
    ledger.write_bytes(text)
    Path("runs/default/done/templates.json").unlink()
    ended = sclite("build-data", "mine.jsonl", "--set", "teacher.model=openai/replay")
    assert ended.code == 3
    assert f"mv {ledger} {ledger}.damaged" in ended.hint
    ledger.rename(f"{ledger}.damaged")
    build()
    assert len(asked) == paid


def test_no_damaged_file_crashes_a_command_or_costs_money(built, tmp_path, capsys, monkeypatch):
    """A sample of tests/quickstart/test_fuzz.py on a run without a student."""
    _, asked = built
    commands = (("status",), ("show",), ("build-data", "--yes"), ("export", "--format", "data"))
    wrong, paid = {}, len(asked)
    for name, kind, content in damages(Path("runs/default"), 16, seed=11):
        found = survive(Path("runs/default"), name, content, tmp_path / "copy", capsys, monkeypatch, commands)
        if name not in ("ledger.sqlite", "run.toml") and len(asked) != paid:
            found.append(f"{len(asked) - paid} requests were sent again")
        wrong |= {f"{name} {kind}": found} if found else {}
        paid = len(asked)
    assert wrong == {}
