"""Corrections by a teacher over HTTP: which reviews are kept, and each reason to reject one."""

import pytest

from sclite.config import Config
from sclite.data.corrections import check_review, write_corrections
from sclite.errors import DataError, UsageError
from sclite.progress import no_progress
from sclite.records import Attempt, Drop, Problem, Review
from sclite.trace import Step, Trace, parse, render
from tests.replay import TeacherServer, client, fail, say
from tests.toy import raises

PROBLEM = Problem(id="p0", question="What is 48 + 24, halved, plus 5?", answer="41", solution="72, 36, 41.")
WORK = Trace((Step("48 + 24 = 72", "Carry."), Step("72 / 2 = 38"), Step("38 + 5 = 43")), "Go on.", "43")
ATTEMPT = Attempt(id="p0", sample=0, trace=render(WORK), answer="43", correct=False)
GOOD = (
    "<Step1>48 + 24 = 72\n<Key>Carry.</Key>\n</Step1>\n"
    "<Step2>72 / 2 = 38\n<Cause>2 * 38 is 76.</Cause>\n<Correction>72 / 2 = 36</Correction>\n</Step2>\n"
    "<Step3>36 + 5 = 41\n</Step3>\n<Generalized>Go on.</Generalized>\n<Answer>41</Answer>"
)
NOTES = "<Cause>2 * 38 is 76.</Cause>\n<Correction>72 / 2 = 36</Correction>\n"


def build(run, grader, answer=None, share=0.5, progress=no_progress, **teacher):
    """The stage with a teacher that answers as `answer` (default: GOOD), and the server's requests."""
    with TeacherServer(answer or (lambda request, nth: say(GOOD))) as server:
        report = build_with(server, run, grader, share, progress, **teacher)
    return report, [request["messages"][-1]["content"] for request in server.requests]


def build_with(server, run, grader, share=0.5, progress=no_progress, fresh=False, **teacher):
    settings = {"model": "openai/replay", "api_base": server.url, "attempts_per_call": 1, "repairs": 1}
    tree = {"teacher": settings | teacher, "attempts": {"confirmation_share": share}}
    config = Config.model_validate(tree)
    with client(run, config.teacher) as made:
        given = {"teacher": made, "grader": grader, "fresh": fresh, "progress": progress}
        return write_corrections(config, run, **given)


def fill(run, wrong=1, right=0, others=()):
    """`wrong` wrong attempts and `right` right ones, each at its own problem."""
    attempts = [ATTEMPT.model_copy(update={"id": f"w{i}"}) for i in range(wrong)]
    done = render(Trace((Step("48 + 24 = 72"), Step("72 / 2 + 5 = 41")), "Go on.", "41"))
    attempts += [Attempt(id=f"r{i}", sample=0, trace=done, answer="41", correct=True) for i in range(right)]
    attempts += others
    run.replace("attempts.jsonl", attempts)
    ids = dict.fromkeys(attempt.id for attempt in attempts)
    problems = [PROBLEM.model_copy(update={"id": i, "question": f"{i}: {PROBLEM.question}"}) for i in ids]
    run.replace("problems.jsonl", problems)


def test_review_of_the_first_wrong_step_is_kept_unless_its_grade_is_unknown(grader, unsure):
    # blanks, signs and case may differ: the student's own text is kept
    for copy in ("48 + 24 = 72", "48 +  24 =\n72", "48+24=72.", "48 + 24 = \\$72"):
        text = GOOD.replace("48 + 24 = 72", copy)
        found = check_review(text, ATTEMPT, PROBLEM, grader)
        assert found.steps[0].text == WORK.steps[0].text
    text = GOOD.replace("<Answer>41", "<Answer>41.0")
    assert check_review(text, ATTEMPT, PROBLEM, unsure).reason == "grader_unknown"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("I think it is all wrong.", "not_readable"),
        (GOOD.replace("</Step2>", ""), "not_readable"),
        (GOOD.replace(NOTES, ""), "no_error_found"),
        (GOOD.replace(NOTES, "").replace("41\n</Step3>", f"41\n</Step3>\n<Step4>so\n{NOTES}</Step4>"), "step_out_of_range"),
        (GOOD.replace("<Cause>2 * 38 is 76.</Cause>\n", ""), "cause_or_correction_missing"),
        (GOOD.replace("<Correction>72 / 2 = 36</Correction>\n", ""), "cause_or_correction_missing"),
        (GOOD.replace("36 + 5 = 41\n", "36 + 5 = 41\n<Cause>x</Cause>\n<Correction>y</Correction>\n"), "several_steps_corrected"),
        (GOOD.replace("48 + 24 = 72", "48 + 24 is 72"), "steps_changed"),
        (GOOD.replace("72 / 2 = 38", "72 / 2 = 39"), "steps_changed"),
        (GOOD.replace("48 + 24 = 72", "48 - 24 = 72"), "steps_changed"),
        (GOOD.replace("72 / 2 = 38", "7.2 / 2 = 38"), "steps_changed"),
        (GOOD.replace("2 * 38 is 76.", "The reference solution says 36."), "leak"),
        (GOOD.replace("<Answer>41", "<Answer>43"), "wrong_answer"),
    ],
)  # fmt: skip
def test_each_invalid_review_has_a_reason(grader, text, reason):
    rejection = check_review(text, ATTEMPT, PROBLEM, grader)
    assert rejection.reason == reason
    assert rejection.text


