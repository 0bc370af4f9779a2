"""Templates from a teacher over HTTP: which are kept, which are dropped and why."""

import pytest

from sclite import prompts, trace
from sclite.data.templates import LEAK, check_template, write_templates
from sclite.errors import DataError, TeacherError, UsageError
from sclite.records import Drop, Template
from sclite.run import Run
from sclite.settings import load
from sclite.trace import Trace
from tests.replay import TeacherServer, client, fail, number_of, say, sums
from tests.replay import template as reply

PROBLEMS = sums(8)


def right(request, nth):
    return say(reply(number_of(request) + 1))


def build(run, url, grader, problems=PROBLEMS, settings=(), **options):
    teacher = ["teacher.model=openai/replay", f"teacher.api_base={url}", "teacher.attempts_per_call=2"]
    chosen = load(None, [*teacher, *settings], {})
    with client(run, chosen.teacher) as teacher:
        return write_templates(chosen, run, teacher=teacher, grader=grader, problems=problems, **options)


def test_equal_answers_are_accepted_and_an_unknown_grade_is_not_wrong(grader, unsure):
    for answer in ("3", "$3$", r"\boxed{3}", "The answer is 3.", "3.0"):
        assert isinstance(check_template(reply(answer), PROBLEMS[2], grader), Trace)
    rejection = check_template(reply("3.0"), PROBLEMS[2], unsure)
    assert (rejection.reason, "exactly: 3" in rejection.text) == ("grader_unknown", True)


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
    assert check_template(text, PROBLEMS[2], grader).reason == reason


def test_escaped_signs_and_markdown_between_tags_are_read(grader):
    found = check_template(reply("3", step="x &lt; 4 &amp; y"), PROBLEMS[2], grader)
    assert found.steps[0].text == "x < 4 & y"
    for between in ("---\n", "### Step 2\n", "2. ", "<br>\n", "</Steps>\n", "- "):
        text = reply("3").replace("<Generalized>", f"{between}<Generalized>")
        assert isinstance(check_template(text, PROBLEMS[2], grader), Trace), between
    text = reply("3").replace("<Generalized>", "Now the rule:\n<Generalized>")
    assert check_template(text, PROBLEMS[2], grader).reason == "text_between_tags"


LEAKS = [
    "As the reference solution shows", "Following the given solution, add", "this is the gold answer", "the Ground-Truth answer",
    "matches the provided answer", "as in the solution given above", "according to the given answer", "the given answer of 5 apples",
    "The answer key says 72:", "the expected answer is 72, but", "According to the solution,", "The solution states that",
]  # fmt: skip
NO_LEAKS = [
    "The solution is 5.", "The answer is given by 3x.", "Mix it into the solution: it has 5 litres of acid", "the given numbers",
    "the solution set is {1, 2}", "So the correct answer is 7", "The given solution of 2 litres is 20% acid", "the golden ratio answers it",
    "The key to the answer is", "the expected value is", "Given the equation, its solutions are", "Of the given answer choices,",
]  # fmt: skip


@pytest.mark.parametrize("text", [*LEAKS, *NO_LEAKS])
def test_mention_of_the_given_solution_is_a_leak_and_other_solutions_are_not(text):
    assert (LEAK.search(f"Well. {text} it is 3.") is not None) == (text in LEAKS)


def test_templates_are_canonical_right_and_in_problem_order(run, grader):
    def answer(request, nth):  # the first problems finish last
        number = number_of(request)
        return say(reply(f"That makes {number + 1} apples."), seconds=0.2 - number / 50)

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
            return fail(400, "no known question in this request")
        return say(reply(99)) if number == 5 else right(request, nth)

    with TeacherServer(answer) as server:
        report = build(run, server.url, grader)
    drops = run.read("dropped.jsonl", Drop)
    assert [(d.id, d.reason) for d in drops] == [("p3", "refused_by_teacher"), ("p5", "wrong_answer")]
    assert drops[0].detail == "no known question in this request"
    assert drops[1].raw == reply(99)
    assert report.dropped == {"refused_by_teacher": 1, "wrong_answer": 1}
    assert report.counts["templates"] == 6


def test_only_new_and_changed_problems_are_requested(run, grader):
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
        fewer = build(run, server.url, grader, PROBLEMS[1:3])
        assert fewer.counts == {"problems": 2, "templates": 2}
        other = PROBLEMS[2].model_copy(update={"question": "What is 7 + 1?", "answer": "8"})
        build(run, server.url, grader, [PROBLEMS[1], other])
        assert [number_of(r) for r in server.requests[5:]] == [5, 7]
    assert run.read("templates.jsonl", Template)[1].answer == "8"


def test_rows_of_another_teacher_or_prompt_need_fresh(run, grader, tmp_path):
    text = (prompts.SHIPPED / "teacher_template.txt").read_text()
    (tmp_path / "prompts").mkdir()
    prompt = tmp_path / "prompts/teacher_template.txt"
    prompt.write_text(text.replace("<Generalized>", "<Generalized>In one sentence: ", 1))
    with TeacherServer(right) as server:
        build(run, server.url, grader)
        assert build(run, server.url, grader, settings=["sft.learning_rate=3e-4"]).skipped
        changes = {"temperature": "teacher.temperature=0.7", "prompts": f"prompts.folder={prompt.parent}"}
        for named, change in changes.items():
            with pytest.raises(UsageError, match=named) as caught:
                build(run, server.url, grader, settings=[change])
            assert "--fresh" in caught.value.hint
            assert len(run.read("templates.jsonl", Template)) == len(server.requests) == 8
        build(run, server.url, grader, settings=[change], fresh=True)
        assert sorted(map(number_of, server.requests[8:])) == list(range(8))
        assert all("In one sentence: " in r["messages"][1]["content"] for r in server.requests[8:])
        build(run, server.url, grader, fresh=True)  # replies to the old prompt are in the ledger
        assert len(server.requests) == 16


def test_larger_token_budget_requests_only_what_is_missing(run, grader):
    def answer(request, nth):
        cut = number_of(request) == 2 and request["max_tokens"] < 500
        return say("", "length") if cut else right(request, nth)

    with TeacherServer(answer) as server:
        report = build(run, server.url, grader, settings=["teacher.max_tokens=200"])
        assert (report.counts["templates"], report.dropped) == (7, {"reasoning_too_long": 1})
        assert len(server.requests) == 9
        assert build(run, server.url, grader, settings=["teacher.max_tokens=500"]).counts["templates"] == 8
    assert [number_of(request) for request in server.requests[9:]] == [2]


def test_teacher_may_move_and_templates_be_imported_after_it_never_replied(run, grader, tmp_path):
    for problems in (PROBLEMS[:4], PROBLEMS):
        with TeacherServer(right) as server:
            build(Run(tmp_path / "moved"), server.url, grader, problems)
    assert len(server.requests) == 4
    with pytest.raises(TeacherError):
        build(run, "http://127.0.0.1:9/v1", grader)
    run.replace("templates.jsonl", [Template(id="mine", question="q", answer="1", trace=reply(1))])
    assert build(run, "http://127.0.0.1:9/v1", grader).counts["imported"] == 1


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
    expected = pytest.raises(DataError, match="none of the 8 problems yielded a template: 8 no_steps")
    with TeacherServer(lambda request, nth: say("Sure!")) as server, expected:
        build(run, server.url, grader)
    assert len(run.read("dropped.jsonl", Drop)) == 8
    assert run.manifest("templates") is None
