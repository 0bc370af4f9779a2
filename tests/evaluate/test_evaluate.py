"""The evaluation of one model, its table, and the example that is shown."""

import dataclasses
from pathlib import Path

import pytest

from sclite.config import Config
from sclite.evaluate import answers, evaluate, threshold
from sclite.evaluate.metrics import Outcome, compute_metrics
from sclite.evaluate.table import choose_example, print_example, print_results
from sclite.grading.worker import Grader
from sclite.records import Problem
from sclite.student.base import Reply, Scores
from sclite.student.counted import Counted
from sclite.trace import Step, Trace, render

PROBLEMS = [Problem(id=f"p{n}", question=f"question {n}", answer="1") for n in range(200)]


class Plain:
    """A student that writes no steps; `asked` counts the requests of each call."""

    def __init__(self):
        self.asked = []

    def generate(self, requests):
        self.asked.append(len(requests))
        return [Reply(i, "the answer is 1", 4, 9, "stop") for i in range(len(requests))]

    def score(self, requests):
        raise AssertionError("nothing to review")


@pytest.fixture
def evaluate_student(run, monkeypatch):
    """Evaluate a student on PROBLEMS[:20], all graded as `right`; keywords replace what is given."""
    gguf = run.path("export/dpo-q8_0.gguf")
    gguf.parent.mkdir(parents=True)
    gguf.write_bytes(b"GGUF")

    def work(student, right: bool, **given):
        for module in (evaluate, threshold):
            monkeypatch.setattr(module, "grade", lambda _, answers, __: [right for _ in answers])
        monkeypatch.setattr(answers, "grade", lambda _, answers, __: [right for _ in answers])
        given = {
            "problems": PROBLEMS[:20],
            "fitting": [],
            "source": "",
            "dataset": "",
            "folder": "eval/a",
        } | given
        held_out = evaluate.HeldOut(**given)
        return evaluate.evaluate_model(Config(), run, "dpo", student, gguf, held_out, None)

    return work


class Stepping:
    """Writes one step, scored 1.0 as wrong; corrections of it cannot be read."""

    def generate(self, requests):
        text = "<Step1>1 + 1 = 3\n</Step1>\n<Answer>3</Answer>"
        return [Reply(i, "no" if r.pieces else text, 4, 9, "stop") for i, r in enumerate(requests)]

    def score(self, requests):
        return [Scores(i, (1.0,), 9) for i, _ in enumerate(requests)]


def test_answers_without_steps_need_no_fit(evaluate_student):
    student = Plain()
    figures = evaluate_student(student, True, fitting=PROBLEMS[20:])
    assert student.asked == [20]
    assert (figures["threshold"], figures["fitted"]) == (None, None)
    assert figures["off"] == "its answers have no steps"
    assert figures["acc_t2"] == 1.0
    evaluate_student(student, True, fitting=PROBLEMS[20:])
    assert student.asked == [20]  # nothing has changed


def test_failed_calls_of_a_model_behind_an_api_are_made_again(run):
    class Failing(Stepping):
        finish = "error"

        def generate(self, requests):
            for reply in super().generate(requests):
                yield dataclasses.replace(reply, finish=self.finish)

    held_out = evaluate.HeldOut(PROBLEMS[:3], [], "", "", "eval/a")
    config = Config.model_validate({"review": {"mode": "free"}})
    student = Failing()
    with Grader() as grader:

        def unknown():
            given = config, run, "ollama/x", student, Path(), held_out, grader
            return evaluate.evaluate_model(*given, version="7")["unknown"]

        assert unknown() == 3
        student.finish = "stop"
        assert unknown() == 0
        student.finish = "error"
        assert unknown() == 0  # nothing has changed


def test_progress_counts_solved_problems(evaluate_student):
    seen = []
    evaluate_student(Counted(Plain(), 20, 20, lambda *report: seen.append(report)), True)
    assert seen == [(n, n / 40, f"{n} texts written") for n in range(1, 21)]


def test_truncated_first_answers_are_counted(evaluate_student):
    class Rambling:
        def generate(self, requests):
            ends = ("length", "stop", "stop", "stop")
            return [Reply(i, "the answer is", 4, 9, ends[i % 4]) for i in range(len(requests))]

    figures = evaluate_student(Rambling(), False)
    assert (figures["n"], figures["cut"]) == (20, 5)


def test_unchanged_figures_are_reused_and_folders_are_separate(evaluate_student, run):
    student = Plain()
    figures = evaluate_student(student, True)
    before = run.path("eval/a/dpo.jsonl").read_bytes()
    assert evaluate_student(student, True) == figures
    assert student.asked == [20]
    assert evaluate_student(student, True, problems=PROBLEMS[:10], folder="eval/a-limit-10")["n"] == 10
    assert run.path("eval/a/dpo.jsonl").read_bytes() == before


