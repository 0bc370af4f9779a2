"""The evaluation of one model, its table, and the example shown."""

from dataclasses import replace
from pathlib import Path

import pytest

from sclite.config import Config
from sclite.evaluate.answers import first_pass, harm_warning, measure_first_pass, solve_problems
from sclite.evaluate.evaluate import HeldOut, evaluate_model
from sclite.evaluate.metrics import Outcome, compute_metrics
from sclite.evaluate.threshold import FittedThreshold, store_threshold
from sclite.inspect import summaries
from sclite.inspect.summaries import print_results
from sclite.quickstart import flow
from sclite.records import Problem
from sclite.run import Run
from sclite.student.recorder import WorkCounter
from sclite.trace import Step, Trace, render
from tests.toy import SameVerdict, ScriptedStudent

PROBLEMS = [Problem(id=f"p{n}", question=f"question {n}", answer="1") for n in range(200)]
PLAIN, STEP = "the answer is 1", "<Step1>1 + 1 = 3\n</Step1>\n<Answer>3</Answer>"
ALWAYS = {"threshold": 0.0}  # corrects every step with log-odds above 0
ENDPOINT = {"name": "ollama/x", "path": Path(), "version": "7", "review": {"mode": "free"}}
NONE = "no threshold corrects more answers than it spoils"
WHOLE = {"question": "?", "gold": "1", "first": "x", "second": None, "format_ok": True}


@pytest.fixture
def evaluate_student(run, gguf):
    """Evaluate a student on PROBLEMS[:20], all graded as `right`; keyword arguments override the defaults."""

    def work(student, right: bool, judge=None, name="dpo", path=gguf, version="", review=None, **given):
        default = {"problems": PROBLEMS[:20], "fitting": [], "source": "", "dataset": "", "folder": "eval/a"}
        config, held_out = Config.model_validate({"review": review or {}}), HeldOut(**default | given)
        return evaluate_model(config, run, name, student, path, held_out, SameVerdict(right), judge, version)

    return work


@pytest.mark.parametrize(
    ("text", "fitting", "asked", "off"),
    [
        (PLAIN, 180, 20, "its answers have no steps"),  # and need no fit
        (STEP, 60, None, f"on the 60 problems used for the fit, {NONE}"),
        (STEP, 40, 20, "40 problems are too few to fit the threshold (50 needed)"),
    ],
)
def test_disabled_review_has_a_reason(evaluate_student, text, fitting, asked, off):
    student = ScriptedStudent(text, odds=1.0)
    figures = evaluate_student(student, False, fitting=PROBLEMS[20 : 20 + fitting])
    assert (figures["threshold"], figures["off"], figures["acc_t2"]) == (None, off, 0.0)
    assert asked in (None, len(student.requests))
    count = len(student.requests)
    assert evaluate_student(student, False, fitting=PROBLEMS[20 : 20 + fitting]) == figures
    assert len(student.requests) == count  # nothing has changed


@pytest.mark.parametrize(("judged", "labels"), [(1, (True,)), (0, (False,)), (None, ())])
def test_steps_are_labelled_as_they_are_judged(run, evaluate_student, judged, labels):
    evaluate_student(ScriptedStudent(STEP, odds=1.0), False, lambda *_: judged, problems=PROBLEMS[:2])
    for row in run.read("eval/a/dpo.jsonl", Outcome):
        found = row.true_known, row.true_step, row.step_labels
        assert found == (judged is not None, judged or None, labels)


@pytest.mark.parametrize(("judged", "figure", "value"), [(0, "acceptance", 0.0), (1, "location", 1.0)])
def test_a_flagged_step_counts_though_its_correction_cannot_be_read(evaluate_student, judged, figure, value):
    given = {"review": ALWAYS, "problems": PROBLEMS[:2]}
    student = ScriptedStudent(STEP, odds=1.0)
    assert evaluate_student(student, not judged, lambda *_: judged, **given)[figure] == value


