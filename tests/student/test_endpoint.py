"""A student behind a real HTTP endpoint: what is sent, what comes back, what a re-run costs."""

import pytest

from sclite import config
from sclite.errors import TeacherError, UsageError
from sclite.student.base import Request, ScoreRequest
from sclite.student.endpoint import Endpoint
from sclite.teacher.client import Teacher
from sclite.teacher.ledger import Ledger
from tests.replay import Answer, TeacherServer, fail, say

TRACE = "<Step1>1 + 1 = 2\n</Step1>\n<Answer>2</Answer>"


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-123456")


def request(text, **settings):
    messages = ({"role": "system", "content": "Solve."}, {"role": "user", "content": text})
    return Request(messages, **{"temperature": 0.8, "top_p": 0.95, "seed": 3, "max_tokens": 77, **settings})


def ask(run, url, requests, **settings):
    """The replies in the order of their requests, and the ledger's totals."""
    own = {"model": "openai/small", "api_base": url, "repairs": 0, "attempts_per_call": 1, "concurrency": 8}
    made = config.Teacher.model_validate(own | settings)
    with Ledger(run.path("ledger.sqlite")) as ledger, Teacher(made, ledger) as client:
        replies = sorted(Endpoint(client, "attempts").generate(requests), key=lambda reply: reply.index)
        return replies, ledger.totals("attempts")


def test_replies_match_their_requests(run):
    def answer(body, nth):
        number = int(body["messages"][-1]["content"])
        return say(f"I am {number}", seconds=0.02 * (number % 3), tokens=(10 + number, number))

    with TeacherServer(answer) as server:
        replies, totals = ask(run, server.url, [request(str(n)) for n in range(12)])
    assert [(r.index, r.text, r.finish, r.error) for r in replies] == [
        (n, f"I am {n}", "stop", None) for n in range(12)
    ]
    assert [(r.prompt_tokens, r.tokens) for r in replies[1:]] == [(10 + n, n) for n in range(1, 12)]
    assert totals["requests"] == 12


def test_request_parameters_are_sent(run):
    with TeacherServer(lambda body, nth: say(TRACE)) as server:
        ask(run, server.url, [request("1?"), request("2?", temperature=0.0, top_p=1.0, stop=("</Step",))])
    first, second = sorted(server.requests, key=lambda body: body["messages"][-1]["content"])
    assert [m["content"] for m in first["messages"]] == ["Solve.", "1?"]
    sent = {name: value for name, value in first.items() if name not in ("messages", "model")}
    assert sent == {"temperature": 0.8, "top_p": 0.95, "max_tokens": 77, "seed": 3}
    assert second["temperature"] == 0.0
    assert not {"top_p", "stop"} & set(second)


def test_many_requests_are_in_flight(run):
    with TeacherServer(lambda body, nth: say(TRACE, seconds=0.1)) as server:
        ask(run, server.url, [request(str(n)) for n in range(40)], concurrency=20)
    assert server.most_in_flight >= 15


def test_failed_call_gives_its_reason_and_affects_no_other(run):
    def answer(body, nth):
        return fail(400, "too long for me") if body["messages"][-1]["content"] == "2" else say(TRACE)

    with TeacherServer(answer) as server:
        replies, _ = ask(run, server.url, [request(str(n)) for n in range(4)])
    assert [r.finish for r in replies] == ["stop", "stop", "error", "stop"]
    assert "too long for me" in replies[2].error
    assert replies[2].text == ""


def test_lost_connection_and_content_filter_are_errors(run):
    def answer(body, nth):
        asked = body["messages"][-1]["content"]
        return {"lost": Answer(broken=True, body={}), "bad": say("no", "content_filter")}.get(asked, say("a"))

    with TeacherServer(answer) as server:
        replies, _ = ask(run, server.url, [request("good"), request("bad"), request("lost")], concurrency=1)
    assert [r.finish for r in replies] == ["stop", "error", "error"]
    assert replies[1].error.startswith("filtered: ")
    assert replies[2].error.startswith("no_reply: ")


def test_truncated_reply_keeps_its_text(run):
    with TeacherServer(lambda body, nth: say("<Step1>and so", "length")) as server:
        (reply,), _ = ask(run, server.url, [request("1?")])
        assert (reply.text, reply.finish, reply.error) == ("<Step1>and so", "length", None)
        assert len(server.requests) == 1  # no repair is requested: this is the student's reply


def test_reply_ends_with_the_matched_stop_string(run):
    with TeacherServer(lambda body, nth: say("a</Correction> and more", "length")) as server:
        (reply,), _ = ask(run, server.url, [request("1?", stop=("</Correction>",))])
    assert (reply.text, reply.finish) == ("a</Correction>", "stop")


def test_request_with_pieces_is_rejected_before_any_call(run):
    with TeacherServer(lambda body, nth: say(TRACE)) as server:
        with pytest.raises(UsageError, match="openai/small is an endpoint") as error:
            ask(run, server.url, [request("1?"), request("2?", pieces=("<Step1>x\n",))])
        assert server.requests == []
    assert "free review" in error.value.hint


def test_endpoint_cannot_score(run):
    with (
        Ledger(run.path("ledger.sqlite")) as ledger,
        Teacher(config.Teacher(model="openai/small"), ledger) as c,
        pytest.raises(NotImplementedError),
    ):
        Endpoint(c, "pairs").score([ScoreRequest((), ("x",), (0,), (("a", "b"),))])


def test_rerun_costs_nothing_and_a_new_seed_is_a_new_sample(run):
    requests = [request("1?", seed=seed) for seed in (1, 2, 3)]
    with TeacherServer(lambda body, nth: say(f"said {nth}")) as server:
        first, _ = ask(run, server.url, requests)
        again, _ = ask(run, server.url, requests)
        assert len(server.requests) == 3
        ask(run, server.url, [*requests, request("1?", seed=4)])
        assert len(server.requests) == 4
    assert [r.text for r in again] == [r.text for r in first]
    assert [(r.tokens, r.prompt_tokens) for r in again] == [(7, 11)] * 3
    assert len({r.text for r in first}) == 3


@pytest.mark.parametrize(("temperature", "max_tokens", "asked"), [(0.8, 77, 1), (0.7, 77, 2), (0.8, 78, 2)])
def test_changed_sampling_parameters_are_requested_again(run, temperature, max_tokens, asked):
    with TeacherServer(lambda body, nth: say(TRACE)) as server:
        ask(run, server.url, [request("1?")])
        ask(run, server.url, [request("1?", temperature=temperature, max_tokens=max_tokens)])
        assert len(server.requests) == asked


def test_endpoint_error_names_the_student_and_never_the_key(run):
    with TeacherServer(lambda body, nth: fail(401, "bad key sk-secret-123456")) as server:
        with pytest.raises(TeacherError) as error:
            ask(run, server.url, [request("1?")])
        said = f"{error.value.message} {error.value.hint}"
        assert f"student openai/small at {server.url} rejects the key" in said
    assert "sk-secret" not in said
    with pytest.raises(TeacherError) as error:
        ask(run, "http://127.0.0.1:9/v1", [request("1?")])
    assert "attempts.api_base" in error.value.hint
    assert "teacher" not in f"{error.value.message} {error.value.hint}"