def test_imported_label_decides_which_step_is_accused(grader):
    right, *others = (ATTEMPT.model_copy(update={"first_error": label}) for label in (2, 1, 3))
    assert isinstance(check_review(GOOD, right, PROBLEM, grader), Trace)
    for other in others:
        found = check_review(GOOD, other, PROBLEM, grader)
        said = f"step {other.first_error} is the first wrong one, not step 2"
        assert (found.reason, found.text) == ("other_step_than_label", said)


def test_teacher_gets_work_and_solution_and_its_review_is_stored(run, grader):
    fill(run)
    report, (asked,) = build(run, grader)
    assert PROBLEM.solution in asked
    assert asked.endswith(render(WORK))
    (row,) = run.read("reviews.jsonl", Review)
    assert (row.step, row.cause, row.correction) == (2, "2 * 38 is 76.", "72 / 2 = 36")
    assert row.trace == render(parse(GOOD).trace)
    assert row.requests == 1
    assert report.counts == {"wrong": 1, "corrected": 1, "confirmed": 0}


def test_nothing_is_paid_for_twice_when_settings_change(run, grader):
    fill(run, wrong=3)

    def answer(request, nth):
        long = "w2: " in request["messages"][-1]["content"] and request["max_tokens"] < 500
        return say("<Step1>48 + 24", "length") if long else say(GOOD)

    with TeacherServer(answer) as server:
        first = build_with(server, run, grader, max_tokens=100, repairs=0)
        assert (first.counts["corrected"], first.dropped) == (2, {"cut_off": 1})
        again = build_with(server, run, grader, max_tokens=800, repairs=0)
        assert again.counts["corrected"] == 3
        assert [request["max_tokens"] for request in server.requests] == [100, 100, 100, 800]
        with raises(UsageError, r"temperature: .* before, 0\.5 now", hint="--fresh"):
            build_with(server, run, grader, temperature=0.5)
        assert len(server.requests) == 4
        build_with(server, run, grader, temperature=0.5, fresh=True)
        assert len(server.requests) == 7


def test_a_repaired_reply_is_not_paid_for_again_with_more_tokens(run, grader):
    fill(run, wrong=2)

    def answer(request, nth):
        repaired = "write it shorter" in request["messages"][-1]["content"]
        return say(GOOD) if repaired else say("<Step1>48", "length")

    with TeacherServer(answer) as server:
        assert build_with(server, run, grader, max_tokens=100).counts["corrected"] == 2
        assert build_with(server, run, grader, max_tokens=800).counts["corrected"] == 2
        assert len(server.requests) == 2 * 2


def test_what_the_student_wrote_is_no_leak(grader):
    text = "as in the reference solution \ufffd 48 + 24 = 72"
    attempt = Attempt(**ATTEMPT.model_dump() | {"trace": ATTEMPT.trace.replace("48 + 24 = 72", text)})
    kept = GOOD.replace("48 + 24 = 72", text)
    assert isinstance(check_review(kept, attempt, PROBLEM, grader), Trace)
    leak = kept.replace("36 + 5 = 41", "36 + 5 = 41, as in the reference solution")
    assert check_review(leak, attempt, PROBLEM, grader).reason == "leak"


def test_stage_without_a_usable_reply_keeps_its_teacher_too(run, grader):
    fill(run, wrong=2)

    def answer(request, nth):
        return fail(500, "down") if "w1: " in request["messages"][-1]["content"] else say("I do not know.")

    with TeacherServer(answer) as server:
        with pytest.raises(DataError, match="no wrong attempt could be corrected"):
            build_with(server, run, grader, concurrency=1, repairs=0)
        with pytest.raises(UsageError, match="temperature"):
            build_with(server, run, grader, concurrency=1, repairs=0, temperature=0.5)


def test_invalid_review_is_retried_with_the_reason_then_dropped(run, grader):
    fill(run, wrong=2)
    bad = GOOD.replace("<Answer>41", "<Answer>43")

    def answer(request, nth):
        return say(bad if "w0: " in request["messages"][-1]["content"] else GOOD)

    report, asked = build(run, grader, answer)
    said = "Your last reply could not be used: 43 is not the right final answer"
    assert sum(said in text for text in asked) == 1
    assert report.counts["corrected"] == 1
    assert report.dropped == {"wrong_answer": 1}
    (drop,) = run.read("dropped.jsonl", Drop)
    found = (drop.stage, drop.id, drop.sample, drop.reason, drop.raw)
    assert found == ("corrections", "w0", 0, "wrong_answer", bad)


