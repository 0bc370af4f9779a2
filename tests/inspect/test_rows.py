"""Choosing and counting rows, and their errors."""

import json

import pytest

from sclite.errors import DataError, UsageError
from sclite.inspect.rows import FILES, choose_rows
from sclite.records import Attempt, Drop, Pair, Problem, Review, Template
from sclite.run import Run
from tests.toy import raises


def problem(number: int) -> Problem:
    return Problem(id=f"p{number}", question=f"½ of {number}?", answer=str(number))


def attempt(number: int, correct: bool | None) -> Attempt:
    return Attempt(id=f"p{number}", sample=0, trace="t", answer="1", correct=correct)


@pytest.fixture
def full(run) -> Run:
    """A run with a few rows of each file."""
    trace = "<Step1>x\n</Step1>\n<Answer>1</Answer>"
    run.append("problems.jsonl", map(problem, range(4)))
    run.append("templates.jsonl", [Template(id="p0", question="q", answer="1", trace=trace)])
    run.append("attempts.jsonl", [attempt(0, True), attempt(1, False), attempt(2, None), attempt(3, False)])
    run.append("reviews.jsonl", [Review(id="p1", sample=0, step=1, cause="c", correction="d", trace=trace)])
    run.append("reviews.jsonl", [Review(id="p0", sample=0, step=None, trace=trace)])
    pair = {"sample": 0, "step": 1, "attempt": trace, "prefix": ("a", "b"), "chosen": "c", "rejected": "r"}
    run.append("pairs.jsonl", [Pair(id="p1", kind=kind, **pair) for kind in ("decision", "content")])
    drops = [("templates", "no_steps"), ("templates", "leak"), ("corrections", "leak")]
    run.append("dropped.jsonl", [Drop(stage=stage, id="p2", reason=reason) for stage, reason in drops])
    return run


def ids(run: Run, what: str, **choice) -> list[str]:
    return [row.id for _, row in choose_rows(run, what, **choice)[1]]


def test_the_overview_counts_rows_kinds_and_reasons(full, sclite):
    shown = json.loads(sclite("show", "--run", full.folder, "--json").out)["rows"]
    found = {each.pop("what"): each for each in shown}
    assert found["problems"] == {"rows": 4, "kinds": {}, "reasons": {}}
    assert found["attempts"] == {"rows": 4, "kinds": {"wrong": 2, "right": 1, "unknown": 1}, "reasons": {}}
    assert found["reviews"]["kinds"] == {"correction": 1, "confirmation": 1}
    assert found["pairs"]["kinds"] == {"decision": 1, "content": 1}
    kinds, reasons = {"templates": 2, "corrections": 1}, {"leak": 2, "no_steps": 1}
    assert found["drops"] == {"rows": 3, "kinds": kinds, "reasons": reasons}


def test_rows_are_chosen_by_reason_kind_id_prefix_first_and_limit(full):
    assert choose_rows(full, "drops", reason="leak")[0] == 2
    assert choose_rows(full, "drops", reason="leak", kind="corrections")[0] == 1
    assert ids(full, "attempts", kind="wrong") == ["p1", "p3"]
    assert ids(full, "attempts", kind="unknown") == ["p2"]
    assert ids(full, "problems", id="p3") == ["p3"]
    assert ids(full, "problems", id="3") == []
    assert ids(full, "drops", reason="no_steps", id="p9") == []  # no error: the reason is known
    assert choose_rows(full, "attempts", kind="wrong")[1][1] == (2, attempt(3, False))
    total, rows = choose_rows(full, "problems", limit=2)
    assert (total, [number for number, _ in rows]) == (4, [1, 2])


@pytest.mark.parametrize(
    ("choice", "message", "hint"),
    [
        ({"what": "templats"}, "templats", ", ".join(FILES)),
        ({"what": "drops", "reason": "lek"}, "--reason lek", "leak (2), no_steps (1)"),
        ({"what": "attempts", "kind": "bad"}, "--kind bad", "wrong (2), right (1), unknown (1)"),
        ({"what": "problems", "kind": "bad"}, "--kind bad", "--kind applies to attempts, reviews, pairs"),
        ({"what": "pairs", "reason": "leak"}, "--reason leak", "--reason applies to drops"),
    ],
)
def test_an_unknown_choice_names_the_known_ones(full, choice, message, hint):
    with raises(UsageError, message, hint=hint):
        choose_rows(full, **choice)


def test_a_missing_run_and_a_damaged_row_are_reported(full, sclite):
    missing = sclite("show", "--run", "nowhere")
    assert missing.code == DataError.code
    assert "nowhere does not exist" in missing.error
    assert "sclite build-data" in missing.hint
    with open(full.path("problems.jsonl"), "a") as file:
        file.write("no JSON\n")
    with pytest.raises(DataError, match=r"problems\.jsonl, line 5"):  # whatever is chosen
        choose_rows(full, "problems", limit=1)
