"""Chat feedback becomes attempts, each graded once against the run's, the user's or the teacher's answer."""

import json
import re

import pytest

from sclite import pipeline
from sclite.config import Config
from sclite.context import Context
from sclite.data.feedback import write_feedback
from sclite.data.problems import gather_problems
from sclite.progress import ProgressDisplay
from sclite.records import FEEDBACK, Attempt, Drop, Feedback, Problem, Review
from sclite.run import Report, Run
from sclite.teacher.client import Result
from sclite.trace import Step, Trace, parse, render
from tests.replay import TeacherServer, client, say

QUESTION = "What is 48 + 24, halved?"


def solved(answer: str) -> str:
    return render(Trace((Step("48 + 24 = 72"), Step(f"72 / 2 = {answer}")), None, answer))


def judge(run, good, final, attempt=None, question=QUESTION):
    row = {"question": question, "attempt": solved(attempt or final), "final": solved(final)}
    run.append(FEEDBACK, [Feedback(**row, accused=None, good=good, model="m")])


def build(run, grader, *answers, fit=(), **sections):
    """(report, number of requests) of the stage with a teacher that replies with these texts in turn."""
    with TeacherServer(lambda request, nth: say(answers[nth - 1])) as server:
        teacher = {"model": "openai/replay", "api_base": server.url, "concurrency": 1}
        config = Config.model_validate({"teacher": teacher, **sections})
        with client(run, config.teacher) as made:
            report = write_feedback(config, run, teacher=made, grader=grader, fit=fit)
    return report, len(server.requests)


def attempts(run) -> list[tuple[str | None, bool | None]]:
    return [(row.answer, row.correct) for row in run.read("attempts.jsonl", Attempt)]


def test_bad_answer_is_wrong_if_the_teacher_finds_another_one_twice(run, grader):
    judge(run, False, "38")
    report, asked = build(run, grader, solved("36"), solved("36"))
    assert (report.counts, report.dropped, asked) == ({"good": 0, "bad": 1}, {}, 2)
    (problem,) = run.read("problems.jsonl", Problem)
    assert (problem.question, problem.answer, problem.solution) == (QUESTION, "36", solved("36"))
    (attempt,) = run.read("attempts.jsonl", Attempt)
    assert (attempt.id, attempt.trace, attempt.correct) == (problem.id, solved("38"), False)


def test_solution_is_that_of_the_first_sample_whichever_reply_comes_first(run, grader):
    judge(run, False, "38")
    other = solved("36").replace("72 / 2", "72 : 2")
    texts = {0: solved("36"), 1: other}

    class Late:
        """A teacher whose second sample is answered first."""

        def __init__(self, teacher):
            self.teacher, self.ledger = teacher, teacher.ledger

        def ask_after_pilot(self, jobs, total, stage):
            for job in reversed(jobs):
                yield Result(job.id, job.sample, "", parse(texts[job.sample]), None, "", 1)

    config = Config.model_validate({"teacher": {"model": "openai/replay"}})
    with client(run, config.teacher) as made:
        write_feedback(config, run, teacher=Late(made), grader=grader, fit=())
    (problem,) = run.read("problems.jsonl", Problem)
    assert problem.solution == solved("36")


@pytest.mark.parametrize(
    ("replies", "reason"),
    [
        ((solved("36"), solved("37")), "no_gold_answer"),
        (("I think it is 36.", "So 36."), "no_gold_answer"),  # unreadable, and not paid for again
        ((solved("38"), solved("38")), "verdict_contradicts_the_answer"),
    ],
)
def test_bad_answer_is_dropped_if_the_teacher_is_unsure_unreadable_or_agrees(run, grader, replies, reason):
    judge(run, False, "38")
    report, asked = build(run, grader, *replies)
    assert (report.dropped, asked) == ({reason: 1}, 2)
    assert attempts(run) == []
    (drop,) = run.read("dropped.jsonl", Drop)
    assert (drop.stage, drop.reason, drop.raw) == ("feedback", reason, solved("38"))


def test_good_answer_is_right_and_its_first_attempt_is_graded_by_it(run, grader):
    judge(run, True, "36", attempt="38")
    judge(run, False, "35")
    report, asked = build(run, grader)
    assert (report.counts, asked) == ({"good": 1, "bad": 1}, 0)
    assert attempts(run) == [("38", False), ("36", True), ("35", False)]
    judge(run, True, "35")  # the last verdict on an answer counts
    assert build(run, grader)[0].dropped == {"verdict_contradicts_the_answer": 1}