def test_free_and_guided_reviews_have_files_of_their_own(run, gguf):
    student, held_out = ScriptedStudent(STEP, odds=1.0), HeldOut(PROBLEMS[:2], [], "", "", "eval/a")
    modes = [Config.model_validate(tree) for tree in ({"review": ALWAYS}, {"review": {"mode": "free"}})]
    first, free = (evaluate_model(m, run, "dpo", student, gguf, held_out, SameVerdict(False)) for m in modes)
    assert (first["rows"], free["rows"]) == ("eval/a/dpo.jsonl", "eval/a/dpo-free.jsonl")
    asked = len(student.requests)
    assert evaluate_model(modes[0], run, "dpo", student, gguf, held_out, SameVerdict(False)) == first
    assert len(student.requests) == asked


@pytest.mark.parametrize(
    ("before", "after", "n", "warned"), [(60, 48, 100, True), (60, 52, 100, False), (5, 4, 5, False)]
)
def test_a_warm_up_that_harms_solving_is_reported(run, before, after, n, warned):
    """The 95 % interval of 60 of 100 is about 0.50 to 0.70, that of 5 of 5 begins at 0.48."""

    class Grader:
        def equal_many(self, pairs):
            return [n < self.right for n, _ in enumerate(pairs)]

    grader, student = Grader(), ScriptedStudent(PLAIN)
    for stage, grader.right in (("sft", before), ("warmup", after)):
        for _ in range(2):  # measured once
            measure_first_pass(Config(), run, stage, student, PROBLEMS[:n], grader)
        assert first_pass(run, stage)["acc_t1"] == grader.right / n
    assert len(student.requests) == 2 * n
    assert {request.max_tokens for request in student.requests} == {Config().attempts.max_tokens}
    warning = harm_warning("the warm-up", first_pass(run, "sft"), first_pass(run, "warmup"))
    assert warning.startswith("the warm-up made first answers worse, 60.0 → 48.0 % right; ") == warned


def test_an_answer_that_was_cut_off_is_not_reviewed_as_in_chat(run, evaluate_student):
    student = ScriptedStudent(STEP, odds=1.0, finishes=("length", "stop"))
    evaluate_student(student, False, lambda *_: 1, review=ALWAYS, problems=PROBLEMS[:4])
    rows = run.read("eval/a/dpo.jsonl", Outcome)
    found = [(row.cut, row.accused, len(row.step_scores)) for row in rows]
    assert found == [(True, None, 0), (False, 1, 1)] * 2


def test_a_review_without_a_reply_is_unknown_and_no_endpoint_continues(evaluate_student):
    class Failing(ScriptedStudent):
        def generate(self, requests):
            assert not any(request.pieces for request in requests)
            reviews = "Work to check" in requests[0].messages[-1]["content"]
            self.finishes = ("error", "stop") if reviews else ("stop",)
            yield from super().generate(requests)

    figures = evaluate_student(Failing(STEP), False, lambda *_: 1, problems=PROBLEMS[:4], **ENDPOINT)
    assert (figures["n"], figures["unknown"], figures["correction_rate_given_location"]) == (2, 2, None)


def test_failed_calls_of_a_model_behind_an_api_are_made_again(evaluate_student):
    student = ScriptedStudent(STEP)
    for finish, unknown in (("error", 3), ("stop", 0), ("error", 0)):  # at last nothing has changed
        student.finishes = (finish,)
        assert evaluate_student(student, False, problems=PROBLEMS[:3], **ENDPOINT)["unknown"] == unknown


def test_first_and_all_tokens_are_averaged_over_the_same_answers(evaluate_student):
    class Failing(ScriptedStudent):
        def generate(self, requests):
            for reply in super().generate(requests):
                failed = reply.finish == "error"
                yield replace(reply, tokens=0) if failed else replace(reply, prefill_tokens=7)

    figures = evaluate_student(Failing(PLAIN, finishes=("error", "stop")), True)
    assert (figures["unknown"], figures["tokens"], figures["tokens_first"]) == (10, 10.0, 10.0)  # no review
    assert (figures["prefill"], figures["prefill_first"]) == (7.0, 7.0)


def test_solved_problems_are_shown_and_truncated_answers_counted(evaluate_student):
    seen = []
    evaluate_student(WorkCounter(ScriptedStudent(PLAIN), 20, 20, lambda *report: seen.append(report)), True)
    assert seen == [(n, n / 60, f"{n} texts written") for n in range(1, 21)]
    rambling = ScriptedStudent("the answer is", finishes=("length", "stop", "stop", "stop"))
    figures = evaluate_student(rambling, False, folder="eval/b")
    assert (figures["n"], figures["cut"]) == (20, 5)


