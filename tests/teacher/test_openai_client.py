"""OpenAI's SDK and LiteLLM: whatever a server does, both read the same reply from it or meet the same error."""

import asyncio
import gzip
import json
import socket
import threading
import time

import pytest

from sclite import config
from sclite.errors import UsageError
from sclite.teacher import failures, provider
from tests.replay import BROKEN, HTML, Answer, TeacherServer, fail, say

KEY = "sk-test-secret"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 1 + 1?"}]
PARAMETERS = {"temperature": 0.5, "max_tokens": 50, "top_p": 0.9, "seed": 3, "drop_params": True}


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def far_away(monkeypatch):
    """Endpoints cost money, as those on this machine do not."""
    monkeypatch.setattr(provider, "is_local", lambda api_base: False)


def way(url, direct=True, model="openai/replay", **settings):
    made = provider.connect(config.Teacher(model=model, api_base=url, direct=direct, **settings))
    assert (made.direct is not None) == direct
    return made


async def outcome(made, seconds=1.0):
    """What the sender gets from a call: the reply, or what the fault means to it."""
    try:
        said = await made.complete(MESSAGES, PARAMETERS, seconds)
        return said.text, said.finish_reason, said.tokens, said.listed_usd
    except OSError as error:
        failure = error
    except made.litellm.exceptions.openai.OpenAIError as error:
        failure = error
    finally:
        await made.close()
    wait = failures.wait_seconds(failure, 1, 0.0)
    return (
        failures.classify(failure), failures.is_timeout(failure), failures.is_overload(failure), round(wait, -1 if wait > 99 else 3),
        bool(failures.headers(failure)), failures.is_free(failure), failures.message(failure) if failures.headers(failure) else "",
    )  # fmt: skip


def both(answer, **settings):
    """(through LiteLLM, directly), and what the server was asked each time."""
    with TeacherServer(lambda request, nth: answer) as server:
        found = [asyncio.run(outcome(way(server.url, direct, **settings))) for direct in (False, True)]
    assert server.requests[0] == server.requests[-1]
    assert len(server.keys) == 1
    return found


def body(**changes):
    return Answer(body={**say("good").body, **changes})


def choice(finish_reason="stop", **message):
    message = {"role": "assistant", "content": "text", **message}
    return body(choices=[{"index": 0, "finish_reason": finish_reason, "message": message}])


TOKENS = {"prompt_tokens": 1000, "completion_tokens": 10, "total_tokens": 1010}
CALLED = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
REPLIES = {
    "plain": say("good"), "cut off": say("good", "length"), "filtered": say("no", "content_filter"), "nothing": say(None),
    "another word for stop": say("good", "eos"), "a reason of its own": say("good", "weary"), "no reason": choice(None),
    "a think block": say("<think>so</think>\ngood"), "an open think block": say("<think>so"),
    "thoughts apart": choice(reasoning_content="so", content="<think>a</think>b"), "reasoning": choice(reasoning="so"),
    "a tool": choice(tool_calls=CALLED), "no usage": body(usage=None), "usage without a sum": body(usage={"prompt_tokens": 3}),
    "half a usage": body(usage={**TOKENS, "completion_tokens": None}), "an empty error": body(error={"message": ""}),
    "cached tokens": body(usage={**TOKENS, "prompt_tokens_details": {"cached_tokens": 800}}),
    "another model's name": body(model="gpt-4.1-mini", usage=TOKENS),
    "JSON called text": Answer(200, json.dumps(say("good").body).encode(), {"Content-Type": "text/plain"}),
}  # fmt: skip
FAULTS = {
    "rate limit": fail(429, "slow down", retry_after="7"), "in milliseconds": fail(429, "slow", retry_after_ms="250"),
    "until a date": fail(429, "slow", retry_after="Wed, 21 Oct 2045 07:28:00 GMT"),
    "no credit": fail(429, "You exceeded your current quota"), "pay": fail(402, "pay"), "bad key": fail(401, f"bad {KEY}"),
    "forbidden": fail(403, "forbidden"), "no such model": fail(404, "The model `replay` does not exist"),
    "unknown question": fail(404, "no known question"), "no such page": Answer(404, b"404 page not found"),
    "bad request": fail(400, "max_tokens is too large"), "unprocessable": fail(422, '{"detail": [{"loc": ["body", "seed"]}]}'), "too large": fail(413, "too large"),
    "context": fail(400, "This model's maximum context length is 4096 tokens, you asked for 9000"), "conflict": fail(409),
    "vLLM's own form": Answer(400, {"object": "error", "message": "maximum context length is 10 tokens", "code": 400}),
    "a form unknown": Answer(404, {"detail": "Not Found"}), "an error of words": Answer(400, {"error": "too bad"}),
    "server error": fail(500, "oops"), "limit as server error": fail(500, "Rate limit reached"), "slow": fail(408, "slow"),
    "bad gateway": Answer(502, b"<html>bad gateway</html>"), "unavailable": Answer(503, b""), "gateway": fail(504),
    "overloaded": fail(529, "overloaded"), "half a reply": BROKEN, "half of JSON": Answer(200, b'{"choices": ['), "no body": Answer(200, b""),
    "no choice": body(choices=[]), "choices null": body(choices=None), "other JSON": Answer(200, {"hello": 1}),
    "a list": Answer(200, [1]), "silence": say("late", seconds=2.5),
    "more than 4 MiB": Answer(200, json.dumps(say("good").body).encode() + b" " * 2**22),
    "gzip": Answer(200, gzip.compress(json.dumps(say("good").body).encode()), {"Content-Encoding": "gzip"}),
}  # fmt: skip


