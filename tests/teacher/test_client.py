"""The teacher client with a real HTTP server."""

import threading
import time

import pytest

from sclite.errors import TeacherError, UsageError
from sclite.teacher.client import Rejection
from sclite.teacher.ledger import Ledger
from tests.replay import BROKEN, HTML, TeacherServer, fail, job, question, say


def good(reply):
    return None if reply.startswith("good") else Rejection("not_good", f"it says {reply}")


def number_of(request):
    return int(question(request).split()[1][:-1])


def test_each_job_has_a_result_and_the_ledger_counts_all_requests(asked, ledger):
    results, _ = asked(lambda request, nth: say(f"good {question(request)}"), map(job, range(30)))
    assert [r.text for r in results] == [f"good question {i}." for i in range(30)]
    assert {r.requests for r in results} == {1}
    assert ledger.totals() == {
        "requests": 30, "sent": 30, "given_up": 0, "prompt_tokens": 330, "completion_tokens": 210,
        "cost_usd": 0.0, "lost_usd": 0.0, "unpriced": 0,
    }  # fmt: skip


def test_second_run_sends_nothing_and_needs_no_server(ask, ledger):
    def answer(request, nth):
        return say("good" if "bad" in question(request) or "1" in question(request) else "bad")

    jobs = [job(i, good) for i in range(12)]
    with TeacherServer(answer) as server:
        first, totals = ask(server, jobs), ledger.totals()
        assert len(server.requests) == totals["requests"] == 12 + 9
    assert (ask(server.url, jobs), ledger.totals()) == (first, totals)


def test_same_request_is_paid_once_and_another_sample_is_another_request(asked):
    jobs = [job(1), job(1), job(1), job(2), job(2, sample=1)]
    results, requests = asked(lambda request, nth: say(f"good {nth}", seconds=0.1), jobs)
    assert [r.text for r in results[:3]] == ["good 1"] * 3
    assert {r.text for r in results[3:]} == {"good 1", "good 2"}
    assert len(requests) == 3


def test_failed_check_is_repaired_three_times_with_its_error_in_the_request(asked):
    def answer(request, nth):
        return say("good" if "it says bad" in question(request) else "bad")

    (result,), requests = asked(answer, [job(1, good)])
    assert (result.text, result.requests) == ("good", 2)
    assert [question(r) for r in requests] == ["question 1.", "question 1. it says bad"]
    replies = iter(["bad 1", "bad 2", "bad 2", "bad 4"])
    (result,), requests = asked(lambda request, nth: say(next(replies)), [job(1, good)])
    assert (result.text, result.rejection) == (None, Rejection("not_good", "it says bad 4"))
    assert (result.raw, result.requests, len(requests)) == ("bad 4", 4, 4)
    assert len({question(request) for request in requests}) == 4  # a repeated error changes the request


def test_network_errors_are_retried_but_not_by_litellm_as_well(asked, ledger):
    kinds = [fail(429, retry_after="0"), fail(500), fail(503), HTML, BROKEN, say("late", seconds=1.5)]

    def answer(request, nth):
        return kinds[number_of(request) % len(kinds)] if nth == 1 else say("good")

    results, requests = asked(answer, [job(i, good) for i in range(12)], timeout_seconds=1)
    assert [(r.text, r.requests) for r in results] == [("good", 1)] * 12
    assert (len(requests), ledger.totals()["requests"]) == (24, 12)

    def answer(request, nth):
        return fail(500) if number_of(request) == 2 else say("good")

    results, requests = asked(answer, [job(1), job(2)], attempts_per_call=2)
    assert (results[1].rejection.reason, len(requests)) == ("no_reply", 3)


def test_job_that_waits_for_retry_after_does_not_block_the_others(asked):
    order, times = [], []

    def answer(request, nth):
        order.append(number_of(request))
        times.append(time.monotonic())
        return fail(429, retry_after="1") if nth == 1 and order[-1] == 0 else say("good")

    asked(answer, [job(i) for i in range(4)], concurrency=1)
    assert order == [0, 1, 2, 3, 0]
    assert times[-1] - times[0] >= 1.0


