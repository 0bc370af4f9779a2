"""Costs: the spending limit, the pilot, the forecast; and the inspector."""

from contextlib import suppress

import pytest

from sclite import config
from sclite.errors import BudgetError, TeacherError, UsageError
from sclite.settings import load
from sclite.teacher.client import PILOT, Job, Rejection, Teacher
from sclite.teacher.ledger import Ledger
from sclite.teacher.limits import max_prompt_tokens
from tests.replay import BROKEN, Answer, TeacherServer, fail, say


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-secret")


def job(number, inspect=None):
    return Job(
        str(number), lambda error: [{"role": "user", "content": f"q{number} {error}"}], lambda _: None,
        inspect=inspect,
    )  # fmt: skip


def teacher_of(ledger, server, **settings):
    chosen = {"model": "openai/replay", "api_base": server.url, "max_tokens": 100, "price": (1.0, 10.0)}
    return Teacher(config.Teacher(**{**chosen, **settings}), ledger)


def cheap(request, nth):
    return say("good", tokens=(10, 10))  # $0.00011


def test_limit_is_never_exceeded_and_calls_in_flight_are_completed(tmp_path):
    results = []
    with TeacherServer(cheap) as server, Ledger(tmp_path / "l") as ledger:
        with teacher_of(ledger, server, max_cost=0.01) as teacher, pytest.raises(BudgetError) as caught:
            results.extend(teacher.ask_all(map(job, range(500)), "templates"))
        spent = ledger.totals()["cost_usd"]
        assert spent == pytest.approx(0.00011 * len(server.requests))
        assert 0.0085 < spent <= 0.01
        assert len(results) == len(server.requests)
        assert ledger.totals()["given_up"] == 0
    assert caught.value.code == 4
    assert "--max-cost" in caught.value.hint


def test_run_resumes_with_a_higher_limit(tmp_path):
    with TeacherServer(cheap) as server, Ledger(tmp_path / "l") as ledger:
        with teacher_of(ledger, server, max_cost=0.002) as teacher, pytest.raises(BudgetError):
            list(teacher.ask_all(map(job, range(20))))
        assert 0 < len(server.requests) < 20
        with teacher_of(ledger, server, max_cost=1) as teacher:
            assert len(list(teacher.ask_all(map(job, range(20))))) == 20
        assert len(server.requests) == 20


def test_lost_reply_counts_at_its_maximum_cost(tmp_path):
    def slow(request, nth):
        return say("late", seconds=3)

    with TeacherServer(slow) as server, Ledger(tmp_path / "l") as ledger:
        settings = {"timeout_seconds": 0.2, "attempts_per_call": 1, "max_cost": 1, "repairs": 0}
        with (
            teacher_of(ledger, server, **settings) as teacher,
            pytest.raises(Exception, match="does not answer"),
        ):
            list(teacher.ask_all([job(1)]))
        totals = ledger.totals()
    assert (totals["sent"], totals["given_up"], totals["requests"]) == (1, 1, 0)
    assert totals["lost_usd"] == pytest.approx(100 * 10 / 1e6 + (16 + len("q1 ")) * 1 / 1e6)


