"""The threshold fit with a simulated student, and the evaluation of one model."""

import random

import pytest

from sclite.config import Config
from sclite.evaluate import evaluate
from sclite.evaluate.metrics import NEVER, Scored, fit_threshold
from sclite.records import Problem
from sclite.run import Run
from sclite.student.base import Reply, Scores
from sclite.student.self_correction import SAME_RESULT, Reviewed
from sclite.trace import Step, Trace, render

PROBLEMS = [Problem(id=f"p{n}", question=f"question {n}", answer="1") for n in range(200)]


def number_of(question: str) -> int:
    return int(question.split()[1])


class Known:
    """Simulates student, reviews and grader: three step scores per problem and the result of correcting each.

    A wrong answer has one wrong step, which scores `lead` above the others; only correcting that step is right.
    """

    def __init__(self, monkeypatch, lead: float):
        draw = random.Random(0)
        self.correct = [draw.random() < 0.7 for _ in PROBLEMS]
        self.wrong_step = [None if right else draw.randrange(3) for right in self.correct]
        self.scores = [
            tuple(draw.gauss(0, 1) + lead * (step == wrong) for step in range(3)) for wrong in self.wrong_step
        ]
        self.tried: list[tuple[str, int]] = []
        self.solved = 0
        monkeypatch.setattr(evaluate, "solve", self.solve)
        monkeypatch.setattr(
            evaluate, "score_traces", lambda _, asked, *__: [self.scores[n] for n in map(number_of, asked)]
        )
        monkeypatch.setattr(evaluate, "correct_steps", self.correct_steps)
        monkeypatch.setattr(evaluate, "grade", lambda _, texts, __: [text == "right" for text in texts])

    def solve(self, _, problems, *__):
        self.solved += len(problems)
        correct = [self.correct[number_of(problem.question)] for problem in problems]
        return evaluate.FirstAnswers(problems, [], [Trace()] * len(problems), correct)

    def fixes(self, number: int, step: int) -> bool:
        return self.wrong_step[number] == step - 1

    def correct_steps(self, _, cases, __):
        found = []
        for question, _, step in cases:
            self.tried.append((question, step))
            good = self.fixes(number_of(question), step)
            found.append(Reviewed("right" if good else "wrong", accused=step))
        return found

    def fit(self, **review):
        return evaluate.fit_review(None, PROBLEMS, Config.model_validate({"review": review}), None)

    def by_trying_everything(self, max_harm: float):
        rows = [
            Scored(
                id=problem.id,
                correct1=self.correct[i],
                step_scores=self.scores[i],
                corrected=tuple(self.fixes(i, step) for step in (1, 2, 3)),
            )
            for i, problem in enumerate(PROBLEMS)
        ]
        return fit_threshold(rows, max_harm)


@pytest.mark.parametrize("lead", [1.5, 3.0, 5.0])
@pytest.mark.parametrize("max_harm", [0.005, 0.03])
def test_threshold_equals_that_of_trying_every_step(monkeypatch, lead, max_harm):
    known = Known(monkeypatch, lead)
    found, expected = known.fit(max_harm=max_harm), known.by_trying_everything(max_harm)
    assert found == {**expected, "assumed": found["assumed"]}
    assert found["assumed"] == 0
    assert len(known.tried) < 0.75 * 3 * len(PROBLEMS)
    assert len(set(known.tried)) == len(known.tried)


def test_fit_stops_after_one_block_if_corrections_spoil_answers(monkeypatch):
    known = Known(monkeypatch, lead=-1.0)
    found = known.fit(max_harm=0.005)
    assert found["accused"] == found["right_to_wrong"] == 0
    assert known.solved == len(PROBLEMS) // 2
    assert len({question for question, _ in known.tried}) == round(evaluate.FIT_BLOCK * known.solved)


def test_fit_stops_after_two_blocks_if_nothing_is_fixed(monkeypatch):
    known = Known(monkeypatch, lead=-1.0)
    monkeypatch.setattr(known, "fixes", lambda number, _: known.correct[number])
    assert known.fit(max_harm=0.005)["accused"] == 0
    assert known.solved == len(PROBLEMS) // 2
    assert len({question for question, _ in known.tried}) == 2 * round(evaluate.FIT_BLOCK * known.solved)