def test_concurrency_is_never_exceeded_and_slots_are_refilled_at_once(ask):
    others = threading.Semaphore(0)

    def answer(request, nth):
        if number_of(request) == 0:  # the slowest: while it runs, 20 others are answered
            return say("good" if all(others.acquire(timeout=10) for _ in range(20)) else "alone")
        others.release()
        return say("good", seconds=0.02)

    with TeacherServer(answer) as server:
        results = ask(server, [job(i, good) for i in range(40)], concurrency=4, repairs=0)
    assert server.most_in_flight == 4
    assert {r.text for r in results} == {"good"}


def test_jobs_are_taken_only_when_there_is_room(teacher_of):
    taken = []

    def jobs():
        for i in range(50):
            taken.append(i)
            yield job(i)

    server = TeacherServer(lambda request, nth: say("good"))
    with server, teacher_of(server, concurrency=3) as teacher:
        results = teacher.ask_all(jobs())
        next(results)
        assert len(taken) == 6
        next(results)
        assert len(taken) == 7


def test_leaving_early_cancels_calls_and_the_teacher_stays_usable(teacher_of):
    released, finished = threading.Event(), []

    def answer(request, nth):
        if number_of(request) == 1:
            released.wait(10)
            finished.append(1)
        return say("good")

    with TeacherServer(answer) as server, teacher_of(server, concurrency=1) as teacher:
        results = teacher.ask_all(map(job, range(3)))
        next(results)
        results.close()
        assert next(teacher.ask_all([job(7)])).text == "good"
        assert not finished
        released.set()


def test_bad_or_missing_key_stops_at_once_and_is_not_shown(ask, ledger, monkeypatch):
    refusal = fail(401, "Incorrect API key provided: sk-test-secret")
    with TeacherServer(lambda request, nth: refusal) as server:
        with pytest.raises(TeacherError, match=f"openai/replay at {server.url}") as caught:
            ask(server, map(job, range(10**6)))
        assert len(server.requests) <= 32
    error = caught.value
    assert (error.code, "OPENAI_API_KEY" in error.hint, "\n" in error.message) == (6, True, False)
    assert "secret" not in error.message + error.hint
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(TeacherError, match=r"gpt-4\.1 has no key") as caught:
        ask("", [job(1)], model="openai/gpt-4.1")
    assert "OPENAI_API_KEY" in caught.value.hint
    assert ledger.totals()["lost_usd"] == 0  # nothing was sent


@pytest.mark.parametrize(
    ("answer", "most"),
    [(fail(404, "The model `replay` does not exist"), 32), (fail(400, "max_tokens is too large"), 60)],
)
def test_teacher_that_refuses_everything_stops_the_stage(ask, answer, most):
    with TeacherServer(lambda request, nth: answer) as server:
        with pytest.raises(TeacherError, match=answer.body["error"]["message"]):
            ask(server, map(job, range(10**6)))
        assert len(server.requests) <= most


@pytest.mark.parametrize(
    ("model", "message"), [("something", "no provider"), ("", r"teacher\.model is not set")]
)
def test_model_without_provider_is_reported_before_any_call(ask, model, message):
    with pytest.raises(UsageError, match=message):
        ask("http://127.0.0.1:9/v1", [job(1)], model=model)


def test_teacher_that_does_not_answer_is_given_up_and_replies_are_kept(ask, ledger):
    with pytest.raises(TeacherError, match=r"127\.0\.0\.1:9/v1 does not answer after 3 attempts"):
        ask("http://127.0.0.1:9/v1", map(job, range(10**6)), attempts_per_call=3)
    with TeacherServer(lambda request, nth: say("good") if number_of(request) < 10 else BROKEN) as server:
        with pytest.raises(TeacherError, match="does not answer"):
            ask(server, map(job, range(10**4)), attempts_per_call=2, concurrency=4)
        assert len(server.requests) < 70
    assert ledger.totals()["requests"] == 10


@pytest.mark.parametrize(
    ("status", "message", "reason"),
    [
        (400, "no known question in this request", "refused_by_teacher"),
        (403, "the key is blocked", "no_reply"),
    ],
)
def test_refused_request_is_skipped_and_the_others_continue(ask, status, message, reason):
    def answer(request, nth):
        return fail(status, message) if number_of(request) % 2 else say("good")

    with TeacherServer(answer) as server:
        results = ask(server, [job(i) for i in range(21)], concurrency=1)
        assert [r.text for r in results] == [*["good", None] * 10, "good"]
        (alone,) = ask(server, [job(21)])  # one refusal does not stop the teacher
    assert results[1].rejection == alone.rejection == Rejection(reason, message)


