"""Replies of an interrupted command are not requested again."""

from contextlib import suppress

import pytest

from sclite.student.base import Request, ScoreRequest
from sclite.student.recorder import recorded
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
