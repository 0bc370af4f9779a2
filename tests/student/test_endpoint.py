"""A student behind a real HTTP endpoint: requests, replies, and the cost of a re-run."""

import threading
from contextlib import contextmanager
from dataclasses import replace

import pytest

from sclite import config
from sclite.errors import DeclinedError, TeacherError, UsageError
from sclite.student.base import Request, ScoreRequest
from sclite.student.endpoint import Endpoint
from sclite.teacher.client import Teacher
from sclite.teacher.ledger import Ledger
from tests.replay import BROKEN, TeacherServer, fail, say

TRACE = "<Step1>1 + 1 = 2\n</Step1>\n<Answer>2</Answer>"


def request(text, **settings):
    messages = ({"role": "system", "content": "Solve."}, {"role": "user", "content": text})
    return Request(messages, **{"temperature": 0.8, "top_p": 0.95, "seed": 3, "max_tokens": 77, **settings})


@contextmanager
def student(run, url, concurrency=8, attempts=1, version=0, **more):
    settings = {"repairs": 0, "attempts_per_call": attempts, "concurrency": concurrency}
    made = config.Teacher(**{"model": "openai/small", "api_base": url, **settings, **more})
    with Ledger(run.path("ledger.sqlite")) as ledger, Teacher(made, ledger) as client:
        yield Endpoint(client, "attempts", version=version)


def ask(run, url, requests, concurrency=8):
    """The replies in the order of their requests."""
    with student(run, url, concurrency) as endpoint:
        return sorted(endpoint.generate(requests), key=lambda reply: reply.index)


def test_replies_match_their_requests(run):
    def answer(body, nth):
        number = int(body["messages"][-1]["content"])
        return say(f"I am {number}", seconds=0.02 * (number % 3), tokens=(10 + number, number))

    with TeacherServer(answer) as server:
        replies = ask(run, server.url, [request(str(n)) for n in range(1, 13)])
    for n, reply in enumerate(replies, 1):
        assert (reply.index, reply.text, reply.finish, reply.error) == (n - 1, f"I am {n}", "stop", None)
        assert (reply.prompt_tokens, reply.tokens) == (10 + n, n)
    assert len(replies) == 12


def test_request_parameters_are_sent(run):
    with TeacherServer(lambda body, nth: say(TRACE)) as server:
        ask(run, server.url, [request("1?"), request("2?", temperature=0.0, top_p=1.0, stop=("</Step",))])
    first, second = sorted(server.requests, key=lambda body: body["messages"][-1]["content"])
    assert [m["content"] for m in first["messages"]] == ["Solve.", "1?"]
    sent = {name: value for name, value in first.items() if name not in ("messages", "model")}
    assert sent == {"temperature": 0.8, "top_p": 0.95, "max_tokens": 77, "seed": 3}
    assert second["temperature"] == 0.0
    assert not {"top_p", "stop"} & set(second)
    claude = TeacherServer(lambda body, nth: say(TRACE))
    with claude as server, student(run, server.url, model="openai/claude-haiku-4-5") as endpoint:
        list(endpoint.generate([request("3?")]))
    assert server.requests[0]["temperature"] == 0.8
    assert "top_p" not in server.requests[0]  # which Claude refuses beside a temperature


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
    def answer(body, nth):
        return reply if body["messages"][-1]["content"] == "odd" else say("a")

    with TeacherServer(answer) as server:
        good, odd = ask(run, server.url, [request("good"), request("odd", stop=stop)], concurrency=1)
        assert len(server.requests) == 2
    assert (good.text, good.finish) == ("a", "stop")
    assert (odd.text, odd.finish) == (text, finish)
    assert odd.error is None if error is None else error in odd.error


def test_errors_name_the_student_and_never_the_key(run):
    with Ledger(run.path("ledger.sqlite")) as ledger:
        endpoint = Endpoint(Teacher(config.Teacher(model="nobody/x"), ledger), "chat")
        with pytest.raises(UsageError, match=r"attempts\.student nobody/x: LiteLLM knows no provider"):
            list(endpoint.generate([request("1?")]))
    with TeacherServer(lambda body, nth: fail(401, "bad key sk-test-secret")) as server:
        with pytest.raises(TeacherError) as error:
            ask(run, server.url, [request("1?")])
        said = f"{error.value.message} {error.value.hint}"
        assert f"student openai/small at {server.url} rejects the key" in said
    assert "sk-test" not in said
    with pytest.raises(TeacherError) as error:
        ask(run, "http://127.0.0.1:9/v1", [request("1?")])
    assert "attempts.api_base" in error.value.hint
    assert "teacher" not in f"{error.value.message} {error.value.hint}"