@pytest.mark.parametrize("name", REPLIES)
@pytest.mark.parametrize("model", ["openai/replay", "openai/gpt-4.1", "hosted_vllm/replay"])
def test_both_ways_read_the_same_reply(name, model, far_away):
    through, direct = both(REPLIES[name], model=model)
    assert len(direct) == 4
    assert direct == through


@pytest.mark.parametrize("name", FAULTS)
def test_both_ways_meet_the_same_fault(name):
    through, direct = both(FAULTS[name])
    assert direct[0] in (failures.RETRY, failures.REFUSED, failures.STOP)
    assert direct == through
    assert KEY not in str(direct)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (Answer(200, {"error": {"message": "busy", "code": 429}}), "busy"),
        (Answer(200, {"error": {"message": "busy", "code": "rate_limit_exceeded"}}), "busy"),
        (Answer(200, {"error": "model overloaded"}), "model overloaded"),
        (HTML, "the reply is not JSON: <html><body>Bad gateway</body></html>"),
    ],
)
def test_an_error_or_a_page_with_status_200_is_free_and_asked_again(answer, said):
    async def failure(made):
        with pytest.raises(ConnectionError) as caught:
            await made.complete(MESSAGES, {}, 5)
        await made.close()
        return caught.value

    with TeacherServer(lambda request, nth: answer) as server:
        found = asyncio.run(failure(way(server.url)))
    assert (failures.classify(found), failures.is_free(found), failures.message(found)) == (
        failures.RETRY,
        True,
        said,
    )


def test_a_page_or_half_a_reply_is_asked_for_again_whatever_the_provider():
    """LiteLLM takes a vLLM server's HTML for a refusal."""
    for answer in (HTML, BROKEN, Answer(200, b"{")):
        with TeacherServer(lambda request, nth, answer=answer: answer) as server:
            assert asyncio.run(outcome(way(server.url, model="hosted_vllm/replay")))[0] == failures.RETRY


def test_connections_are_kept_and_no_more_than_needed():
    with TeacherServer(lambda request, nth: say("good", seconds=0.05)) as server:
        opened = []
        accept = server._server.get_request
        server._server.get_request = lambda: opened.append(1) or accept()
        made = way(server.url, concurrency=3)

        async def many():
            room = asyncio.Semaphore(3)

            async def one():
                async with room:
                    await made.complete(MESSAGES, {}, 5)

            await asyncio.gather(*(one() for _ in range(12)))
            await made.close()

        asyncio.run(many())
    assert len(opened) == 3
    assert server.most_in_flight == 3


