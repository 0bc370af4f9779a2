"""The baselines of an evaluation: the base model under its own prompt, and the majority vote."""

import pytest

from sclite.config import Config
from sclite.evaluate.baselines import elect, measure_baseline
from sclite.evaluate.evaluate import HeldOut
from sclite.grading.worker import Grader
from sclite.records import Problem
from sclite.student.base import Reply

PROBLEMS = [Problem(id=f"p{n}", question=f"What is {n} + 1?", answer=str(n + 1)) for n in range(3)]
HELD_OUT = HeldOut(PROBLEMS, [], "mine.jsonl", "mine.jsonl", "eval/mine")


@pytest.fixture(scope="module")
def grader():
    with Grader() as grader:
        yield grader


class Scripted:
    """Answers the requests in reverse order with these texts, 10 tokens each."""

    def __init__(self, *texts: str, finish: str = "stop"):
        self.texts, self.finish, self.requests = texts, finish, []

    def generate(self, requests):
        self.requests += requests
        for index in reversed(range(len(requests))):
            yield Reply(index, self.texts[index], 10, 5, self.finish)


def replies(*texts: str) -> list[Reply]:
    return [Reply(i, text, 1, 1, "stop") for i, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("texts", "elected"),
    [
        (["A: 1", "A: 2", "A: 2"], 1),
        (["\\boxed{0.5}", "A: 3", "\\boxed{\\frac{1}{2}}"], 0),  # equal as numbers
        (["A: 3", "A: 1", "A: 2"], 0),  # a tie: the earliest
        (["hm", "well", "A: 2"], 2),  # without an answer there is no vote
        (["hm", "well", "so"], 0),
    ],
)
def test_most_frequent_answer_is_elected(texts, elected, grader):
    assert elect(replies(*texts), grader)[0].index == elected


def test_majority_counts_the_tokens_of_all_samples(run, grader):
    student = Scripted("A: 1", "A: 9", "A: 1", "A: 9", "A: 9", "A: 2", "A: 3", "A: 9", "A: 8")
    label, figures = measure_baseline(Config(), run, "dpo", student, HELD_OUT, "digest", grader)
    assert label == "dpo, majority of 3"
    assert (figures["acc_t1"], figures["tokens"], figures["n"]) == (2 / 3, 30, 3)  # 1, 9 and (in a tie) 3
    assert {request.temperature for request in student.requests} == {0.8}
    assert len({request.seed for request in student.requests}) == 9


def test_base_model_is_asked_without_a_system_prompt(run, grader):
    student = Scripted("It is \\boxed{1}", "\\boxed{5}", "I think 3")
    label, figures = measure_baseline(Config(), run, "base", student, HELD_OUT, "digest", grader)
    assert label == "base, own prompt"
    assert (figures["acc_t1"], figures["tokens"]) == (2 / 3, 10)
    assert [message["role"] for message in student.requests[0].messages] == ["user"]
    assert student.requests[0].temperature == 0


def test_failed_calls_are_unknown_and_results_are_kept(run, grader):
    failed = Scripted(*[""] * 3, finish="error")
    _, figures = measure_baseline(Config(), run, "base", failed, HELD_OUT, "digest", grader)
    assert (figures["n"], figures["unknown"]) == (0, 3)
    again = Scripted()
    assert measure_baseline(Config(), run, "base", again, HELD_OUT, "digest", grader)[1] == figures
    assert again.requests == []
    other = Scripted("A: 1", "A: 2", "A: 3")
    assert measure_baseline(Config(), run, "base", other, HELD_OUT, "other", grader)[1]["acc_t1"] == 1
