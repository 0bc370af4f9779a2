"""Money: a limit that is never passed, a pilot that is measured, a forecast that asks nothing, an inspector."""

import pytest

from sclite import config
from sclite.errors import BudgetFault, UsageFault
from sclite.teacher.client import Flaw, Job, Teacher
from sclite.teacher.failures import silent
from sclite.teacher.forecast import PILOT, ask_after_pilot, reckon
from sclite.teacher.ledger import Ledger
from sclite.teacher.money import dollars
from tests.replay import Teaching, fail, say


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-secret")


def job(number, inspect=None):
    return Job(
        str(number), lambda fault: [{"role": "user", "content": f"q{number} {fault}"}], lambda _: None,
        inspect=inspect,
    )  # fmt: skip


def teacher_of(ledger, server, **settings):
    chosen = {"model": "openai/replay", "api_base": server.url, "max_tokens": 100, "price": (1.0, 10.0)}
    return Teacher(config.Teacher(**{**chosen, **settings}), ledger)


def cheap(request, nth):
    return say("good", tokens=(10, 10))  # $0.00011


def test_the_limit_is_never_passed_and_what_was_under_way_is_given(tmp_path):
    results = []
    with Teaching(cheap) as server, Ledger(tmp_path / "l") as ledger:
        with teacher_of(ledger, server, max_cost=0.01) as teacher, pytest.raises(BudgetFault) as caught:
            results.extend(teacher.ask_all(map(job, range(500)), "templates"))
        spent = ledger.totals()["cost_usd"]
        assert spent == pytest.approx(0.00011 * len(server.requests))
        assert 0.0085 < spent <= 0.01
        assert len(results) == len(server.requests)
        assert ledger.totals()["given_up"] == 0
    assert caught.value.code == 4
    assert "--max-cost" in caught.value.hint


def test_a_higher_limit_goes_on_where_it_stopped(tmp_path):
    with Teaching(cheap) as server, Ledger(tmp_path / "l") as ledger:
        with teacher_of(ledger, server, max_cost=0.002) as teacher, pytest.raises(BudgetFault):
            list(teacher.ask_all(map(job, range(20))))
        asked = len(server.requests)
        assert 0 < asked < 20
        with teacher_of(ledger, server, max_cost=1) as teacher:
            assert len(list(teacher.ask_all(map(job, range(20))))) == 20
        assert len(server.requests) == 20


def test_a_reply_that_never_came_counts_at_its_dearest(tmp_path):
    def slow(request, nth):
        return say("late", seconds=3)

    with Teaching(slow) as server, Ledger(tmp_path / "l") as ledger:
        settings = {"timeout_seconds": 0.2, "attempts_per_call": 1, "max_cost": 1, "repairs": 0}
        with (
            teacher_of(ledger, server, **settings) as teacher,
            pytest.raises(Exception, match="does not answer"),
        ):
            list(teacher.ask_all([job(1)]))
        totals = ledger.totals()
    assert (totals["sent"], totals["given_up"], totals["requests"]) == (1, 1, 0)
    assert totals["lost_usd"] == pytest.approx(100 * 10 / 1e6 + (16 + len("q1 ")) * 1 / 1e6)


def test_a_limit_without_a_price_is_refused_before_any_call(tmp_path):
    with Teaching(cheap) as server, Ledger(tmp_path / "l") as ledger:
        url = server.url.replace("127.0.0.1", "teacher.example")
        with (
            teacher_of(ledger, server, api_base=url, price=None, max_cost=1) as teacher,
            pytest.raises(UsageFault, match="nobody knows what") as caught,
        ):
            list(teacher.ask_all([job(1)]))
        assert "teacher.price" in caught.value.hint
        assert not server.requests


def test_the_rest_is_asked_for_only_if_the_forecast_is_agreed_to(tmp_path):
    seen = []

    def confirm(forecast):
        seen.append(forecast)
        return False

    with Teaching(cheap) as server, Ledger(tmp_path / "l") as ledger, teacher_of(ledger, server) as teacher:
        with pytest.raises(BudgetFault, match=f"stopped after {PILOT} of 30 rows"):
            list(ask_after_pilot(teacher, map(job, range(30)), 30, "templates", confirm))
        assert len(server.requests) == PILOT
        assert seen[0].rows_left == 30 - PILOT
        assert seen[0].cost_usd == pytest.approx(0.00011 * (30 - PILOT))
        done = list(ask_after_pilot(teacher, map(job, range(30)), 30, "templates", lambda _: True))
        assert len(done) == len(server.requests) == 30


