"""Templates from a teacher over HTTP: which are kept, which are dropped and why, and resuming after a kill."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from sclite import prompts, trace
from sclite.data.templates import check_template, find_leak, write_templates
from sclite.errors import DataError, TeacherError, UsageError
from sclite.records import Drop, Problem, Template
from sclite.run import Run
from sclite.settings import load
from sclite.teacher.client import Teacher
from sclite.teacher.ledger import Ledger
from tests.replay import TeacherServer, fail, say


def problem(number):
    return Problem(
        id=f"p{number}", question=f"What is {number} + 1?", answer=str(number + 1), solution="Count on."
    )


PROBLEMS = [problem(i) for i in range(8)]


def reply(answer, step="Count on by one."):
    return f"<Step1>{step}</Step1>\n<Generalized>Count on.</Generalized>\n<Answer>{answer}</Answer>"


def number_of(request):
    return int(request["messages"][1]["content"].split("What is ")[1].split(" ")[0])


def right(request, nth):
    return say(reply(number_of(request) + 1))


def build(run, url, grader, problems=PROBLEMS, settings=(), **options):
    settings = [
        "teacher.model=openai/replay",
        f"teacher.api_base={url}",
        "teacher.attempts_per_call=2",
        *settings,
    ]
    chosen = load(None, settings, {})
    with Ledger(run.path("ledger.sqlite")) as ledger, Teacher(chosen.teacher, ledger) as teacher:
        return write_templates(chosen, run, teacher=teacher, grader=grader, problems=problems, **options)


# -- one reply -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", ["3", "$3$", r"\boxed{3}", "The answer is 3.", "3.0"])
def test_equal_answers_are_accepted(answer, grader):
    assert check_template(reply(answer), problem(2), grader) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Sure! Let me think about that.", "no_steps"),
        (reply("3").replace("</Step1>", ""), "missing_closer"),
        (reply("3", step=" "), "empty_step"),
        (reply("3").replace("Step1", "Step2"), "wrong_step_number"),
        (reply("4"), "wrong_answer"),
        (reply("3").replace("<Generalized>Count on.</Generalized>", ""), "no_generalized"),
        (reply("3", step="x\n<Cause>a</Cause>\n<Correction>b</Correction>\n"), "correction_in_template"),
        (reply("3", step="As the reference solution shows, it is 3."), "leak"),
    ],
)
def test_each_invalid_reply_has_a_reason(text, reason, grader):
    assert check_template(text, problem(2), grader).reason == reason


def test_unknown_grade_is_not_a_wrong_template():
    class Unsure:
        def equal(self, given, gold):
            return None

    rejection = check_template(reply("3"), problem(2), Unsure())
    assert rejection.reason == "grader_unknown"
    assert "3" in rejection.text


@pytest.mark.parametrize(
    "text",
    [
        "As the reference solution shows",
        "Following the given solution, add",
        "this is the gold answer",
        "matches the provided answer",
        "as in the solution given above",
        "The answer was provided, so",
        "the Ground-Truth answer",
        "according to the given solution of the equation",
        "the given answer of 5 apples",
        "the given solution of 5.",
    ],
)
def test_mention_of_the_given_solution_is_found(text):
    assert find_leak(f"Well. {text} it is 3.")


@pytest.mark.parametrize(
    "text",
    [
        "The solution is 5.",
        "The answer is given by 3x.",
        "Mix it into the solution: it has 5 litres of acid",
        "the solution set is {1, 2}",
        "So the correct answer is 7",
        "the given numbers",
        "The given solution of 2 litres is 20% acid",
        "the provided solution of $0.5$ L of salt water",
        "the given solution contains 20% salt",
        "the golden ratio answers it",
        "Given the equation, its solutions are",
    ],
)
def test_other_uses_of_the_word_solution_are_no_leak(text):
    assert find_leak(text) is None


# -- the stage -----------------------------------------------------------------------------------------------------


def test_templates_are_canonical_right_and_in_problem_order(run, grader):
    def answer(request, nth):  # the first problems finish last
        return say(
            reply(f"That makes {number_of(request) + 1} apples."), seconds=0.2 - number_of(request) / 50
        )

    seen = []
    with TeacherServer(answer) as server:
        report = build(run, server.url, grader, progress=lambda *given: seen.append(given))
    rows = run.read("templates.jsonl", Template)
    assert [row.id for row in rows] == [p.id for p in PROBLEMS]
    for row in rows:
        assert trace.render(trace.parse(row.trace).trace) == row.trace
        assert trace.parse(row.trace).trace.answer == f"That makes {row.answer} apples."
    assert report.counts == {"problems": 8, "templates": 8}
    assert report.figures["requests"] == 8
    assert [given[0] for given in seen] == list(range(9))
    assert {given[1:] for given in seen} == {(8, 0.0)}
    assert "localhost" not in run.path("done/templates.json").read_text()
    assert "secret" not in run.path("done/templates.json").read_text()


def test_retry_prompt_has_the_reason_of_the_rejection(run, grader):
    def answer(request, nth):
        retried = "its answer is 99, not" in request["messages"][1]["content"]
        return right(request, nth) if retried else say(reply("99"))

    with TeacherServer(answer) as server:
        report = build(run, server.url, grader)
    assert report.counts["templates"] == report.figures["repaired"] == 8
    assert {row.requests for row in run.read("templates.jsonl", Template)} == {2}


def test_drops_have_a_reason_and_the_raw_reply(run, grader):
    def answer(request, nth):
        number = number_of(request)
        if number == 3:
            return fail(404, "no known question in this request")
        return say(reply(99)) if number == 5 else right(request, nth)

    with TeacherServer(answer) as server:
        report = build(run, server.url, grader)
    drops = run.read("dropped.jsonl", Drop)
    assert [(d.id, d.reason) for d in drops] == [("p3", "refused_by_teacher"), ("p5", "wrong_answer")]
    assert drops[0].detail == "no known question in this request"
    assert drops[1].raw == reply(99)
    assert report.dropped == {"refused_by_teacher": 1, "wrong_answer": 1}
    assert report.counts["templates"] == 6


def test_only_new_problems_are_requested(run, grader):
    with TeacherServer(right) as server:
        first = build(run, server.url, grader, PROBLEMS[:5])
        again = build(run, server.url, grader, PROBLEMS[:5])
        assert again.skipped
        assert (again.counts, again.cost_usd) == (first.counts, first.cost_usd)
        assert len(server.requests) == 5
        seen = []
        more = build(run, server.url, grader, PROBLEMS[:6], progress=lambda *given: seen.append(given))
        assert seen == [(5, 6, 0.0), (6, 6, 0.0)]
        assert not more.skipped
        assert [number_of(r) for r in server.requests[5:]] == [5]
        fewer = build(run, server.url, grader, PROBLEMS[1:3])
        assert fewer.counts == {"problems": 2, "templates": 2}
        assert len(server.requests) == 6


def test_changed_problem_is_requested_again(run, grader):
    with TeacherServer(right) as server:
        build(run, server.url, grader, PROBLEMS[:3])
        build(
            run,
            server.url,
            grader,
            [*PROBLEMS[:2], PROBLEMS[2].model_copy(update={"question": "What is 7 + 1?", "answer": "8"})],
        )
    assert [number_of(r) for r in server.requests[3:]] == [7]
    assert run.read("templates.jsonl", Template)[2].answer == "8"


def test_rows_of_another_teacher_need_fresh(run, grader):
    with TeacherServer(right) as server:
        build(run, server.url, grader)
        with pytest.raises(UsageError, match="max_tokens") as caught:
            build(run, server.url, grader, settings=["teacher.max_tokens=77"])
        assert "--fresh" in caught.value.hint
        assert len(run.read("templates.jsonl", Template)) == 8
        assert len(server.requests) == 8
        build(run, server.url, grader, settings=["teacher.max_tokens=77"], fresh=True)
        assert len(server.requests) == 16


def test_changed_prompt_needs_fresh_but_a_learning_rate_does_not(run, grader, tmp_path):
    prompt = prompts.shipped_folder() / "teacher_template.txt"
    text = prompt.read_text().replace("<Generalized>", "<Generalized>In one sentence: ", 1)
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts/teacher_template.txt").write_text(text)
    other = [f"prompts.folder={tmp_path / 'prompts'}"]
    with TeacherServer(right) as server:
        build(run, server.url, grader)
        assert build(run, server.url, grader, settings=["sft.learning_rate=3e-4"]).skipped
        assert len(server.requests) == 8
        with pytest.raises(UsageError, match="prompts"):
            build(run, server.url, grader, settings=other)
        assert len(server.requests) == 8
        build(run, server.url, grader, settings=other, fresh=True)
        assert sorted(map(number_of, server.requests[8:])) == list(range(8))
        assert all("In one sentence: " in r["messages"][1]["content"] for r in server.requests[8:])
        build(run, server.url, grader, fresh=True)  # replies to the old prompt are in the ledger
        assert len(server.requests) == 16


def test_imported_templates_replace_the_stage(run, grader):
    rows = [Template(id="mine", question="q", answer="1", trace=reply(1))]
    run.replace("templates.jsonl", rows)
    with TeacherServer(right) as server:
        report = build(run, server.url, grader)
    assert report.skipped
    assert report.counts == {"templates": 1, "imported": 1}
    assert not server.requests
    assert run.read("templates.jsonl", Template) == rows
    run.replace("templates.jsonl", [rows[0].model_copy(update={"trace": "<Step1>open"})])
    with pytest.raises(DataError, match=r"row 1 \(mine\): missing closer"):
        build(run, server.url, grader)


def test_templates_can_be_imported_after_a_teacher_never_replied(run, grader):
    with pytest.raises(TeacherError):
        build(run, "http://127.0.0.1:9/v1", grader)
    run.replace("templates.jsonl", [Template(id="mine", question="q", answer="1", trace=reply(1))])
    assert build(run, "http://127.0.0.1:9/v1", grader).counts["imported"] == 1


def test_teacher_may_move_to_another_address(run, grader):
    with TeacherServer(right) as server:
        build(run, server.url, grader, PROBLEMS[:4])
    with TeacherServer(right) as server:
        build(run, server.url, grader, PROBLEMS)
    assert len(server.requests) == 4


def test_next_run_requests_unanswered_templates_again(run, grader):
    lost = [2]

    def answer(request, nth):
        return fail(503) if number_of(request) in lost else right(request, nth)

    with TeacherServer(answer) as server:
        assert build(run, server.url, grader).dropped == {"no_reply": 1}
        lost.clear()
        report = build(run, server.url, grader)
        assert (report.counts["templates"], report.dropped, report.skipped) == (8, {}, False)
        assert not run.read("dropped.jsonl", Drop)
        assert build(run, server.url, grader).skipped


def test_error_with_reasons_if_no_template_is_valid(run, grader):
    expected = pytest.raises(DataError, match="none of the 8 problems gave a template: 8 no_steps")
    with TeacherServer(lambda request, nth: say("Sure!")) as server, expected:
        build(run, server.url, grader)
    assert len(run.read("dropped.jsonl", Drop)) == 8
    assert run.manifest("templates") is None


def test_default_problems_are_the_sft_share_of_the_source(tmp_path, run, grader):
    source = tmp_path / "p.jsonl"
    source.write_text(
        "".join(json.dumps({"question": p.question, "answer": p.answer}) + "\n" for p in PROBLEMS)
    )
    with TeacherServer(right) as server:
        report = build(run, server.url, grader, None, [f"problems.source={source}"])
    assert len(run.read("problems.jsonl", Problem)) == 8
    assert 0 < report.counts["problems"] < 8


# -- kills and interrupts ------------------------------------------------------------------------------------------

PROGRAM = """
import sys
from sclite.settings import load
from sclite.grading.worker import Grader
from sclite.data.templates import write_templates
from sclite.records import Problem
from sclite.run import Run
from sclite.teacher.client import Teacher
from sclite.teacher.ledger import Ledger