def test_endpoint_neither_continues_nor_scores(run):
    with TeacherServer(lambda body, nth: say(TRACE)) as server, student(run, server.url) as endpoint:
        with pytest.raises(UsageError, match="openai/small is an endpoint") as error:
            list(endpoint.generate([request("1?"), request("2?", pieces=("<Step1>x\n",))]))
        with pytest.raises(UsageError, match="cannot score"):
            endpoint.score([ScoreRequest((), ("x",), (0,), (("a", "b"),))])
        assert server.requests == []
    assert "free review" in error.value.hint


def test_rerun_costs_nothing_but_other_sampling_or_another_version_is_requested(run):
    requests = [request("1?", seed=seed) for seed in (1, 2, 3)]
    with TeacherServer(lambda body, nth: say(f"said {nth}")) as server:
        first = ask(run, server.url, requests)
        assert len({reply.text for reply in first}) == 3
        assert ask(run, server.url, requests) == first
        assert len(server.requests) == 3
        for asked, changed in enumerate(({"seed": 4}, {"temperature": 0.7}), 4):
            ask(run, server.url, [*requests, request("1?", **{"seed": 1, **changed})])
            assert len(server.requests) == asked
        ask(run, server.url, [request("1?", seed=1, max_tokens=78)])  # the reply was not cut off
        assert len(server.requests) == asked
    with TeacherServer(lambda body, nth: say(f"said {nth}")) as server:
        for version, text in ((1, "said 1"), (1, "said 1"), (2, "said 2")):
            with student(run, server.url, version=version) as endpoint:
                assert [reply.text for reply in endpoint.generate([request("1?")])] == [text]
    assert "sample" not in str(server.requests)


def test_text_of_a_stream_comes_before_the_reply_is_complete(run):
    """The server writes the second word only after the first one has been received: else its connection times out."""
    first = threading.Event()
    spoken = replace(say(TRACE, tokens=(12, 9)), pause=first)
    with TeacherServer(lambda body, nth: spoken) as server, student(run, server.url) as endpoint:
        texts = []
        for found in endpoint.stream(request("1?")):
            texts.append(found)
            if not first.is_set():
                assert found == "<Step1>1"
                assert server.in_flight == 1
                first.set()
        *texts, reply = texts
        assert "".join(texts) == reply.text == TRACE
        assert (reply.finish, reply.tokens, reply.prompt_tokens) == ("stop", 9, 12)
        assert server.requests[0]["stream"] is True
        # immediately, from the ledger
        assert list(endpoint.stream(request("1?"))) == [TRACE, reply]
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("content", "stop", "shown"),
    [
        ("<think> let me see </think> <Step1>x y", (), "<Step1>x y"),
        ("a b</Correction> and more", ("</Correction>",), "a b</Correction>"),
        ("  spaces at  the ends \n ", (), "spaces at  the ends"),
        ("<think> it never ends", (), ""),
    ],
)
def test_streamed_text_is_that_of_the_reply(run, content, stop, shown):
    with TeacherServer(lambda body, nth: say(content)) as server, student(run, server.url) as endpoint:
        *texts, reply = endpoint.stream(request("1?", stop=stop))
        assert "".join(texts) == shown
        assert reply.text == shown or reply.finish == "error"


def test_abandoned_stream_is_given_up_and_frees_the_endpoint(run):
    wait = threading.Event()
    answers = iter([replace(say("one two three"), pause=wait), say("good")])
    with TeacherServer(lambda body, nth: next(answers)) as server, student(run, server.url) as endpoint:
        arriving = endpoint.stream(request("1?"))
        assert next(arriving) == "one"
        arriving.close()
        totals = endpoint.teacher.ledger.totals()
        assert (totals["given_up"], totals["requests"]) == (1, 0)
        assert list(endpoint.stream(request("2?")))[-1].text == "good"
        wait.set()


def test_stream_that_breaks_is_not_repeated_after_its_first_words(run):
    replies = iter([say("good"), replace(say("one two three four"), broken=True)])
    with TeacherServer(lambda body, nth: next(replies)) as server:
        with student(run, server.url, attempts=3) as endpoint:
            assert list(endpoint.stream(request("1?")))[-1].text == "good"
            *texts, last = endpoint.stream(request("2?"))
        assert texts == ["one", " two"]
        assert (last.finish, last.error.partition(":")[0]) == ("error", "no_reply")
        assert len(server.requests) == 2


def test_attempts_at_an_endpoint_with_a_price_are_confirmed_like_templates(run):
    priced = TeacherServer(lambda body, nth: say("2"))
    with priced as server, student(run, server.url, price=(1, 1)) as endpoint:
        endpoint.teacher.confirm = lambda *forecast: False
        with pytest.raises(DeclinedError, match="of 30 rows"):
            list(endpoint.generate([request(str(n)) for n in range(30)]))
        assert len(server.requests) < 30