def test_nobody_is_asked_where_all_is_known_or_free(tmp_path):
    def confirm(forecast):
        raise AssertionError

    with Teaching(cheap) as server, Ledger(tmp_path / "l") as ledger:
        with teacher_of(ledger, server, price=None) as teacher:
            assert len(list(ask_after_pilot(teacher, map(job, range(30)), 30, "", confirm))) == 30
        with teacher_of(ledger, server) as teacher:
            assert len(list(ask_after_pilot(teacher, map(job, range(30)), 30, "", confirm))) == 30
        assert len(server.requests) == 30


def test_a_forecast_sends_nothing_and_says_the_first_request_exactly(tmp_path):
    with Teaching(cheap) as server, Ledger(tmp_path / "l") as ledger, teacher_of(ledger, server) as teacher:
        found = reckon(teacher, map(job, range(10)), 50, "templates")
        assert not server.requests
        list(teacher.ask_all([job(0)], "templates"))
        sent = server.requests[0]
        assert {k: sent[k] for k in ("messages", "max_tokens")} == {
            k: found["first_request"][k] for k in ("messages", "max_tokens")
        }
        assert (found["requests"], found["completion_tokens"]) == (10, 500)
        after = reckon(teacher, map(job, range(10)), 50, "templates")
        assert (after["requests"], after["completion_tokens"]) == (9, 90)  # ten tokens a reply, as it was


def test_a_refusal_is_remembered_once_others_were_answered(tmp_path):
    def answer(request, nth):
        return fail(400, "not this one") if "q1 " in request["messages"][0]["content"] else say("good")

    with Teaching(answer) as server, Ledger(tmp_path / "l") as ledger:
        for _ in range(2):
            with teacher_of(ledger, server) as teacher:
                list(teacher.ask_all([job(0)]))
                (refused,) = teacher.ask_all([job(1)])
            assert refused.flaw == Flaw("refused_by_teacher", "not this one")
        assert len(server.requests) == 2


# -- the inspector -------------------------------------------------------------------------------------------------


def inspect(reply):
    return [{"role": "user", "content": f"INSPECT {reply}"}]


def test_what_the_inspector_rejects_is_asked_again_with_its_reason(tmp_path):
    def answer(request, nth):
        asked = request["messages"][0]["content"]
        if request["model"] == "judge":
            verdict = "accept" if "better" in asked else "reject</Verdict><Reason>step 2 is wrong"
            return say(f"<Verdict>{verdict}</Reason>")
        return say("better" if "step 2 is wrong" in asked else "worse")

    with Teaching(answer) as server, Ledger(tmp_path / "l") as ledger:
        named = {"inspector": "openai/judge", "inspector_api_base": server.url}
        with teacher_of(ledger, server, **named) as teacher:
            (result,) = teacher.ask_all([job(1, inspect)], "templates")
        assert (result.text, result.requests) == ("better", 2)
        assert ledger.totals("templates inspection")["requests"] == 2


def test_an_inspector_that_never_accepts_ends_the_job_after_three_rounds(tmp_path):
    def answer(request, nth):
        judging = request["model"] == "judge"
        return say("<Verdict>reject</Verdict>" if judging else f"try {len(server.requests)}")

    with Teaching(answer) as server, Ledger(tmp_path / "l") as ledger:
        named = {"inspector": "openai/judge", "inspector_api_base": server.url}
        with teacher_of(ledger, server, **named) as teacher:
            (result,) = teacher.ask_all([job(1, inspect)])
    assert result.flaw.reason == "rejected_by_inspector"
    assert result.requests == 4


@pytest.mark.parametrize(
    ("amount", "told"),
    [(0, "$0.0000"), (12.5, "$12.5000"), (0.0473, "$0.0473"), (0.00123, "$0.0012"), (1e-5, "$0.000010")],
)
def test_a_small_sum_is_told_without_an_exponent(amount, told):
    assert dollars(amount) == told


@pytest.mark.parametrize(("tries", "told"), [(1, "after 1 try: gone"), (6, "after 6 tries: gone")])
def test_one_try_is_not_several(tries, told):
    assert told in silent(ConnectionError("gone"), "m", "", tries).message
