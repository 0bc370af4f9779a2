"""The baselines of an evaluation: the native prompt, votes, the best of several samples, and second attempts."""

import pytest

from sclite.config import Config
from sclite.evaluate.baselines import measure_baselines
from sclite.evaluate.evaluate import HeldOut
from sclite.evaluate.metrics import Outcome
from sclite.records import Problem
from sclite.student.base import Scores
from tests.toy import ScriptedStudent

PROBLEMS = [Problem(id=f"p{n}", question=f"What is {n} + 1?", answer=str(n + 1)) for n in range(3)]


def outcome(problem, correct, accused=None):
    answer = {"first": "x", "second": None, "correct1": correct, "correct2": correct, "tokens1": 7}
    named = {"id": problem.id, "question": problem.question, "gold": problem.answer}
    return Outcome(**named, **answer, accused=accused, format_ok=True)


@pytest.fixture
def measure(run, grader):
    """The baselines of a student on some of PROBLEMS, by label; `reviewed` are the outcomes of its evaluation."""

    def measure(name, student, count=3, identity="digest", reviewed=None, weight=None, **settings):
        held_out = HeldOut(PROBLEMS[:count], [], "mine.jsonl", "mine.jsonl", "eval/mine")
        run.replace(f"eval/mine/{name}.jsonl", reviewed or [outcome(p, True) for p in PROBLEMS[:count]])
        config = Config.model_validate({"eval": settings, "review": {"confidence_weight": weight}})
        figures = {"gguf": identity, "fitted": None, "threshold": None, "rows": f"eval/mine/{name}.jsonl"}
        return measure_baselines(config, run, name, student, held_out, figures, grader)

    return measure


def trace(answer, steps="s"):
    """A solution whose steps are the letters of `steps`."""
    parts = [f"<Step{n}>{step}\n</Step{n}>\n" for n, step in enumerate(steps, 1)]
    return f"{''.join(parts)}<Answer>{answer}</Answer>"


@pytest.mark.parametrize(
    ("texts", "right"),
    [
        (["A: 9", "A: 1", "A: 1"], 1),
        (["\\boxed{0.5}", "A: 1", "\\boxed{\\frac{1}{2}}"], 0),  # equal as numbers
        (["A: 1", "A: 9", "A: 2"], 1),  # a tie: the earliest
        (["hm", "well", "A: 1"], 1),  # without an answer there is no vote
        (["hm", "well", "so"], 0),
    ],
)
def test_most_frequent_answer_is_elected(texts, right, measure):
    found = measure("dpo", ScriptedStudent(*texts), count=1)
    assert found["dpo, majority of 3"]["acc_t1"] == right


def test_majority_counts_the_tokens_of_all_samples(measure):
    samples = ("A: 1", "A: 9", "A: 1", "A: 9", "A: 9", "A: 2", "A: 3", "A: 9", "A: 8")
    student = ScriptedStudent(*samples)
    figures = measure("dpo", student)["dpo, majority of 3"]
    assert (figures["acc_t1"], figures["tokens"], figures["n"]) == (2 / 3, 30, 3)  # 1, 9 and (in a tie) 3
    assert {request.temperature for request in student.requests[3:]} == {0.8}
    assert len({request.seed for request in student.requests[3:]}) == 9


def test_step_scores_weigh_the_votes_and_choose_the_best_sample(measure):
    """By hand: worst steps of 0, 0 and -3 nats trust 0.5, 0.5 and 0.95; of 2, 2 and -2: 0.12, 0.12 and 0.88."""
    odds = {"a": 0.0, "b": -3.0, "c": 2.0, "d": -2.0, "e": -9.0}

    class Reviewer(ScriptedStudent):
        def score(self, requests):
            for i, request in enumerate(requests):
                steps = [request.pieces[mark].rstrip()[-1] for mark in request.marks]
                yield Scores(i, tuple(odds[step] for step in steps))

    samples = (trace(9, "ea"), trace(9, "a"), trace(1, "b"), trace(9, "c"), trace(9, "ce"), trace(2, "d"))
    found = measure("dpo", Reviewer(*samples), count=2)
    right = {label.removeprefix("dpo, "): figures["acc_t1"] for label, figures in found.items()}
    assert (right["majority of 3"], right["weighted vote of 3"], right["best of 3"]) == (0, 0.5, 1)


def test_second_attempts_are_first_samples_and_cost_their_tokens(measure):
    reviewed = [
        outcome(PROBLEMS[0], False, accused=2),
        outcome(PROBLEMS[1], True),
        outcome(PROBLEMS[2], False),
    ]
    samples = ("A: 1", "", "", "A: 9", "", "", "A: 3", "", "")
    found = measure("dpo", ScriptedStudent(*samples), reviewed=reviewed)
    always, flagged = found["dpo, second attempt"], found["dpo, flagged resampled"]
    assert (always["acc_t1"], always["tokens"]) == (2 / 3, 17)  # 7 of the first answer, 10 of the sample
    assert (flagged["acc_t1"], flagged["tokens"]) == (2 / 3, 7 + 10 / 3)


@pytest.mark.parametrize("name", ["base", "sft"])
def test_native_prompt_has_no_system_prompt(name, measure):
    student = ScriptedStudent("It is \\boxed{1}", "\\boxed{5}", "I think 3", *["A: 1"] * 6)
    figures = measure(name, student)[f"{name}, native prompt"]
    assert (figures["acc_t1"], figures["tokens"]) == (2 / 3, 10)
    assert [message["role"] for message in student.requests[0].messages] == ["user"]
    assert student.requests[0].temperature == 0


def test_failed_calls_are_unknown_and_results_are_kept(measure):
    figures = measure("base", ScriptedStudent("", finishes=("error",)))
    assert [(each["n"], each["unknown"]) for each in figures.values()] == [(0, 3)]
    again = ScriptedStudent("A: 1", "A: 2", "A: 3")
    assert measure("base", again) == figures
    assert again.requests == []
    assert measure("base", again, identity="other")["base, native prompt"]["acc_t1"] == 1
    measure("base", again, identity="other", context=512)
    assert len(again.requests) == 6  # replies that did not fit may fit now


def test_a_vote_with_a_failed_call_is_unknown(measure):
    student = ScriptedStudent("A: 1", "", "A: 1", finishes=("stop", "error", "stop"))
    found = measure("dpo", student, count=1)
    unknown = {label.removeprefix("dpo, ") for label, figures in found.items() if figures["unknown"]}
    assert unknown == {"majority of 3", "weighted vote of 3", "best of 3"}
