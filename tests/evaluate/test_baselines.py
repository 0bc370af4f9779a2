"""The baselines of an evaluation: the base model with its own prompt, and the majority vote."""

import pytest

from sclite.config import Config
from sclite.evaluate.baselines import measure_baseline
from sclite.evaluate.evaluate import HeldOut
from sclite.evaluate.metrics import Outcome
from sclite.records import Problem
from tests.toy import ScriptedStudent

PROBLEMS = [Problem(id=f"p{n}", question=f"What is {n} + 1?", answer=str(n + 1)) for n in range(3)]


@pytest.fixture
def measure(run, grader):
    """(label, figures) of a baseline on some of PROBLEMS."""

    def measure(name, student, count=3, identity="digest", **settings):
        held_out = HeldOut(PROBLEMS[:count], [], "mine.jsonl", "mine.jsonl", "eval/mine")
        config = Config.model_validate({"eval": settings})
        (found,) = measure_baseline(config, run, name, student, held_out, identity, grader).items()
        return found

    return measure


@pytest.mark.parametrize(
    ("texts", "elected"),
    [
        (["A: 1", "A: 2", "A: 2"], 1),
        (["\\boxed{0.5}", "A: 3", "\\boxed{\\frac{1}{2}}"], 0),  # equal as numbers
        (["A: 3", "A: 1", "A: 2"], 0),  # a tie: the earliest
        (["hm", "well", "A: 2"], 2),  # no answer, no vote
        (["hm", "well", "so"], 0),
    ],
)
def test_majority_vote_chooses_the_most_common_answer(texts, elected, run, measure):
    measure("dpo", ScriptedStudent(*texts), count=1)
    (row,) = run.read("eval/mine/dpo-majority.jsonl", Outcome)
    assert row.first == texts[elected]


def test_majority_counts_the_tokens_of_all_samples(measure):
    student = ScriptedStudent("A: 1", "A: 9", "A: 1", "A: 9", "A: 9", "A: 2", "A: 3", "A: 9", "A: 8")
    label, figures = measure("dpo", student)
    assert label == "dpo, majority of 3"
    assert (figures["acc_t1"], figures["tokens"], figures["n"]) == (2 / 3, 30, 3)  # 1, 9 and (in a tie) 3
    assert {request.temperature for request in student.requests} == {0.8}
    assert len({request.seed for request in student.requests}) == 9


def test_base_model_is_asked_without_a_system_prompt(measure):
    student = ScriptedStudent("It is \\boxed{1}", "\\boxed{5}", "I think 3")
    label, figures = measure("base", student)
    assert label == "base, own prompt"
    assert (figures["acc_t1"], figures["tokens"]) == (2 / 3, 10)
    assert [message["role"] for message in student.requests[0].messages] == ["user"]
    assert student.requests[0].temperature == 0


def test_failed_calls_are_unknown_and_results_are_kept(measure):
    _, figures = measure("base", ScriptedStudent("", finishes=("error",)))
    assert (figures["n"], figures["unknown"]) == (0, 3)
    again = ScriptedStudent("A: 1", "A: 2", "A: 3")
    assert measure("base", again)[1] == figures
    assert again.requests == []
    assert measure("base", again, identity="other")[1]["acc_t1"] == 1
    measure("base", again, identity="other", context=512)
    assert len(again.requests) == 6  # replies that did not fit may fit now