def test_disabled_review_has_a_reason(evaluate_student):
    figures = evaluate_student(Stepping(), False, fitting=PROBLEMS[20:80])
    assert (figures["threshold"], figures["acc_t2"]) == (None, 0.0)
    assert figures["off"] == "on 60 fitting problems no threshold corrects more answers than it spoils"


def test_a_threshold_fitted_on_more_problems_replaces_older_figures(evaluate_student, run):
    few = evaluate_student(Stepping(), False, fitting=PROBLEMS[20:60])
    assert few["off"] == "40 problems are too few to fit its threshold, 50 are needed"
    fitted = threshold.Fitted(threshold=0.5, problems=400, max_harm=0.005)
    threshold.store_threshold(Config(), run, run.path("export/dpo-q8_0.gguf"), fitted)
    figures = evaluate_student(Stepping(), False, fitting=PROBLEMS[20:60])
    assert (figures["threshold"], figures["fitted"]["problems"], figures["off"]) == (0.5, 400, "")


def test_example_prefers_an_answer_and_a_located_step(capsys):
    step = "<Step1>2 + 2 = 5</Step1>"
    whole = f"{step}\n<Answer>5</Answer>"
    given = {"id": "p", "question": "2 + 2?", "gold": "4", "correct1": False, "accused": 1, "format_ok": True}
    given |= {"second": "<Step1>2 + 2 = 4</Step1>\n<Answer>4</Answer>", "correction": "2 + 2 = 4"}
    broken, astray, spoilt, best = (
        Outcome(first=first, correct2=correct, true_step=true_step, **given)
        for first, correct, true_step in (
            (step, True, 1),
            (whole, True, None),
            (whole, False, 1),
            (whole, True, 1),
        )
    )
    assert choose_example([broken, astray, spoilt, best]) is best
    assert choose_example([broken, astray, spoilt]) is astray
    assert choose_example([broken, spoilt]) is broken
    assert choose_example([spoilt]) is None
    print_example(broken)
    shown = capsys.readouterr().out
    assert "answer – → 4 (right: 4)" in shown
    assert "why wrong" not in shown
    assert "corrected  2 + 2 = 4" in shown


def test_table_of_ungraded_answers_has_dashes(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")

    row = {"question": "?", "gold": "1", "first": "x", "second": None, "correct1": None, "correct2": None}
    figures = compute_metrics([Outcome(id=str(i), format_ok=True, **row) for i in range(3)], bootstrap=10)
    print_results(
        {"models": {"sft": figures | {"correction_rate_given_location": None}}, "n": 3, "notes": []}
    )
    shown = capsys.readouterr().out
    assert shown.split("sft")[1].split("\n")[0].split() == ["–"] * 8
    assert "3 answers could not be graded" in shown


def test_cost_of_the_review_is_shown_beside_that_of_the_answer(capsys):
    row = {"question": "?", "gold": "1", "first": "x", "second": None, "correct1": True, "correct2": True}
    fed = {"tokens1": 30, "tokens2": 4, "fed1": 9, "fed2": 50}
    outcomes = [Outcome(id=str(i), format_ok=True, **row, **fed) for i in range(2)]
    assert "fed1" not in outcomes[0].model_dump()
    figures = compute_metrics(outcomes, bootstrap=10)
    cost = {"tokens_first": 30, "fed_first": 9, "seconds_first": 0.5, "seconds": 0.75}
    figures |= {"correction_rate_given_location": None, **cost}
    print_results({"models": {"dpo": figures}, "n": 2, "notes": []})
    said = (
        "dpo, per problem: answer 30 tokens written, 9 fed, 0.50 s; review 4 tokens written, 50 fed, 0.25 s"
    )
    assert said in " ".join(capsys.readouterr().out.split())


def test_steps_corrected_in_the_first_answer_count_as_corrected():
    class Student:
        def generate(self, requests):
            own = Trace((Step("1 + 1 = 3", None, "Too many.", "1 + 1 = 2"),), None, "2")
            for index, _ in enumerate(requests):
                yield Reply(index, render(own), 9, 9, "stop")

    class Sure:
        def equal_many(self, pairs):
            return [given == gold for given, gold in pairs]

    first = answers.solve_problems(
        Student(), [Problem(id="p", question="1 + 1?", answer="2")], Config(), Sure()
    )
    assert [step.text for step in first.parsed[0].work.steps] == ["1 + 1 = 2"]
    assert first.correct == [True]