def test_fit_stops_at_its_share_if_harm_is_allowed(monkeypatch):
    known = Known(monkeypatch, lead=1.0)
    known.fit(max_harm=1.0)
    assert known.solved == len(PROBLEMS)
    tried = len({question for question, _ in known.tried}) / len(PROBLEMS)
    assert (
        evaluate.FIT_SHARE <= tried < evaluate.FIT_SHARE + evaluate.FIT_BLOCK
    )  # those of the first half alone too


class Plain:
    """A student that writes no steps; `asked` counts the requests of each call."""

    def __init__(self):
        self.asked = []

    def generate(self, requests):
        self.asked.append(len(requests))
        return [Reply(i, "the answer is 1", 4, 9, "stop") for i in range(len(requests))]

    def score(self, requests):
        raise AssertionError("nothing to review")


def test_answers_without_steps_need_no_fit(tmp_path, monkeypatch):
    student = Plain()
    monkeypatch.setattr(evaluate, "grade", lambda _, texts, __: [True] * len(texts))
    figures = evaluate.evaluate_model(
        Config(),
        Run(tmp_path),
        "base",
        student,
        problems=PROBLEMS[:20],
        fitting=PROBLEMS[20:],
        grader=None,
        folder="eval/a",
    )
    assert student.asked == [20]
    assert figures["threshold"] == NEVER
    assert figures["off"] == "its answers have no steps"
    assert figures["fitted"] is None
    assert figures["acc_t2"] == 1.0


def test_truncated_first_answers_are_counted(tmp_path, monkeypatch):
    class Rambling:
        def generate(self, requests):
            ends = ("length", "stop", "stop", "stop")
            return [Reply(i, "the answer is", 4, 9, ends[i % 4]) for i in range(len(requests))]

    monkeypatch.setattr(evaluate, "grade", lambda _, texts, __: [False] * len(texts))
    figures = evaluate.evaluate_model(
        Config(),
        Run(tmp_path),
        "sft",
        Rambling(),
        problems=PROBLEMS[:20],
        fitting=[],
        grader=None,
        folder="eval/a",
    )
    assert (figures["n"], figures["cut"]) == (20, 5)


def test_unchanged_figures_are_reused_and_folders_are_separate(tmp_path, monkeypatch):
    student = Plain()
    monkeypatch.setattr(evaluate, "grade", lambda _, texts, __: [True] * len(texts))
    run, given = Run(tmp_path), {"problems": PROBLEMS[:20], "fitting": [], "grader": None}
    figures = evaluate.evaluate_model(Config(), run, "base", student, **given, folder="eval/a")
    before = run.path("eval/a/base.jsonl").read_bytes()
    assert evaluate.evaluate_model(Config(), run, "base", student, **given, folder="eval/a") == figures
    assert student.asked == [20]
    fewer = {**given, "problems": PROBLEMS[:10], "folder": "eval/a-limit-10"}
    assert evaluate.evaluate_model(Config(), run, "base", student, **fewer)["n"] == 10
    assert run.path("eval/a/base.jsonl").read_bytes() == before


def test_disabled_review_has_a_reason(tmp_path, monkeypatch):
    step = "<Step1>1 + 1 = 3\n</Step1>\n<Answer>3</Answer>"

    class Stepping:
        def generate(self, requests):
            return [Reply(i, "no" if r.pieces else step, 4, 9, "stop") for i, r in enumerate(requests)]

        def score(self, requests):
            return [Scores(i, (1.0,), 9) for i, _ in enumerate(requests)]

    monkeypatch.setattr(evaluate, "grade", lambda _, texts, __: [False] * len(texts))
    given = {"problems": PROBLEMS[:20], "fitting": PROBLEMS[20:40], "grader": None, "folder": "eval/a"}
    figures = evaluate.evaluate_model(Config(), Run(tmp_path), "sft", Stepping(), **given)
    assert figures["threshold"] == NEVER
    assert figures["off"] == (
        "on 20 fitting problems no threshold corrects more answers than it spoils; at most 0.5 % may be spoiled "
        "(review.max_harm)"
    )


