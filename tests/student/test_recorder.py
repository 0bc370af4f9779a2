"""Replies of an interrupted command are not requested again; a student's work is counted."""

from contextlib import suppress
from dataclasses import replace

import pytest

from sclite.student.base import Request, ScoreRequest
from sclite.student.recorder import WorkCounter, recorded
from tests.toy import ScriptedStudent

REQUESTS = [Request(({"role": "user", "content": text},), seed=n) for n, text in enumerate("abc")]
SCORES = [ScoreRequest(({"role": "user", "content": text},), ("x",), (0,), (("y", None),)) for text in "de"]


@pytest.fixture
def interrupted(tmp_path):
    """The file of a command that was interrupted after its first reply, that to the last request, and one score."""
    path = tmp_path / "eval/dpo.partial.jsonl"
    with (
        suppress(KeyboardInterrupt),
        recorded(ScriptedStudent("1", "2", "3"), path, "a model") as student,
    ):
        next(student.score(SCORES))
        next(student.generate(REQUESTS))
        raise KeyboardInterrupt
    return path


def test_an_interrupted_command_resumes_with_the_replies_it_has(interrupted):
    again = ScriptedStudent("1", "2", odds=7.0)
    with recorded(again, interrupted, "a model") as student:
        replies = {reply.index: reply.text for reply in student.generate(REQUESTS)}
        odds = {scores.index: scores.log_odds for scores in student.score(SCORES)}
    assert replies == {0: "1", 1: "2", 2: "3"}
    assert again.requests == REQUESTS[:2]
    assert odds == {0: (-5.0,), 1: (7.0,)}
    assert not interrupted.exists()


def test_another_model_or_a_damaged_line_is_requested_again(interrupted):
    with interrupted.open("ab") as file:
        file.write(b'{"half')
    for identity, asked in (("another model", 3), ("a model", 2)):
        again = ScriptedStudent("1", "2", "3")
        with suppress(KeyboardInterrupt), recorded(again, interrupted, identity) as student:
            assert len(list(student.generate(REQUESTS))) == 3
            raise KeyboardInterrupt
        assert len(again.requests) == asked


def test_replies_and_scores_pass_unchanged_and_are_counted():
    seen = []
    student = WorkCounter(ScriptedStudent("a", "b", "c"), 2, 2, lambda *counts: seen.append(counts))
    assert {reply.text for reply in student.generate(REQUESTS[:2])} == {"a", "b"}
    assert [found.log_odds for found in student.score(SCORES)] == [(-5.0,)] * 2
    assert seen[:2] == [(1, 1 / 6, "1 texts written"), (2, 2 / 6, "2 texts written")]
    assert seen[2:] == [(2, 3 / 6, "2 texts written, 1 reviewed"), (2, 4 / 6, "2 texts written, 2 reviewed")]
    corrections = [replace(request, pieces=("<Step1>1 + 1 = 2\n",)) for request in REQUESTS]
    assert len(list(student.generate(corrections))) == 3  # more than scores
    assert seen[-1] == (2, 1.0, "5 texts written, 2 reviewed")