@pytest.mark.parametrize(
    ("share", "right", "confirmed"), [(0.5, 10, 4), (0.2, 10, 1), (0.0, 10, 0), (0.8, 10, 10), (0.5, 2, 2)]
)
def test_confirmations_are_right_attempts_in_the_configured_share(run, grader, share, right, confirmed):
    fill(run, wrong=4, right=right)
    report, asked = build(run, grader, share=share)
    assert report.counts == {"wrong": 4, "corrected": 4, "confirmed": confirmed}
    confirmations = [r for r in run.read("reviews.jsonl", Review) if r.step is None]
    parts = {(row.id[0], row.cause, row.correction, row.requests) for row in confirmations}
    assert (len(confirmations), parts) == (confirmed, {("r", None, None, 0)} if confirmed else set())
    assert len(asked) == 4  # right attempts cost nothing


@pytest.mark.parametrize(("right", "share", "warned"), [(0, 0.5, True), (1, 0.5, False), (0, 0.0, False)])
def test_warning_if_there_are_no_confirmations(run, grader, warnings, right, share, warned):
    fill(run, wrong=2, right=right)
    report, _ = build(run, grader, share=share, progress=warnings)
    assert report.figures.get("warnings", []) == warnings
    assert [text.startswith("no attempt is right and well-formed") for text in warnings] == [True] * warned


def test_confirmation_has_no_notes_of_a_self_corrected_attempt(run, grader):
    noted = Attempt(**ATTEMPT.model_dump() | {"id": "n", "correct": True, "answer": "41", "trace": GOOD})
    fill(run, others=(noted,))
    build(run, grader)
    (confirmed,) = [row for row in run.read("reviews.jsonl", Review) if row.step is None]
    assert confirmed.id == "n"
    assert "72 / 2 = 36" in confirmed.trace
    assert "<Cause>" not in confirmed.trace


def test_unusable_and_identical_attempts_are_counted_and_not_sent(run, grader):
    unknown = ATTEMPT.model_copy(update={"id": "u", "correct": None})
    torn = Attempt(**ATTEMPT.model_dump() | {"id": "t", "trace": "<Step1>cut in the mid"})
    fill(run, others=(unknown, torn, ATTEMPT.model_copy(update={"id": "w0", "sample": 1})))
    report, asked = build(run, grader)
    assert report.dropped == {"outcome_unknown": 1, "attempt_not_readable": 1}
    assert len(asked) == report.counts["wrong"] == report.counts["duplicates"] == 1
    found = {d.id: (d.raw, d.detail) for d in run.read("dropped.jsonl", Drop)}
    assert (found["t"][0], "no answer at the end" in found["t"][1]) == (torn.trace, True)


def test_error_if_there_are_no_attempts_or_no_valid_correction(run, grader):
    with raises(DataError, r"attempts\.jsonl is missing or empty", hint="sclite train"):
        build(run, grader)
    fill(run, wrong=2)
    with pytest.raises(DataError, match="no wrong attempt could be corrected: 2 not readable") as error:
        build(run, grader, lambda request, nth: say("All good!"))
    assert "dropped.jsonl" in error.value.hint
    assert "sft.num_train_epochs or sft.learning_rate" in error.value.hint
    assert run.manifest("corrections") is None
    assert len(run.read("dropped.jsonl", Drop)) == 2


def test_second_run_sends_no_request_to_a_teacher_at_any_address(run, grader):
    fill(run, wrong=3, right=3)
    with TeacherServer(lambda request, nth: say(GOOD)) as teacher:
        first, _ = build(run, grader, api_base=teacher.url)
        before = run.path("reviews.jsonl").read_bytes()
        assert build(run, grader, api_base=teacher.url)[0].skipped
        run.path("done/corrections.json").unlink()
        third, _ = build(run, grader, api_base=teacher.url)
        assert len(teacher.requests) == 3
    fourth, asked = build(run, grader)  # on another port
    assert (asked, fourth.skipped) == ([], True)
    assert first.counts == third.counts == fourth.counts
    assert run.path("reviews.jsonl").read_bytes() == before


def test_next_run_requests_unanswered_corrections_again(run, grader):
    fill(run, wrong=3)
    down = [True]

    def answer(request, nth):
        return fail(503) if down[0] and len(server.requests) == 2 else say(GOOD)

    with TeacherServer(answer) as server:
        first, _ = build(run, grader, concurrency=1, api_base=server.url)
        assert first.dropped == {"no_reply": 1}
        down[0] = False
        second, _ = build(run, grader, concurrency=1, api_base=server.url)
        assert len(server.requests) == 4
    assert not second.skipped
    assert second.counts["corrected"] == 3
    assert second.dropped == {}
