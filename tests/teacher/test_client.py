"""The teacher client with a real HTTP server."""

import threading
import time

import pytest

from sclite import config
from sclite.errors import TeacherError, UsageError
from sclite.teacher.client import Job, Rejection, Teacher
from sclite.teacher.ledger import Ledger
from tests.replay import BROKEN, HTML, TeacherServer, fail, say


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-secret")


def job(number, check=lambda reply: None, sample=0):
    def messages(error):
        return [{"role": "user", "content": f"question {number}. {error}".strip()}]

    return Job(str(number), messages, check, sample)


def good(reply):
    return None if reply.startswith("good") else Rejection("not_good", f"it says {reply}")


def ask(server, jobs, path, url=None, **settings):
    base = url or (server.url if server else "")
    settings = {"model": "openai/replay", "api_base": base, "attempts_per_call": 4, **settings}
    with Ledger(path / "ledger.sqlite") as ledger, Teacher(config.Teacher(**settings), ledger) as teacher:
        return sorted(teacher.ask_all(jobs, "templates"), key=lambda r: int(r.id)), ledger.totals()


def question(request):
    return request["messages"][0]["content"]


def test_each_job_has_a_result_and_the_ledger_counts_all_requests(tmp_path):
    with TeacherServer(lambda request, nth: say(f"good {question(request)}")) as server:
        results, totals = ask(server, map(job, range(30)), tmp_path)
    assert [r.text for r in results] == [f"good question {i}." for i in range(30)]
    assert {r.requests for r in results} == {1}
    assert totals == {
        "requests": 30, "sent": 30, "given_up": 0, "prompt_tokens": 330, "completion_tokens": 210,
        "cost_usd": 0.0, "lost_usd": 0.0, "unpriced": 0,
    }  # fmt: skip


def test_second_run_sends_nothing_and_needs_no_server(tmp_path):
    def answer(request, nth):
        return say("good" if "bad" in question(request) or "1" in question(request) else "bad")

    jobs = [job(i, good) for i in range(12)]
    with TeacherServer(answer) as server:
        first, totals = ask(server, jobs, tmp_path)
        calls = len(server.requests)
    assert calls == totals["requests"] == 12 + 9
    second, after = ask(None, jobs, tmp_path, server.url)
    assert (second, after) == (first, totals)


def test_another_sample_is_another_request(tmp_path):
    with TeacherServer(lambda request, nth: say(f"good {nth}")) as server:
        results, _ = ask(server, [job(1, sample=0), job(1, sample=1)], tmp_path, concurrency=1)
    assert {r.text for r in results} == {"good 1", "good 2"}


def test_same_request_in_several_jobs_is_paid_once(tmp_path):
    with TeacherServer(lambda request, nth: say(f"good {nth}", seconds=0.1)) as server:
        results, _ = ask(server, [job(1), job(1), job(1)], tmp_path)
    assert [r.text for r in results] == ["good 1"] * 3
    assert len(server.requests) == 1


def test_failed_check_is_repaired_with_its_error_in_the_request(tmp_path):
    with TeacherServer(
        lambda request, nth: say("good" if "it says bad" in question(request) else "bad")
    ) as server:
        results, _ = ask(server, [job(1, good)], tmp_path)
    assert results[0].text == "good"
    assert results[0].requests == 2
    assert [question(r) for r in server.requests] == ["question 1.", "question 1. it says bad"]


def test_job_fails_after_three_repairs_with_its_last_error_and_reply(tmp_path):
    with TeacherServer(lambda request, nth: say(f"bad {len(server.requests)}")) as server:
        results, _ = ask(server, [job(1, good)], tmp_path)
    assert results[0].text is None
    assert results[0].rejection == Rejection("not_good", "it says bad 4")
    assert (results[0].raw, results[0].requests, len(server.requests)) == ("bad 4", 4, 4)


def test_repeated_error_changes_the_request(tmp_path):
    with TeacherServer(lambda request, nth: say("bad")) as server:
        ask(server, [job(1, good)], tmp_path)
    assert len(server.counts) == len(server.requests) == 4


def test_truncated_reply_is_rejected_as_cut_off(tmp_path):
    def answer(request, nth):
        return say("good") if "shorter" in question(request) else say("good but hal", "length")

    with TeacherServer(answer) as server:
        results, _ = ask(server, [job(1)], tmp_path)
        assert (results[0].text, results[0].requests) == ("good", 2)
        results, _ = ask(server, [job(2)], tmp_path, repairs=0)
    assert (results[0].rejection.reason, results[0].raw) == ("cut_off", "good but hal")


