"""OpenAI's SDK and LiteLLM read the same reply, or meet the same error, whatever a server does."""

import asyncio
import json
import socket
import threading
import time

import pytest

from sclite import config
from sclite.errors import UsageError
from sclite.teacher import failures, provider
from sclite.teacher.failures import read_failure
from tests.replay import BROKEN, HTML, Answer, TeacherServer, fail, job, say

KEY = "sk-test-secret"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 1 + 1?"}]
PARAMETERS = {"temperature": 0.5, "max_tokens": 50, "top_p": 0.9, "seed": 3, "drop_params": True}


@pytest.fixture(scope="module", autouse=True)
def _imported():
    """LiteLLM's first call spends seconds on imports, which would count as a timeout."""
    with pytest.MonkeyPatch.context() as patch, TeacherServer(lambda request, nth: say("good")) as server:
        patch.setenv("OPENAI_API_KEY", KEY)
        asyncio.run(outcome(connect(server.url, direct=False), seconds=60.0))


def connect(url, direct=True, model="openai/replay", **settings):
    made = provider.connect(config.Teacher(model=model, api_base=url, direct=direct, **settings))
    assert (made.direct is not None) == direct
    return made


async def outcome(made, seconds=1.0):
    """What the sender gets from a call: the reply, or how it treats the error."""
    try:
        reply = await made.complete(MESSAGES, PARAMETERS, seconds)
        return reply.text, reply.finish_reason, made.charge(reply, (2000, 50))
    except OSError as error:
        failure = error
    except made.litellm.exceptions.openai.OpenAIError as error:
        failure = error
    finally:
        await made.close()
    found = read_failure(failure)
    return (
        found.action, found.overload, found.retry_after, bool(found.headers), found.free,
        found.message if found.headers else "",
    )  # fmt: skip


def both(answer, **settings):
    """The outcomes (through LiteLLM, directly) at an address that is not free; the requests are the same."""
    with TeacherServer(lambda request, nth: answer) as server:
        made = [connect(server.remote_url, direct, **settings) for direct in (False, True)]
        found = [asyncio.run(outcome(each)) for each in made]
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
    "plain": say("good"), "cut off": say("good", "length"), "filtered": say("no", "content_filter"), "no content": say(None),
    "another word for stop": say("good", "eos"), "an unknown reason": say("good", "weary"), "no reason": choice(None),
    "a think block": say("<think>so</think>\ngood"), "an open think block": say("<think>so"),
    "separate reasoning": choice(reasoning_content="so", content="<think>a</think>b"), "reasoning": choice(reasoning="so"),
    "a tool": choice(tool_calls=CALLED), "no usage": body(usage=None), "usage without a sum": body(usage={"prompt_tokens": 3}),
    "half a usage": body(usage={**TOKENS, "completion_tokens": None}), "an empty error": body(error={"message": ""}),
    "cached tokens": body(usage={**TOKENS, "prompt_tokens_details": {"cached_tokens": 800}}),
    "another model's name": body(model="gpt-4.1-mini", usage=TOKENS),
    "JSON as text/plain": Answer(200, json.dumps(say("good").body).encode(), {"Content-Type": "text/plain"}),
}  # fmt: skip
ERRORS = {
    "rate limit": fail(429, "slow down", retry_after="7"),
    "no credit": fail(429, "You exceeded your current quota"), "pay": fail(402, "pay"), "bad key": fail(401, f"bad {KEY}"),
    "forbidden": fail(403, "forbidden"), "no such model": fail(404, "The model `replay` does not exist"),
    "unknown question": fail(404, "no known question"), "no such page": Answer(404, b"404 page not found"),
    "bad request": fail(400, "max_tokens is too large"), "unprocessable": fail(422, '{"detail": [{"loc": ["body", "seed"]}]}'), "too large": fail(413, "too large"),
    "context": fail(400, "This model's maximum context length is 4096 tokens, you asked for 9000"), "conflict": fail(409),
    "vLLM's format": Answer(400, {"object": "error", "message": "maximum context length is 10 tokens", "code": 400}),
    "an unknown format": Answer(404, {"detail": "Not Found"}), "an error string": Answer(400, {"error": "too bad"}),
    "server error": fail(500, "oops"), "limit as server error": fail(500, "Rate limit reached"), "slow": fail(408, "slow"),
    "bad gateway": Answer(502, b"<html>bad gateway</html>"), "unavailable": Answer(503, b""), "gateway": fail(504),
    "overloaded": fail(529, "overloaded"), "half a reply": BROKEN, "half of JSON": Answer(200, b'{"choices": ['), "no body": Answer(200, b""),
    "no choice": body(choices=[]), "choices null": body(choices=None), "other JSON": Answer(200, {"hello": 1}),
    "a list": Answer(200, [1]), "a timeout": say("late", seconds=2.5),
}  # fmt: skip


@pytest.mark.parametrize("name", REPLIES)
@pytest.mark.parametrize("model", ["openai/replay", "openai/gpt-4.1", "hosted_vllm/replay"])
def test_both_clients_read_the_same_reply(name, model):
    through, direct = both(REPLIES[name], model=model)
    assert len(direct) == 3
    assert direct == through


