"""Costs: prices, the spending limit, the pilot and the preview."""

from contextlib import suppress

import pytest

from sclite.errors import BudgetError, DeclinedError, TeacherError, UsageError
from sclite.settings import load
from sclite.teacher.client import PILOT, Job
from sclite.teacher.ledger import Ledger
from tests.replay import BROKEN, Answer, TeacherServer, job, say

PRICE = {"price": (1.0, 10.0)}
RESERVED = (100 * 10 + 16 + len("question 1.")) / 1e6  # for job 1: max_tokens, and one token per byte sent


def cheap(request, nth):
    return say("good", tokens=(10, 10))  # $0.00011


def test_limit_is_never_exceeded_and_calls_in_flight_are_completed(teacher_of, ask, ledger):
    results = []
    with TeacherServer(cheap) as server:
        with teacher_of(server, **PRICE, max_cost=0.01) as teacher, pytest.raises(BudgetError) as caught:
            results.extend(teacher.ask_all(map(job, range(500)), "templates"))
        totals, first = ledger.totals(), len(server.requests)
        assert totals["cost_usd"] == pytest.approx(0.00011 * first)
        assert 0.0085 < totals["cost_usd"] <= 0.01
        assert (len(results), totals["given_up"]) == (first, 0)
        assert caught.value.code == 4
        assert "limit of $0.0100 is reached" in caught.value.message
        assert "--set teacher.max_cost=" in caught.value.hint
        # 32 jobs may wait at once, so any of the first `first + 32` may have had its reply before the limit
        assert len(ask(server, map(job, range(first + 40)), **PRICE, max_cost=1)) == first + 40
        assert len(server.requests) == first + 40


def test_limit_needs_a_price_of_at_least_0(ask):
    for price in ("[-1000, 2]", "[1, -0.1]", "[nan, 1]", "[inf, 1]"):
        for section in ("teacher", "attempts"):
            with pytest.raises(UsageError, match=f"{section}.price"):
                load(None, [f"{section}.price={price}"], {}, own_file=False)
    with pytest.raises(UsageError, match="is unknown") as caught:
        ask("http://teacher.example/v1", [job(1)], max_cost=1)
    assert "teacher.price" in caught.value.hint


def test_lost_reply_costs_its_maximum_and_a_long_one_its_tokens(asked, ledger):
    settings = {"timeout_seconds": 0.2, "attempts_per_call": 1, "max_cost": 1, "repairs": 0}
    with pytest.raises(TeacherError, match="does not answer after 1 attempt: "):
        asked(lambda request, nth: say("late", seconds=3), [job(1)], **PRICE, **settings)
    totals = ledger.totals()
    assert (totals["sent"], totals["given_up"], totals["requests"]) == (1, 1, 0)
    assert totals["lost_usd"] == pytest.approx(RESERVED)
    asked(lambda request, nth: say("word " * 500, tokens=(10, 500)), [job(1)], **PRICE)
    assert ledger.totals()["cost_usd"] == pytest.approx((10 * 1 + 500 * 10) / 1e6)


@pytest.mark.parametrize("direct", [True, False])
def test_broken_connection_costs_the_reserve_and_a_refused_one_nothing(ask, ledger, direct):
    with TeacherServer(lambda request, nth: BROKEN) as server:
        for address in (server.url, "http://127.0.0.1:9/v1"):
            with pytest.raises(TeacherError, match="does not answer"):
                ask(address, [job(1)], **PRICE, direct=direct, attempts_per_call=1)
            assert ledger.totals()["lost_usd"] == pytest.approx(RESERVED)
    assert ledger.spent_usd == pytest.approx(RESERVED)


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize(
    "counts", [None, (0, 0), (-11, 7), ("11", "7"), (11, INF), (NAN, 7), (11, True), (2**64, 7)]
)
def test_implausible_counts_cost_what_was_reserved(asked, ledger, counts, direct):
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    usage = counts and dict(zip(names, (*counts, 18), strict=True))
    answer = Answer(body={**say("good").body, "usage": usage})
    with suppress(*([] if direct else [TeacherError])):  # LiteLLM raises for some of them
        results, _ = asked(lambda request, nth: answer, [job(1)], **PRICE, direct=direct, attempts_per_call=1)
        assert results[0].text == "good" or not direct
    totals = ledger.totals()
    if direct or not counts or counts[1] not in (True, "7"):  # which pydantic converts to 1 and 7
        assert totals["cost_usd"] + totals["lost_usd"] == pytest.approx(RESERVED)


def test_empty_reply_is_paid_for_and_requested_again_by_the_next_run(ask, ledger):
    with TeacherServer(lambda request, nth: say("" if nth == 1 else "good")) as server:
        assert [ask(server, [job(1)], **PRICE, repairs=0)[0].text for _ in range(2)] == [None, "good"]
    assert len(server.requests) == 2
    with Ledger(ledger.path) as again:  # the limit of the next run counts both too
        totals, both = again.totals(), pytest.approx(2 * (11 * 1 + 7 * 10) / 1e6)
        assert totals["cost_usd"] + totals["lost_usd"] == again.spent_usd == ledger.spent_usd == both