def test_network_errors_are_retried(tmp_path):
    kinds = [fail(429, retry_after="0"), fail(500), fail(503), HTML, BROKEN, say("late", seconds=1.5)]

    def answer(request, nth):
        return kinds[int(question(request).split()[1][:-1]) % len(kinds)] if nth == 1 else say("good")

    with TeacherServer(answer) as server:
        results, totals = ask(server, [job(i, good) for i in range(12)], tmp_path, timeout_seconds=1)
    assert [r.text for r in results] == ["good"] * 12
    assert {r.requests for r in results} == {1}
    assert len(server.requests) == 24
    assert totals["requests"] == 12


def test_litellm_does_not_retry_on_its_own(tmp_path):
    def answer(request, nth):
        return fail(500) if "2." in question(request) else say("good")

    with TeacherServer(answer) as server:
        results, _ = ask(server, [job(1), job(2)], tmp_path, attempts_per_call=2)
    assert results[1].rejection.reason == "no_reply"
    assert len(server.requests) == 3


def test_client_waits_for_retry_after(tmp_path):
    times = []

    def answer(request, nth):
        times.append(time.monotonic())
        return fail(429, retry_after="1") if nth == 1 else say("good")

    with TeacherServer(answer) as server:
        ask(server, [job(1)], tmp_path)
    assert times[1] - times[0] >= 1.0


def test_waiting_job_does_not_block_the_others(tmp_path):
    order = []

    def answer(request, nth):
        order.append(question(request))
        return fail(429, retry_after="1") if nth == 1 and "question 0." in question(request) else say("good")

    with TeacherServer(answer) as server:
        ask(server, [job(i) for i in range(4)], tmp_path, concurrency=1)
    assert order == ["question 0.", "question 1.", "question 2.", "question 3.", "question 0."]


def test_concurrency_is_never_exceeded_and_slots_are_refilled_at_once(tmp_path):
    others = threading.Semaphore(0)

    def answer(request, nth):
        if "question 0." in question(request):  # the slowest: while it runs, 20 others are answered
            return say("good" if all(others.acquire(timeout=10) for _ in range(20)) else "alone")
        others.release()
        return say("good", seconds=0.02)

    with TeacherServer(answer) as server:
        results, _ = ask(server, [job(i, good) for i in range(40)], tmp_path, concurrency=4, repairs=0)
    assert server.most_in_flight == 4
    assert {r.text for r in results} == {"good"}


def test_jobs_are_taken_only_when_there_is_room(tmp_path):
    taken = []

    def jobs():
        for i in range(50):
            taken.append(i)
            yield job(i)

    with TeacherServer(lambda request, nth: say("good")) as server, Ledger(tmp_path / "l") as ledger:
        settings = config.Teacher(model="openai/replay", api_base=server.url, concurrency=3)
        with Teacher(settings, ledger) as teacher:
            results = teacher.ask_all(jobs())
            next(results)
            assert len(taken) == 6
            next(results)
            assert len(taken) == 7


def test_leaving_early_cancels_calls_and_the_teacher_stays_usable(tmp_path):
    released, finished = threading.Event(), []

    def answer(request, nth):
        if "question 1." in question(request):
            released.wait(10)
            finished.append(1)
        return say("good")

    with TeacherServer(answer) as server, Ledger(tmp_path / "l") as ledger:
        settings = config.Teacher(model="openai/replay", api_base=server.url, concurrency=1)
        with Teacher(settings, ledger) as teacher:
            results = teacher.ask_all(map(job, range(3)))
            next(results)
            results.close()
            assert next(teacher.ask_all([job(7)])).text == "good"
            assert not finished
        released.set()


def test_bad_key_stops_at_once_and_is_not_shown(tmp_path):
    with TeacherServer(
        lambda request, nth: fail(401, "Incorrect API key provided: sk-test-secret")
    ) as server:
        with pytest.raises(TeacherError) as caught:
            ask(server, map(job, range(10**6)), tmp_path)
        assert len(server.requests) <= 32
    error = caught.value
    assert error.code == 6
    assert "openai/replay" in error.message
    assert server.url in error.message
    assert "OPENAI_API_KEY" in error.hint
    assert "\n" not in error.message
    assert "secret" not in error.message + error.hint


