"""A student behind a real HTTP endpoint: what is sent, what comes back, what a re-run costs."""

import pytest

from sclite import config
from sclite.errors import TeacherError, UsageError
from sclite.student.base import Request, ScoreRequest
from sclite.student.endpoint import Endpoint
from sclite.teacher.client import Teacher
from sclite.teacher.ledger import Ledger
from tests.replay import BROKEN, TeacherServer, fail, say

TRACE = "<Step1>1 + 1 = 2\n</Step1>\n<Answer>2</Answer>"


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-123456")


def request(text, **settings):
    messages = ({"role": "system", "content": "Solve."}, {"role": "user", "content": text})
    return Request(messages, **{"temperature": 0.8, "top_p": 0.95, "seed": 3, "max_tokens": 77, **settings})


def ask(run, url, requests, concurrency=8):
    """The replies in the order of their requests."""
    made = config.Teacher(
        model="openai/small", api_base=url, repairs=0, attempts_per_call=1, concurrency=concurrency
    )
    with Ledger(run.path("ledger.sqlite")) as ledger, Teacher(made, ledger) as client:
        return sorted(Endpoint(client, "attempts").generate(requests), key=lambda reply: reply.index)


def test_replies_match_their_requests(run):
    def answer(body, nth):
        number = int(body["messages"][-1]["content"])
        return say(f"I am {number}", seconds=0.02 * (number % 3), tokens=(10 + number, number))

    with TeacherServer(answer) as server:
        replies = ask(run, server.url, [request(str(n)) for n in range(1, 13)])
    assert [(r.index + 1, r.text, r.finish, r.error, r.prompt_tokens, r.tokens) for r in replies] == [
        (n, f"I am {n}", "stop", None, 10 + n, n) for n in range(1, 13)
    ]


def test_request_parameters_are_sent(run):
    with TeacherServer(lambda body, nth: say(TRACE)) as server:
        ask(run, server.url, [request("1?"), request("2?", temperature=0.0, top_p=1.0, stop=("</Step",))])
    first, second = sorted(server.requests, key=lambda body: body["messages"][-1]["content"])
    assert [m["content"] for m in first["messages"]] == ["Solve.", "1?"]
    sent = {name: value for name, value in first.items() if name not in ("messages", "model")}
    assert sent == {"temperature": 0.8, "top_p": 0.95, "max_tokens": 77, "seed": 3}
    assert second["temperature"] == 0.0
    assert not {"top_p", "stop"} & set(second)


@pytest.mark.parametrize(
    ("reply", "stop", "text", "finish", "error"),
    [
        (say("<Step1>and so", "length"), (), "<Step1>and so", "length", None),
        (say("a</Correction> and more", "length"), ("</Correction>",), "a</Correction>", "stop", None),
        (fail(400, "too long for me"), (), "", "error", "too long for me"),
        (say("no", "content_filter"), (), "", "error", "filtered: "),
        (BROKEN, (), "", "error", "no_reply: "),
    ],
)
def test_odd_reply_affects_no_other_and_is_not_repaired(run, reply, stop, text, finish, error):
    with TeacherServer(
        lambda body, nth: reply if body["messages"][-1]["content"] == "odd" else say("a")
    ) as server:
        good, odd = ask(run, server.url, [request("good"), request("odd", stop=stop)], concurrency=1)
        assert len(server.requests) == 2
    assert (good.text, good.finish) == ("a", "stop")
    assert (odd.text, odd.finish) == (text, finish)
    assert odd.error is None if error is None else error in odd.error


def test_endpoint_neither_continues_nor_scores(run):
    with TeacherServer(lambda body, nth: say(TRACE)) as server:
        with pytest.raises(UsageError, match="openai/small is an endpoint") as error:
            ask(run, server.url, [request("1?"), request("2?", pieces=("<Step1>x\n",))])
        assert server.requests == []
    assert "free review" in error.value.hint
    with Ledger(run.path("ledger.sqlite")) as ledger:
        student = Endpoint(Teacher(config.Teacher(model="openai/small"), ledger), "pairs")
        with pytest.raises(NotImplementedError):
            student.score([ScoreRequest((), ("x",), (0,), (("a", "b"),))])


def test_rerun_costs_nothing_and_other_sampling_is_another_sample(run):
    requests = [request("1?", seed=seed) for seed in (1, 2, 3)]
    with TeacherServer(lambda body, nth: say(f"said {nth}")) as server:
        first = ask(run, server.url, requests)
        assert len({reply.text for reply in first}) == 3
        assert ask(run, server.url, requests) == first
        assert len(server.requests) == 3
        for asked, changed in enumerate(({"seed": 4}, {"temperature": 0.7}, {"max_tokens": 78}), 4):
            ask(run, server.url, [*requests, request("1?", **{"seed": 1, **changed})])
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