def test_a_threshold_fitted_on_more_problems_replaces_older_figures(evaluate_student, run, gguf):
    evaluate_student(ScriptedStudent(STEP), False, fitting=PROBLEMS[20:60])
    store_threshold(Config(), run, gguf, FittedThreshold(threshold=0.5, problems=400, max_harm=0.005))
    figures = evaluate_student(ScriptedStudent(STEP), False, fitting=PROBLEMS[20:60])
    assert (figures["threshold"], figures["fitted"]["problems"], figures["off"]) == (0.5, 400, "")


def test_the_quickstart_shows_an_example_preferably_with_a_located_step(run, sclite, monkeypatch):
    given = {"id": "p", "gold": "4", "correct1": False, "accused": 1, "format_ok": True, "cause": "It is 4."}
    given |= {"second": "<Step1>2 + 2 = 4</Step1>\n<Answer>4</Answer>", "correction": "2 + 2 = 4"}
    given |= {"first": "<Step1>2 + 2 = 5</Step1>\n<Answer>5</Answer>", "step_scores": (3.0,)}
    rows = {
        "astray": {"correct2": True, "true_step": None},
        "spoilt": {"correct2": False, "true_step": 1},
        "best": {"correct2": True, "true_step": 1},
    }
    made = {name: Outcome(question=f"{name}?", **row, **given) for name, row in rows.items()}

    monkeypatch.setattr(flow, "quickstart", lambda *_, **__: {"models": {"dpo": {"rows": "dpo.jsonl"}}})
    monkeypatch.setattr(summaries, "print_results", lambda *_: None)

    def shown(*names):
        run.replace("dpo.jsonl", [made[name] for name in names])
        return sclite("quickstart", "--run", run.folder).out

    best = shown("astray", "spoilt", "best")
    for line in ("(right: 4)", "  best?", "  ✗  1  95% 2 + 2 = 5", "why It is 4.", "  →  1      2 + 2 = 4"):
        assert line in best
    assert "answer 4  (was 5)" in best
    assert "astray?" in shown("astray", "spoilt")
    assert shown("spoilt").startswith("No answer was corrected in this evaluation.\n")


def table_of(capsys, outcomes, **figures):
    """What is printed for one student."""
    figures = compute_metrics(outcomes, bootstrap=10) | {"correction_rate_given_location": None, **figures}
    summary = {"models": {"dpo": figures}, "n": len(outcomes), "notes": [], "folder": "eval/p"}
    print_results(Run("run"), summary)
    *shown, report = capsys.readouterr().out.splitlines(keepends=True)
    assert report == "Report: run/eval/p/report.html\n"
    return "".join(shown)


def test_table_has_dashes_for_ungraded_answers_and_the_cost_of_the_review(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    rows = [Outcome(id=str(i), correct1=None, correct2=None, **WHOLE) for i in range(3)]
    shown = table_of(capsys, rows)
    assert shown.split("dpo")[1].split("\n")[0].split() == ["–"] * 8
    assert "3 answers could not be graded" in shown
    tokens = {"tokens1": 30, "tokens2": 4, "prefill1": 9, "prefill2": 50}
    rows = [Outcome(id=str(i), correct1=True, correct2=True, **WHOLE, **tokens) for i in range(2)]
    assert "prefill1" not in rows[0].model_dump()
    rows.append(Outcome(id="failed", correct1=None, correct2=None, **WHOLE))
    shown = table_of(capsys, rows, seconds_first=0.5, seconds=0.75)
    said = "answer 30 tokens generated, 9 prompt tokens, 0.50 s; review 4 tokens generated, 50 prompt tokens, 0.25 s"
    assert f"dpo, per problem: {said}" in " ".join(shown.split())


def test_steps_corrected_in_the_first_answer_count_as_corrected():
    own = Trace((Step("1 + 1 = 3", None, "Too many.", "1 + 1 = 2"),), None, "2")
    (answer,) = solve_problems(ScriptedStudent(render(own)), PROBLEMS[:1], Config(), SameVerdict(True))
    assert [step.text for step in answer.parsed.work.steps] == ["1 + 1 = 2"]
    assert answer.correct is True