def test_problem_of_the_run_gives_its_answer_and_stays_as_it_is(run, grader, write, tmp_path):
    rows = {"question": QUESTION, "answer": "36"}, {"question": "What is 2 + 2?", "answer": "4"}
    chosen = {"problems": {"source": write("sums.jsonl", *rows)}}
    config = Config.model_validate(chosen)
    before = gather_problems(config, run)
    for good, final in ((False, "38"), (True, "36"), (True, "35")):
        judge(run, good, final, question=f"  {QUESTION} ")
    report, asked = build(run, grader, **chosen)
    assert (asked, report.dropped) == (0, {"verdict_contradicts_the_answer": 1})
    assert attempts(run) == [("38", False), ("36", True)]
    assert gather_problems(config, run, reread=False) == before
    judged = run.read("problems.jsonl", Problem)[0]
    assert judged.id.startswith("feedback-")
    gather_problems(config, run)
    assert run.read("problems.jsonl", Problem) == [judged, *before]
    assert build(run, grader, **chosen)[0].skipped
    other = Run(tmp_path / "imported")  # a problem of the chat is none of those imported
    other.replace("problems.jsonl", [Problem(id="p1", question="What is 2 + 2?", answer="4")])
    judge(other, True, "36")
    build(other, grader)
    assert [row.id for row in gather_problems(Config(), other)] == ["p1"]
    assert len(other.read("problems.jsonl", Problem)) == 2


def test_question_of_the_evaluation_or_of_the_threshold_is_dropped(run, grader, write):
    judge(run, True, "36")
    judge(run, True, "36", question="What is the threshold's sum?")
    fit = [Problem(id="p7", question="What is the threshold's sum?", answer="36")]
    source = write("test.jsonl", {"question": QUESTION, "answer": "36"})
    report, _ = build(run, grader, fit=fit, eval={"source": source})
    assert report.dropped == {"overlaps_evaluation": 2}
    details = [row.detail for row in run.read("dropped.jsonl", Drop)]
    assert ["test.jsonl" in details[0], "p7, a problem of the threshold" in details[1]] == [True, True]


def test_attempts_of_the_student_stay_and_withdrawn_feedback_is_removed(run, grader):
    mine = Attempt(id="p1", sample=0, trace=solved("36"), answer="36", correct=True)
    run.replace("attempts.jsonl", [mine])
    run.sign("attempts", {"x": 1}, Report("attempts"), {"attempts.jsonl": 1})
    judge(run, True, "36")
    build(run, grader)
    assert len(attempts(run)) == 2
    assert run.done("attempts", {"x": 1}, "attempts.jsonl")["outputs"]["attempts.jsonl"]["rows"] == 2
    run.path(FEEDBACK).write_text("")
    build(run, grader)
    assert run.read("attempts.jsonl", Attempt) == [mine]
    assert json.loads(run.path("done/attempts.json").read_text())["inputs"] == {"x": 1}


def test_an_attempt_keeps_its_number_if_another_verdict_is_removed(run, grader):
    """The number is part of the ledger's key: with another one, its correction would be paid for again."""
    for good, final in ((False, "35"), (True, "36"), (False, "38")):
        judge(run, good, final)
    build(run, grader)
    before = {row.trace: row.sample for row in run.read("attempts.jsonl", Attempt)}
    verdicts = run.path(FEEDBACK).read_text().splitlines(keepends=True)
    run.path(FEEDBACK).write_text("".join(verdicts[1:]))
    build(run, grader)
    rows = run.read("attempts.jsonl", Attempt)
    assert [row.answer for row in rows] == ["36", "38"]
    assert all(row.sample == before[row.trace] for row in rows)
    assert len(set(before.values())) == 3


def test_answer_that_cannot_be_compared_contradicts_no_verdict(run, unsure):
    judge(run, True, "36")
    judge(run, False, "x")
    report, _ = build(run, unsure)
    assert (report.counts, report.dropped) == ({"good": 1, "bad": 0}, {"grader_unknown": 1})


def test_judged_attempt_is_not_used_while_its_problem_is_gone(run, write):
    mine = [Problem(id="p0", question=QUESTION, answer="36")]
    tried = {"question": QUESTION, "steps": ["48 + 24 = 72", "72 / 2 = 37"], "answer": "37"}
    tried |= {"first_error_step": 2}
    source = write("tried.jsonl", tried)
    run.replace("problems.jsonl", mine)
    judge(run, False, "38")
    noted = "<Cause>No.</Cause>\n<Correction>72 / 2 = 36</Correction>\n</Step2>"

    def correct(request, nth):
        work = request["messages"][-1]["content"].partition("work:\n")[2]
        return say(re.sub("</Step2>.*", f"{noted}\n<Answer>36</Answer>", work, flags=re.S))

    def reviewed(server, alone) -> list[str]:
        teacher = {"model": "openai/replay", "api_base": server.url}
        chosen = Config.model_validate({"teacher": teacher, "attempts": {"source": source}})
        pipeline.build_corrections(Context(chosen, run, ProgressDisplay(quiet=True)), alone=alone)
        return [row.id.partition("-")[0] for row in run.read("reviews.jsonl", Review)]

    with TeacherServer(correct) as server:
        assert reviewed(server, True) == ["feedback", "p0"]
        run.replace("problems.jsonl", mine)
        assert reviewed(server, False) == ["p0"]
        attempts = run.path("attempts.jsonl").read_bytes()
        assert reviewed(server, False) == ["p0"]
        assert run.path("attempts.jsonl").read_bytes() == attempts
        assert reviewed(server, True) == ["feedback", "p0"]
        assert len(server.requests) == 2