run, url = Run(sys.argv[1]), sys.argv[2]
problems = [Problem(id=f"p{i}", question=f"What is {i} + 1?", answer=str(i + 1), solution="Count.") for i in range(60)]
settings = load(None, ["teacher.model=openai/replay", f"teacher.api_base={url}", "teacher.concurrency=4"], {})
with run.lock(), Grader() as grader, Ledger(run.path("ledger.sqlite")) as ledger:
    with Teacher(settings.teacher, ledger) as teacher:
        write_templates(settings, run, teacher=teacher, grader=grader, problems=problems,
                        progress=lambda done, total, spent: print(done, flush=True))
"""


def start(run, server):
    command = [sys.executable, "-c", PROGRAM, str(run.folder), server.url]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.stdout.readline().strip() not in ("20", ""):
        pass
    return process


def slowly(request, nth):
    return say(reply(number_of(request) + 1), seconds=0.05)


def test_after_a_kill_replies_in_the_ledger_are_not_requested_again(run):
    with TeacherServer(slowly) as server:
        process = start(run, server)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        with Ledger(run.path("ledger.sqlite")) as ledger:
            paid = ledger.totals()["requests"]
        before = len(server.requests)
        assert 20 <= paid <= before < 60
        assert len(run.read("templates.jsonl", Template)) >= 19
        second = start(run, server)
        _, errors = second.communicate()
        assert (second.returncode, errors) == (0, "")
    assert len(server.requests) - before == 60 - paid
    rows = run.read("templates.jsonl", Template)
    assert [row.id for row in rows] == [f"p{i}" for i in range(60)]


def test_interrupt_stops_at_once_with_one_traceback(run):
    with TeacherServer(
        lambda request, nth: say(reply(number_of(request) + 1), seconds=0.05 if nth < 2 else 30)
    ) as server:
        process = start(run, server)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert time.monotonic() - began < 2
    assert errors.strip().splitlines()[-1] == "KeyboardInterrupt"
    assert errors.count("Traceback") == 1
    assert "never awaited" not in errors
    assert "Unclosed" not in errors
    assert Run(run.folder).read("templates.jsonl", Template)


def test_template_with_replacement_characters_is_rejected(grader):
    problem = Problem(id="p", question="What is 2 + 3?", answer="5")
    text = "<Step1>2 + 3 = 5{}</Step1><Generalized>Add.</Generalized><Answer>5</Answer>"
    assert check_template(text.format(""), problem, grader) is None
    assert check_template(text.format(" \ufffd"), problem, grader).reason == "broken_text"