def test_no_key_is_needed_if_the_endpoint_wants_none(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with TeacherServer(lambda request, nth: say("good")) as server:
        results, _ = ask(server, [job(1)], tmp_path)
    assert results[0].text == "good"
    assert server.keys == {"Bearer none"}


def test_missing_key_is_reported_at_once(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(TeacherError, match=r"gpt-4\.1 has no key") as caught:
        ask(None, [job(1)], tmp_path, model="openai/gpt-4.1")
    assert "OPENAI_API_KEY" in caught.value.hint


def test_unknown_model_stops_everything(tmp_path):
    answer = fail(404, "The model `replay` does not exist")
    with TeacherServer(lambda *_: answer) as server, pytest.raises(TeacherError, match="does not exist"):
        ask(server, map(job, range(10**6)), tmp_path)
    assert len(server.requests) <= 32


def test_model_without_provider_is_reported_before_any_call(tmp_path):
    with TeacherServer(lambda request, nth: say("good")) as server:
        with pytest.raises(UsageError, match="no provider"):
            ask(server, [job(1)], tmp_path, model="something")
        with pytest.raises(UsageError, match=r"teacher\.model is not set"):
            ask(server, [job(1)], tmp_path, model="")
    assert not server.requests


def test_missing_server_stops_everything_after_the_retries(tmp_path):
    with pytest.raises(TeacherError, match="does not answer after 3 attempts") as caught:
        ask(None, map(job, range(10**6)), tmp_path, "http://127.0.0.1:9/v1", attempts_per_call=3)
    assert "http://127.0.0.1:9/v1" in caught.value.message


def test_refused_request_is_skipped_and_the_others_continue(tmp_path):
    def answer(request, nth):
        return (
            fail(404, "no known question in this request")
            if int(question(request).split()[1][:-1]) % 2
            else say("good")
        )

    with TeacherServer(answer) as server:
        results, _ = ask(server, [job(i) for i in range(20)], tmp_path)
        alone, _ = ask(server, [job(21)], tmp_path)
    assert [r.text for r in results] == ["good", None] * 10
    assert results[1].rejection == Rejection("refused_by_teacher", "no known question in this request")
    assert alone[0].rejection.reason == "refused_by_teacher"
    assert len(server.requests) == 21


def test_teacher_that_refuses_everything_stops_the_stage(tmp_path):
    with TeacherServer(lambda request, nth: fail(400, "max_tokens is too large")) as server:
        with pytest.raises(TeacherError, match="max_tokens is too large"):
            ask(server, map(job, range(10**6)), tmp_path)
        assert len(server.requests) <= 48
        with pytest.raises(TeacherError, match="max_tokens is too large"):
            ask(server, map(job, range(6)), tmp_path)


def test_teacher_that_stops_answering_is_given_up_and_replies_are_kept(tmp_path):
    def answer(request, nth):
        return say("good") if int(question(request).split()[1][:-1]) < 10 else BROKEN

    with TeacherServer(answer) as server:
        with pytest.raises(TeacherError, match="does not answer"):
            ask(server, [job(i) for i in range(10**4)], tmp_path, attempts_per_call=2, concurrency=4)
        assert len(server.requests) < 60
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        assert ledger.totals()["requests"] == 10


def test_exceptions_in_a_check_or_the_jobs_reach_the_caller(tmp_path):
    def broken(reply):
        raise ZeroDivisionError

    def jobs():
        yield job(1)
        raise LookupError

    with TeacherServer(lambda request, nth: say("good")) as server:
        with pytest.raises(ZeroDivisionError):
            ask(server, [job(1, broken)], tmp_path)
        with pytest.raises(LookupError):
            ask(server, jobs(), tmp_path)


def test_price_comes_from_the_list_or_is_unknown(tmp_path, monkeypatch):
    import litellm

    with TeacherServer(lambda request, nth: say("good", tokens=(10, 5))) as server:
        monkeypatch.setattr("sclite.teacher.provider.is_local", lambda api_base: False)
        _, priced = ask(server, [job(1)], tmp_path, model="openai/gpt-4.1")
        _, both = ask(server, [job(1)], tmp_path, model="openai/nobody-knows")
    rates = litellm.model_cost["gpt-4.1"]
    assert priced["cost_usd"] == pytest.approx(
        10 * rates["input_cost_per_token"] + 5 * rates["output_cost_per_token"]
    )
    assert (both["requests"], both["unpriced"], both["cost_usd"]) == (2, 1, priced["cost_usd"])