def test_a_kept_connection_that_the_server_has_closed_costs_no_attempt():
    def serve(listener):
        data = json.dumps(say("good").body).encode()
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            client.recv(65536)
            client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(data), data))
            time.sleep(0.05)
            client.close()  # without having said so

    async def several(made):
        for _ in range(5):
            assert (await made.complete(MESSAGES, {}, 5)).text == "good"
            await asyncio.sleep(0.1)
        await made.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        asyncio.run(several(way(f"http://127.0.0.1:{listener.getsockname()[1]}/v1")))


# -- which way -----------------------------------------------------------------------------------------------------


def test_what_litellm_rewrites_or_finds_elsewhere_goes_through_it(monkeypatch):
    url = "http://127.0.0.1:1/v1"
    cases = {
        "openai/gpt-5": url, "openai/o3": url, "openai/responses/x": url, "anthropic/claude-3-5-haiku-latest": url,
        "openai/x": "", "openai/y": url + "?version=2",
    }  # fmt: skip
    for model, address in cases.items():
        assert provider.connect(config.Teacher(model=model, api_base=address)).direct is None, model
    assert way(url, model="openai/Qwen/Qwen3-8B").direct.model == "Qwen/Qwen3-8B"
    monkeypatch.setenv("HTTP_PROXY", "socks5://127.0.0.1:2")
    assert provider.connect(config.Teacher(model="openai/x", api_base="http://far.example/v1")).direct is None


@pytest.mark.parametrize("direct", [True, False])
def test_the_key_comes_from_the_providers_own_variable(direct, monkeypatch):
    keys = {}
    for variable in (None, "HOSTED_VLLM_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        if variable:
            monkeypatch.setenv(variable, "sk-of-mine")
        for model in ("openai/x", "hosted_vllm/x"):
            with TeacherServer(lambda request, nth: say("good")) as server:
                asyncio.run(outcome(way(server.url, direct, model)))
            keys[variable, model.partition("/")[0]] = server.keys.pop()
        if variable:
            monkeypatch.delenv(variable)
    assert keys == {
        (None, "openai"): "Bearer none", (None, "hosted_vllm"): "Bearer fake-api-key",
        ("HOSTED_VLLM_API_KEY", "openai"): "Bearer none", ("HOSTED_VLLM_API_KEY", "hosted_vllm"): "Bearer sk-of-mine",
        ("OPENAI_API_KEY", "openai"): "Bearer sk-of-mine", ("OPENAI_API_KEY", "hosted_vllm"): "Bearer fake-api-key",
    }  # fmt: skip


def test_a_proxy_of_the_environment_is_used_and_its_password_never_said(monkeypatch):
    with TeacherServer(lambda request, nth: say("good")) as server:
        monkeypatch.setenv("HTTP_PROXY", server.url.replace("/v1", ""))
        monkeypatch.setenv("NO_PROXY", "near.example")
        assert asyncio.run(outcome(way("http://far.example/v1")))[0] == "good"
        assert len(server.requests) == 1
        assert asyncio.run(outcome(way("http://near.example/v1")))[0] == failures.RETRY
        assert len(server.requests) == 1
    monkeypatch.setenv("HTTP_PROXY", "http://me:pass-of-mine@127.0.0.1:9")
    made = way("http://far.example/v1")
    with pytest.raises(made.litellm.exceptions.openai.APIConnectionError) as caught:
        asyncio.run(made.complete(MESSAGES, {}, 2))
    assert "pass-of-mine" not in failures.message(caught.value)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1:8000/v1",
        "http://127.0.0.1:87611/v1",
        "http://:8000/v1",
        "http://host:x/v1",
        "ftp://me:secret@host/v1",
        "me:secret@host/v1",
        "ftp://me:se/secret@host",
        "ftp://me:a@secret@host",
    ],
)
def test_an_api_base_that_is_no_address_is_told_before_anything_is_asked(address):
    with pytest.raises(UsageError, match="is not a valid URL") as failure:
        provider.connect(config.Teacher(model="openai/replay", api_base=address))
    assert "http://HOST:PORT/v1" in failure.value.hint
    assert "secret" not in str(failure.value)
