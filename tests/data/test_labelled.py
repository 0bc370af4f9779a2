"""`attempts.source`: labelled work from a file, and its unusable rows."""

import gzip
import json
from pathlib import Path

import pytest

from sclite.config import Config
from sclite.data.attempts import write_attempts
from sclite.data.imported import import_attempts, read_labelled
from sclite.errors import DataError
from sclite.records import Attempt, Drop
from sclite.trace import Step, Trace, parse, render
from tests.replay import sums

PROBLEMS = sums(5)
GOOD = {"question": "What is 0 + 1?", "steps": ["1"]}


def work(*steps, **more) -> dict:
    return {"question": "What is 1 + 1?", "steps": list(steps), **more}


def write_imported(run, grader, path):
    settings = Config.model_validate({"attempts": {"source": str(path)}})
    return write_attempts(settings, run, problems=PROBLEMS, student=None, grader=grader)


def load(grader, path):
    return import_attempts(Path(path), PROBLEMS, grader, [])


def test_imported_attempts_keep_labels_and_get_a_verdict(run, grader, write):
    source = write(
        "mine.jsonl",
        {**work("1 + 1 = 3", "So 3", first_error_step=1), "question": "What  is 1 + 1?"},
        {"question": "Something else?", "steps": ["x"]},
        {"question": "What is 0 + 1?", "steps": ["0 + 1 = 1"], "first_error_step": 0},
        work("a <Step2> b", "#### 2", answer=2),
        work("one\u2028two", "2"),  # a line separator that does not end a line
        {"question": "What is 3 + 1?", "steps": ["5"], "answer": "5", "first_error_step": None},
    )
    report = write_imported(run, grader, source)
    rows = run.read("attempts.jsonl", Attempt)
    found = [(r.id, r.sample, r.correct, r.first_error) for r in rows]
    assert found[:2] == [("p0", 0, True, None), ("p1", 0, False, 1)]
    assert found[2:] == [("p1", 1, True, None), ("p1", 2, True, None), ("p3", 0, False, None)]
    assert parse(rows[1].trace).trace == Trace((Step("1 + 1 = 3"), Step("So 3")), None, "3")
    assert rows[2].answer == "2"
    assert all(row.trace == render(parse(row.trace).trace) for row in rows)
    assert report.counts == {"attempts": 5, "right": 3, "wrong": 2, "unknown": 0}


@pytest.mark.parametrize(
    "row",
    ['{"question": "What is 1 + 1?"}', '{"steps": ["a"]}', '{"question": "What is 1 + 1?", "steps": "one string"}',
     '{"question": "What is 1 + 1?", "steps": [NaN]}', '{"question": "What is 1 + 1?", "steps": ["\\ud83d"]}',
     '{"question": 7, "steps": ["a"]}', "[1]", "not JSON", json.dumps(work()), json.dumps(work("a", " ")),
     json.dumps(work("a", first_error_step=2)), json.dumps(work("a", first_error_step=-2)),
     json.dumps(work("a", first_error_step="first"))],
)  # fmt: skip
def test_unusable_row_is_skipped_with_file_and_line(run, grader, tmp_path, row):
    path = tmp_path / "mine.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{row}\n")
    report = write_imported(run, grader, path)
    assert report.counts["attempts"] == 1
    assert report.dropped == {"row_not_readable": 1}
    (drop,) = run.read("dropped.jsonl", Drop)
    assert (drop.stage, drop.id, drop.raw) == ("attempts", "line 3", row)
    assert "mine.jsonl, line 3: " in drop.detail
    path.write_text(row + "\n")
    with pytest.raises(DataError, match=r"no usable row: 1 row_not_readable; .*mine\.jsonl, line 1: "):
        load(grader, path)


def test_gzipped_attempts_are_read_if_they_are_utf8(run, grader, tmp_path):
    path, row = tmp_path / "mine.jsonl.gz", json.dumps(GOOD).encode() + b"\n"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + row))
    assert write_imported(run, grader, path).counts["attempts"] == 1
    path.write_bytes(gzip.compress(row.replace(b'"1"', b'"caf\xe9"')))
    with pytest.raises(DataError, match="not UTF-8"):
        load(grader, path)


def test_row_with_an_unknown_question_is_skipped(run, grader, write):
    rows = [{"question": q, "steps": ["1"]} for q in ("what is  0 + 1?", "Something else?")]
    report = write_imported(run, grader, write("mine.jsonl", *rows))
    assert [r.id for r in run.read("attempts.jsonl", Attempt)] == ["p0"]  # ignoring case and white space
    assert report.dropped == {"question_unknown": 1}
    (drop,) = run.read("dropped.jsonl", Drop)
    assert json.loads(drop.raw) == rows[1]
    with pytest.raises(
        DataError, match=r"no usable row: 1 question_unknown; .* is not among the run's problems"
    ):
        load(grader, write("other.jsonl", rows[1]))
    with pytest.raises(DataError, match="does not exist"):
        load(grader, "none.jsonl")


@pytest.mark.parametrize("label", [0, -1])
def test_label_without_an_error_makes_the_attempt_right(grader, write, label):
    rows = [work(step, first_error_step=label) for step in ("two", "so 2")]
    found = load(grader, write("mine.jsonl", *rows))
    # the first has no readable answer and gets the right one
    expected = [(0, True, None, "2"), (1, True, None, "2")]
    assert [(r.sample, r.correct, r.first_error, r.answer) for r in found] == expected
    assert not parse(found[0].trace).issues


def test_labelled_step_makes_the_attempt_wrong(grader, write):
    (found,) = load(grader, write("mine.jsonl", work("1 + 1 = 3", "so 2", first_error_step=1)))
    assert (found.correct, found.first_error) == (False, 1)


def test_labels_are_read_for_an_evaluation(write):
    rows = [work("1 + 1 = 3", "So 3", first_error_step=1), work("2", first_error_step=-1), work("3")]
    found = read_labelled(Path(write("mine.jsonl", *rows)))
    assert [(question, len(trace.steps), step) for question, trace, step in found] == [
        ("What is 1 + 1?", 2, 1),
        ("What is 1 + 1?", 1, 0),
    ]
    for row, said in ((work("3"), "has no labels"), (work(), "line 1: steps: List should have at least 1")):
        with pytest.raises(DataError, match=said):
            read_labelled(Path(write("other.jsonl", row)))