def reviewed(first: str, correct2: bool, accused: int, true_step: int | None) -> dict:
    shown = {"question": "What is 2 + 2?", "first": first, "correction": "2 + 2 = 4", "correct1": False}
    return shown | {"correct2": correct2, "accused": accused, "true_step": true_step}


def test_example_prefers_an_answer_and_a_located_step(capsys):
    from sclite.evaluate.table import print_example

    step = "<Step1>2 + 2 = 5</Step1>"
    whole = f"{step}\n<Answer>5</Answer>"
    broken, astray, spoilt, best = (
        reviewed(step, True, 1, 1),
        reviewed(whole, True, 1, None),
        reviewed(whole, False, 1, 1),
        reviewed(whole, True, 1, 1),
    )
    assert evaluate.choose_example([broken, astray, spoilt, best]) is best
    assert evaluate.choose_example([broken, astray, spoilt]) is astray
    assert evaluate.choose_example([broken, spoilt]) is broken
    assert evaluate.choose_example([spoilt]) is None
    print_example(
        broken
        | {"cause": "2 + 2 is 4", "second": "<Step1>2 + 2 = 4</Step1>\n<Answer>4</Answer>", "gold": "4"}
    )
    assert "answer – → 4 (right: 4)" in capsys.readouterr().out
    print_example(
        broken | {"cause": None, "second": "<Step1>2 + 2 = 4</Step1>\n<Answer>4</Answer>", "gold": "4"}
    )
    shown = capsys.readouterr().out
    assert "why wrong" not in shown
    assert "corrected  2 + 2 = 4" in shown


def test_table_of_ungraded_answers_has_dashes(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    from sclite.evaluate.metrics import Outcome, summarize
    from sclite.evaluate.table import print_results

    row = {"question": "?", "gold": "1", "first": "x", "second": None, "correct1": None, "correct2": None}
    figures = summarize([Outcome(id=str(i), format_ok=True, **row) for i in range(3)], bootstrap=10)
    print_results(
        {"models": {"sft": figures | {"correction_rate_given_location": None}}, "n": 3, "notes": []}
    )
    shown = capsys.readouterr().out
    assert shown.split("sft")[1].split("\n")[0].split() == ["–"] * 8
    assert "3 answers could not be graded" in shown


def test_blocks_without_a_wrong_answer_do_not_stop_the_fit(monkeypatch):
    """The highest scores are of right answers that stay right: nothing to fix there, and nothing spoiled."""
    student = Known(monkeypatch, lead=8.0)
    surest = [i for i, right in enumerate(student.correct) if right][::3]
    for i in surest:
        student.scores[i] = (20.0 + i / 1000, 0.0, 0.0)
    fixes = student.fixes
    student.fixes = lambda number, step: number in surest or fixes(number, step)
    found, wanted = student.fit(max_harm=0.01), student.by_trying_everything(0.01)
    assert len(surest) > 2 * evaluate.FIT_BLOCK * len(PROBLEMS)
    assert found["wrong_to_right"] == wanted["wrong_to_right"] > 0.1


def test_steps_corrected_in_the_first_answer_count_as_corrected():
    class Student:
        def generate(self, requests):
            own = Trace((Step("1 + 1 = 3", None, "Too many.", "1 + 1 = 2"),), None, "2")
            for index, _ in enumerate(requests):
                yield Reply(index, render(own), 9, 9, "stop")

    class Sure:
        def equal_many(self, pairs):
            return [given == gold for given, gold in pairs]

    first = evaluate.solve(Student(), [Problem(id="p", question="1 + 1?", answer="2")], Config(), Sure())
    assert [step.text for step in first.traces[0].steps] == ["1 + 1 = 2"]
    assert first.correct == [True]


def test_correction_that_changes_nothing_neither_spoils_nor_fixes(monkeypatch):
    student = Known(monkeypatch, lead=8.0)
    same = [
        Reviewed("wrong", accused=1, note=SAME_RESULT),
        Reviewed("right", note="no answer after the correction"),
    ]
    monkeypatch.setattr(
        evaluate, "correct_steps", lambda _, cases, __: [same[i % 2] for i in range(len(cases))]
    )
    found = student.fit(max_harm=0.01)
    assert (found["threshold"], found["wrong_to_right"], found["right_to_wrong"]) == (NEVER, 0.0, 0.0)