@pytest.mark.parametrize("name", ERRORS)
def test_both_clients_meet_the_same_error(name):
    through, direct = both(ERRORS[name])
    assert direct[0] in (failures.RETRY, failures.REFUSED, failures.STOP)
    assert direct == through
    assert KEY not in str(direct)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (Answer(200, {"error": {"message": "busy", "code": 429}}), "busy"),
        (Answer(200, {"error": "model overloaded"}), "model overloaded"),
        (HTML, ""),
        (BROKEN, ""),
    ],
)
@pytest.mark.parametrize("model", ["openai/replay", "hosted_vllm/replay"])
def test_error_with_status_200_is_retried_and_free_unlike_half_a_reply(answer, message, model):
    """LiteLLM treats HTML from vLLM as a refusal."""

    async def raised(made):
        with pytest.raises(made.errors) as caught:
            await made.complete(MESSAGES, {}, 5)
        await made.close()
        return read_failure(caught.value)

    with TeacherServer(lambda request, nth: answer) as server:
        failure = asyncio.run(raised(connect(server.url, model=model)))
    assert (failure.action, failure.free) == (failures.RETRY, bool(message))
    assert failure.message == (message or failure.message)


def test_connections_are_reused(ask):
    with TeacherServer(lambda request, nth: say("good", seconds=0.05)) as server:
        opened, accept = [], server._server.get_request
        server._server.get_request = lambda: opened.append(1) or accept()
        ask(server, map(job, range(12)), concurrency=3)
    assert (len(opened), server.most_in_flight) == (3, 3)


def test_idle_connection_closed_by_the_server_costs_no_attempt():
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
            client.close()  # without announcing it

    async def several(made):
        for _ in range(5):
            assert (await made.complete(MESSAGES, {}, 5)).text == "good"
            await asyncio.sleep(0.1)
        await made.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        asyncio.run(several(connect(f"http://127.0.0.1:{listener.getsockname()[1]}/v1")))


def test_models_that_litellm_rewrites_or_routes_go_through_it():
    url = "http://127.0.0.1:1/v1"
    rewritten = ("openai/gpt-5", "openai/o3", "anthropic/claude-3-5-haiku-latest")
    cases = [*((name, url) for name in rewritten), ("openai/x", "")]
    for model, address in cases:
        assert provider.connect(config.Teacher(model=model, api_base=address)).direct is None, model
    assert connect(url, model="openai/Qwen/Qwen3-8B").direct.model == "Qwen/Qwen3-8B"


@pytest.mark.parametrize("direct", [True, False])
def test_key_comes_from_the_variable_of_the_provider(direct, monkeypatch):
    keys = {}
    for variable in (None, "HOSTED_VLLM_API_KEY", "OPENAI_API_KEY"):
        for model in ("openai/x", "hosted_vllm/x"):
            with monkeypatch.context() as patch, TeacherServer(lambda request, nth: say("good")) as server:
                patch.delenv("OPENAI_API_KEY", raising=False)
                if variable:
                    patch.setenv(variable, "sk-of-mine")
                asyncio.run(outcome(connect(server.url, direct, model)))
            keys[variable, model.partition("/")[0]] = server.keys.pop()
    assert keys == {
        (None, "openai"): "Bearer none", (None, "hosted_vllm"): "Bearer fake-api-key",
        ("HOSTED_VLLM_API_KEY", "openai"): "Bearer none", ("HOSTED_VLLM_API_KEY", "hosted_vllm"): "Bearer sk-of-mine",
        ("OPENAI_API_KEY", "openai"): "Bearer sk-of-mine", ("OPENAI_API_KEY", "hosted_vllm"): "Bearer fake-api-key",
    }  # fmt: skip


def test_proxy_is_used_and_its_password_never_shown(monkeypatch):
    with TeacherServer(lambda request, nth: say("good")) as server:
        monkeypatch.setenv("HTTP_PROXY", server.url.replace("/v1", ""))
        monkeypatch.setenv("NO_PROXY", "near.example")
        assert asyncio.run(outcome(connect("http://far.example/v1")))[0] == "good"
        assert len(server.requests) == 1
        assert asyncio.run(outcome(connect("http://near.example/v1")))[0] == failures.RETRY
        assert len(server.requests) == 1
    monkeypatch.setenv("HTTP_PROXY", "http://me:pass-of-mine@127.0.0.1:9")
    made = connect("http://far.example/v1")
    with pytest.raises(made.litellm.exceptions.openai.APIConnectionError) as caught:
        asyncio.run(made.complete(MESSAGES, {}, 2))
    assert "pass-of-mine" not in read_failure(caught.value).message


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1:8000/v1",
        "http://127.0.0.1:87611/v1",
        "http://:8000/v1",
        "http://host:x/v1",
        "ftp://me:secret@host/v1",
    ],
)
def test_invalid_api_base_is_reported_before_any_request(address):
    with pytest.raises(UsageError, match="is not a valid URL") as failure:
        provider.connect(config.Teacher(model="openai/replay", api_base=address))
    assert "http://HOST:PORT/v1" in failure.value.hint
    assert "secret" not in str(failure.value)