def test_price_comes_from_the_list_or_is_unknown(ask, ledger, monkeypatch):
    import litellm

    with TeacherServer(lambda request, nth: say("good", tokens=(10, 5))) as server:
        for model in ("gpt-4.1", "deepseek-chat", "nobody-knows"):  # OpenAI's, another provider's, nobody's
            assert ask(server.remote_url, [job(1)], model=f"openai/{model}")[0].text == "good"
    totals, rates = ledger.totals(), [litellm.model_cost[name] for name in ("gpt-4.1", "deepseek-chat")]
    expected = sum(10 * each["input_cost_per_token"] + 5 * each["output_cost_per_token"] for each in rates)
    assert totals["cost_usd"] == pytest.approx(expected)
    assert (totals["requests"], totals["unpriced"]) == (3, 1)

    def failing(*_, **__):
        raise RuntimeError

    monkeypatch.setattr(litellm, "completion_cost", failing)  # loses no reply
    with TeacherServer(cheap) as server:
        assert ask(server.remote_url, [job(2)], model="openai/gpt-4.1")[0].text == "good"


@pytest.mark.parametrize("text", ["3141592653", r"\frac{1}{2}^{\alpha}", "数学", "plain words"])
def test_no_tokenizer_exceeds_the_bound_on_prompt_tokens(asked, ledger, text):
    """A byte-level vocabulary without merges has one token per byte; a lost reply costs the bound."""
    long = Job("1", lambda error: [{"role": "user", "content": text}], lambda reply: None)
    with pytest.raises(TeacherError):
        asked(lambda request, nth: BROKEN, [long], price=(1.0, 0.0), attempts_per_call=1)
    assert ledger.totals()["lost_usd"] * 1e6 == pytest.approx(16 + len(text.encode()))


def test_rest_is_requested_only_if_the_forecast_is_confirmed(teacher_of):
    seen, jobs = [], [job(i) for i in range(30)]
    with TeacherServer(cheap) as server, teacher_of(server, **PRICE) as teacher:
        teacher.confirm = lambda *forecast: seen.append(forecast)
        with pytest.raises(DeclinedError, match=f"stopped after {PILOT} of 30 rows"):
            list(teacher.ask_after_pilot(jobs, 30, "templates"))
        assert len(server.requests) == PILOT
        left = 30 - PILOT
        assert seen == [(PILOT, pytest.approx(0.00011 * PILOT), left, pytest.approx(0.00011 * left))]
        teacher.confirm = lambda *forecast: True
        assert len(list(teacher.ask_after_pilot(jobs, 30, "templates"))) == len(server.requests) == 30


def test_forecast_after_an_interruption_counts_the_rows_that_are_not_paid_for(teacher_of):
    """Of 200 rows, every fourth is new; the pilot requests eight of these, and 42 more follow."""
    seen, jobs = [], [job(i) for i in range(200)]
    with TeacherServer(cheap) as server, teacher_of(server, **PRICE) as teacher:
        list(teacher.ask_all([each for i, each in enumerate(jobs) if i % 4], "corrections"))
        teacher.confirm = lambda *forecast: seen.append(forecast)
        with pytest.raises(DeclinedError, match="stopped after 8 of 200 rows"):
            list(teacher.ask_after_pilot(jobs, 200, "corrections"))
        assert len(server.requests) == 150 + 8
        assert seen == [(8, pytest.approx(8 * 0.00011), 42, pytest.approx(42 * 0.00011))]
        teacher.confirm = lambda *forecast: True
        results = teacher.ask_after_pilot(jobs, 200, "corrections")
        assert sorted(int(result.id) for result in results) == list(range(200))


def test_no_question_if_all_is_free_or_in_the_ledger(teacher_of):
    def confirm(*forecast):
        raise AssertionError

    with TeacherServer(cheap) as server:
        for settings in ({}, PRICE):
            with teacher_of(server, **settings) as teacher:
                teacher.confirm = confirm
                assert len(list(teacher.ask_after_pilot(map(job, range(30)), 30, ""))) == 30
    assert len(server.requests) == 30


def test_preview_sends_nothing_and_shows_the_exact_first_request(teacher_of):
    with TeacherServer(cheap) as server, teacher_of(server, **PRICE) as teacher:
        found = teacher.preview(map(job, range(10)), 50, "templates")
        assert not server.requests
        list(teacher.ask_all([job(0)], "templates"))
        for name in ("messages", "max_tokens"):
            assert server.requests[0][name] == found["first_request"][name]
        assert (found["requests"], found["completion_tokens"]) == (10, 500)
        after = teacher.preview(map(job, range(10)), 50, "templates")
        assert (after["requests"], after["completion_tokens"]) == (9, 90)  # ten tokens per reply, as measured