RESERVED = (100 * 10 + 16 + len("q1 ")) / 1e6  # US dollars for job 1: max_tokens, and one token per byte sent


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize(
    "usage",
    [
        None,
        {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
        {"prompt_tokens": -11, "completion_tokens": 7, "total_tokens": -4},
        {"prompt_tokens": "11", "completion_tokens": "7", "total_tokens": "18"},
        {"prompt_tokens": 11, "completion_tokens": float("inf"), "total_tokens": 18},
        {"prompt_tokens": float("nan"), "completion_tokens": 7, "total_tokens": 18},
        {"prompt_tokens": 11, "completion_tokens": True, "total_tokens": 12},
        {"prompt_tokens": 11, "completion_tokens": 101, "total_tokens": 112},
        {"prompt_tokens": 2**64, "completion_tokens": 7, "total_tokens": 2**64},
    ],
)
def test_implausible_counts_cost_what_was_reserved(tmp_path, usage, direct):
    answer = Answer(body={**say("good").body, "usage": usage})
    with TeacherServer(lambda request, nth: answer) as server, Ledger(tmp_path / "l") as ledger:
        with teacher_of(ledger, server, direct=direct, attempts_per_call=1) as teacher:
            if direct:
                assert [r.text for r in teacher.ask_all([job(1)])] == ["good"]
            else:
                with suppress(TeacherError):  # LiteLLM raises for some of them
                    list(teacher.ask_all([job(1)]))
        totals = ledger.totals()
    if (
        direct or not usage or usage["completion_tokens"] not in (True, "7")
    ):  # which pydantic converts to 1 and 7
        assert totals["cost_usd"] + totals["lost_usd"] == pytest.approx(RESERVED)


def test_reply_longer_than_max_tokens_costs_its_length(tmp_path):
    text = "word " * 500
    with (
        TeacherServer(lambda request, nth: say(text, tokens=(10, 500))) as server,
        Ledger(tmp_path / "l") as ledger,
    ):
        with teacher_of(ledger, server) as teacher:
            list(teacher.ask_all([job(1)]))
        assert ledger.totals()["cost_usd"] >= 500 * 10 / 1e6


@pytest.mark.parametrize("direct", [True, False])
def test_broken_connection_costs_the_reserve_and_a_refused_one_nothing(tmp_path, direct):
    with TeacherServer(lambda request, nth: BROKEN) as server, Ledger(tmp_path / "l") as ledger:
        for url in (server.url, "http://127.0.0.1:9/v1"):
            with (
                teacher_of(ledger, server, api_base=url, direct=direct, attempts_per_call=1) as teacher,
                pytest.raises(TeacherError, match="does not answer"),
            ):
                list(teacher.ask_all([job(1)]))
            assert ledger.totals()["lost_usd"] == pytest.approx(RESERVED)
        assert ledger.spent_usd == pytest.approx(RESERVED)


@pytest.mark.parametrize("price", ["[-1000, 2]", "[1, -0.1]", "[nan, 1]", "[inf, 1]"])
@pytest.mark.parametrize("section", ["teacher", "attempts"])
def test_negative_price_is_refused(section, price):
    with pytest.raises(UsageError, match=f"{section}.price"):
        load(None, [f"{section}.price={price}"], {}, own_file=False)


@pytest.mark.parametrize("text", ["3141592653", r"\frac{1}{2}^{\alpha}", "数学", "plain words", "\ud83d"])
def test_no_tokenizer_exceeds_the_bound_on_prompt_tokens(text):
    """A byte-level vocabulary without merges has one token per byte."""
    assert max_prompt_tokens([{"content": text}]) >= len(text.encode(errors="replace"))


def test_next_run_requests_an_empty_reply_again(tmp_path):
    with (
        TeacherServer(lambda request, nth: say("" if nth == 1 else "good")) as server,
        Ledger(tmp_path / "l") as ledger,
    ):
        for expected in (None, "good"):
            with teacher_of(ledger, server, repairs=0) as teacher:
                (result,) = teacher.ask_all([job(1)])
            assert result.text == expected
        assert len(server.requests) == 2
        assert ledger.spent_usd == pytest.approx(2 * (11 * 1 + 7 * 10) / 1e6)


def test_limit_without_a_price_is_refused_before_any_call(tmp_path):
    with TeacherServer(cheap) as server, Ledger(tmp_path / "l") as ledger:
        url = server.url.replace("127.0.0.1", "teacher.example")
        with (
            teacher_of(ledger, server, api_base=url, price=None, max_cost=1) as teacher,
            pytest.raises(UsageError, match="is unknown") as caught,
        ):
            list(teacher.ask_all([job(1)]))
        assert "teacher.price" in caught.value.hint
        assert not server.requests


def test_rest_is_requested_only_if_the_forecast_is_confirmed(tmp_path):
    seen = []

    def confirm(forecast):
        seen.append(forecast)
        return False

    with (
        TeacherServer(cheap) as server,
        Ledger(tmp_path / "l") as ledger,
        teacher_of(ledger, server) as teacher,
    ):
        with pytest.raises(BudgetError, match=f"stopped after {PILOT} of 30 rows"):
            list(teacher.ask_after_pilot(map(job, range(30)), 30, "templates", confirm))
        assert len(server.requests) == PILOT
        assert seen[0].rows_left == 30 - PILOT
        assert seen[0].cost_usd == pytest.approx(0.00011 * (30 - PILOT))
        done = list(teacher.ask_after_pilot(map(job, range(30)), 30, "templates", lambda _: True))
        assert len(done) == len(server.requests) == 30


def test_no_question_if_all_is_free_or_in_the_ledger(tmp_path):
    def confirm(forecast):
        raise AssertionError

    with TeacherServer(cheap) as server, Ledger(tmp_path / "l") as ledger:
        with teacher_of(ledger, server, price=None) as teacher:
            assert len(list(teacher.ask_after_pilot(map(job, range(30)), 30, "", confirm))) == 30
        with teacher_of(ledger, server) as teacher:
            assert len(list(teacher.ask_after_pilot(map(job, range(30)), 30, "", confirm))) == 30
        assert len(server.requests) == 30


def test_forecast_sends_nothing_and_shows_the_exact_first_request(tmp_path):
    with (
        TeacherServer(cheap) as server,
        Ledger(tmp_path / "l") as ledger,
        teacher_of(ledger, server) as teacher,
    ):
        found = teacher.preview(map(job, range(10)), 50, "templates")
        assert not server.requests
        list(teacher.ask_all([job(0)], "templates"))
        sent = server.requests[0]
        assert {k: sent[k] for k in ("messages", "max_tokens")} == {
            k: found["first_request"][k] for k in ("messages", "max_tokens")
        }
        assert (found["requests"], found["completion_tokens"]) == (10, 500)
        after = teacher.preview(map(job, range(10)), 50, "templates")
        assert (after["requests"], after["completion_tokens"]) == (9, 90)  # ten tokens per reply, as measured


def test_refusal_is_kept_once_others_were_answered(tmp_path):
    def answer(request, nth):
        return fail(400, "not this one") if "q1 " in request["messages"][0]["content"] else say("good")

    with TeacherServer(answer) as server, Ledger(tmp_path / "l") as ledger:
        for _ in range(2):
            with teacher_of(ledger, server) as teacher:
                list(teacher.ask_all([job(0)]))
                (refused,) = teacher.ask_all([job(1)])
            assert refused.rejection == Rejection("refused_by_teacher", "not this one")
        assert len(server.requests) == 2


# -- the inspector -------------------------------------------------------------------------------------------------


def inspect(reply):
    return [{"role": "user", "content": f"INSPECT {reply}"}]


def test_rejection_by_the_inspector_is_repaired_with_its_reason(tmp_path):
    def answer(request, nth):
        question = request["messages"][0]["content"]
        if request["model"] == "judge":
            verdict = "accept" if "better" in question else "reject</Verdict><Reason>step 2 is wrong"
            return say(f"<Verdict>{verdict}</Reason>")
        return say("better" if "step 2 is wrong" in question else "worse")

    with TeacherServer(answer) as server, Ledger(tmp_path / "l") as ledger:
        named = {"inspector": "openai/judge", "inspector_api_base": server.url}
        with teacher_of(ledger, server, **named) as teacher:
            (result,) = teacher.ask_all([job(1, inspect)], "templates")
        assert (result.text, result.requests) == ("better", 2)
        assert ledger.totals("templates inspection")["requests"] == 2


def test_job_fails_after_three_rejections_by_the_inspector(tmp_path):
    def answer(request, nth):
        judging = request["model"] == "judge"
        return say("<Verdict>reject</Verdict>" if judging else f"try {len(server.requests)}")

    with TeacherServer(answer) as server, Ledger(tmp_path / "l") as ledger:
        named = {"inspector": "openai/judge", "inspector_api_base": server.url}
        with teacher_of(ledger, server, **named) as teacher:
            (result,) = teacher.ask_all([job(1, inspect)])
    assert result.rejection.reason == "rejected_by_inspector"
    assert result.requests == 4