@pytest.mark.parametrize(("status", "message"), [(422, "Over the limit"), (404, "The tunnel is offline")])
def test_refusal_of_all_further_requests_ends_the_stage_and_drops_none_for_good(ask, status, message):
    """LiteLLM's proxy answers with 422 or 400 when an account has used up a limit."""
    spent, over = True, fail(status, message)

    def answer(request, nth):
        return over if spent and number_of(request) > 2 else say("good")

    with TeacherServer(answer) as server:
        with pytest.raises(TeacherError, match=f"refuses the request: {message}"):
            ask(server, map(job, range(50)), concurrency=4)
        assert len(server.requests) < 40
        spent = False
        assert {r.text for r in ask(server, map(job, range(50)))} == {"good"}


def test_a_reply_that_comes_too_late_is_awaited_once_more_for_twice_as_long(ask):
    with TeacherServer(lambda request, nth: say("good", seconds=1.5)) as server:
        (result,) = ask(server, [job(0)], timeout_seconds=1)
        assert (result.text, len(server.requests)) == ("good", 2)
    with TeacherServer(lambda request, nth: say("good", seconds=3 * (number_of(request) == 1))) as server:
        late, _ = ask(server, [job(1), job(2)], timeout_seconds=0.5)
        assert "raise teacher.timeout_seconds" in late.rejection.text
        assert len(server.requests) == 3


def test_exceptions_in_a_check_the_jobs_or_the_ledger_reach_the_caller(asked, ask, monkeypatch):
    def broken(reply):
        raise ZeroDivisionError

    def jobs():
        yield job(1)
        raise LookupError

    for given, error in (([job(1, broken)], ZeroDivisionError), (jobs(), LookupError)):
        with pytest.raises(error):
            asked(lambda request, nth: say("good"), given)

    def full(ledger):
        raise OSError("no space left")

    monkeypatch.setattr(Ledger, "flush", full)
    with TeacherServer(lambda request, nth: say("good")) as server, pytest.raises(OSError, match="no space"):
        ask(server, [job(1)])
    monkeypatch.undo()
    assert not server.requests  # nothing is sent that is not in the ledger


@pytest.fixture
def inspected(ask):
    """inspected(reply, judge): (result, requests) of a teacher and an inspector with these replies."""

    def call(reply, judge, number=1):
        judged = []

        def answer(request, nth):
            if request["model"] != "judge":
                return say(reply(question(request)))
            judged.append(question(request))
            return judge(judged)

        asked = job(number, inspect=lambda reply: [{"role": "user", "content": f"INSPECT {reply}"}])
        with TeacherServer(answer) as server:
            (result,) = ask(server, [asked], inspector="openai/judge", inspector_api_base=server.url)
        return result, server.requests

    return call


@pytest.mark.parametrize("convinced", [True, False])
def test_rejection_by_the_inspector_is_repaired_with_its_reason(inspected, ledger, convinced):
    def judge(judged):
        if convinced and "better" in judged[-1]:
            return say("<Verdict>accept</Verdict>")
        return say("<Verdict>reject</Verdict><Reason>step 2 is wrong</Reason>")

    result, _ = inspected(lambda asked: "better" if "step 2 is wrong" in asked else "worse", judge)
    if convinced:
        assert (result.text, result.requests) == ("better", 2)
        assert ledger.totals("templates inspection")["requests"] == 2
    else:
        assert (result.rejection.reason, result.requests) == ("rejected_by_inspector", 4)


def test_inspector_without_a_verdict_is_asked_once_more(inspected, ask):
    result, requests = inspected(lambda _: "good", lambda judged: say("Hm.", "length"))
    assert (result.rejection.reason, len(requests)) == ("inspector_not_readable", 2)
    assert "teacher.max_tokens" in result.rejection.text
    verdicts = iter(["Hm.", "<Verdict>accept</Verdict>"])
    result, requests = inspected(lambda _: "good", lambda judged: say(next(verdicts)), 2)
    assert (result.text, len(requests)) == ("good", 3)
    asked = job(3, inspect=lambda reply: [{"role": "user", "content": "INSPECT"}])
    wrong = pytest.raises(UsageError, match=r"^teacher\.inspector judge: LiteLLM knows no provider")
    with TeacherServer(lambda request, nth: say("good")) as server, wrong:
        ask(server, [asked], inspector="judge")
