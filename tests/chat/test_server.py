"""The server, with OpenAI's own client: reviewed and raw replies, errors, limits, and clients that disconnect."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from urllib.parse import quote

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sclite.chat.answer import Settings
from sclite.chat.server import Server, run_server
from sclite.chat.service import Completion, Service, plain_text
from sclite.config import Config
from sclite.errors import DataError, UsageError
from sclite.export.gguf import write_gguf
from sclite.student.base import Reply
from sclite.student.llama_cpp.engine import Engine
from sclite.student.loader import EMBEDDED_FOLDER
from sclite.trace import Step, Trace, parse, render
from tests.chat.scripted import CORRECTING, WRONG, Scripted
from tests.toy import wait_until

ASK = [{"role": "user", "content": "Anna has 4 apples and buys 3 more. How many apples does she have?"}]
ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def serving(service: Service, key: str = ""):
    """The base URL of a running server."""
    server = Server(service, key)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        service.pool.shutdown()


def client(url: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    """The bundled student before its training."""
    return write_gguf(EMBEDDED_FOLDER, tmp_path_factory.mktemp("serve") / "base.gguf", outtype="f16")


@pytest.fixture(scope="module")
def engine(gguf):
    with Engine(gguf, parallel=4, context=512) as engine:
        yield engine


@pytest.fixture
def raw(engine):
    """(URL, service) of a server with a real model."""
    service = Service(engine, "base", Settings(mode="", max_tokens=400), 4)
    with serving(service) as url:
        yield url, service


@pytest.fixture
def scripted():
    """(URL, service) of a server whose student corrects a wrong step."""
    service = Service(Scripted(**CORRECTING), "tom", Settings(), 2)
    with serving(service) as url:
        yield url, service


CONTENT = "1. 2 + 2 = 4\n2. 4 + 1 = 5\n3. 5 + 1 = 6\n\nAnswer: 6"
PLAIN_WRONG = "1. 2 + 2 = 4\n2. 4 + 1 = 6\n3. 6 + 1 = 7\nAnswer: 7"
OWN = render(Trace((Step("2 + 2 = 5", None, "Too many.", "2 + 2 = 4"), Step("4 + 1 = 5")), None, "5"))
"""A student that corrects itself while solving."""
REASONING = (
    "1. 2 + 2 = 4\n2. 4 + 1 = 6\n3. 6 + 1 = 7\nAnswer: 7\n\nProbability of an error: step 1: 12 %, step 2: 95 %, "
    "step 3: 27 %\n\nReview of step 2\nWhy wrong: 4 and 1 are 5.\nCorrect: 4 + 1 = 5\n3. 5 + 1 = 6\nAnswer: 6"
)


def test_first_attempt_and_review_are_the_reasoning_of_the_corrected_answer(scripted):
    (reply,) = client(scripted[0]).chat.completions.create(model="tom", messages=ASK).choices
    assert reply.message.content == CONTENT
    assert reply.message.reasoning_content == REASONING
    assert reply.finish_reason == "stop"
    assert reply.sclite["accused"] == 2


def test_streamed_reply_has_the_same_text_and_the_reasoning_first(scripted):
    asked = {"model": "tom", "messages": ASK, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = client(scripted[0]).chat.completions.create(**asked)
    deltas = [chunk.choices[0].delta.model_dump(exclude_none=True) for chunk in chunks]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == REASONING
    assert "".join(delta.get("content", "") for delta in deltas) == CONTENT
    fields = [key for delta in deltas for key in delta]
    assert fields.index("reasoning_content") < fields.index("content")
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "stop"
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (20, 15)


def test_litellm_reads_reasoning_and_answer(scripted, monkeypatch):
    monkeypatch.setenv("LITELLM_MODE", "PRODUCTION")  # or it reads .env
    import litellm

    asked = {"model": "openai/tom", "api_base": f"{scripted[0]}/v1", "api_key": "none", "messages": ASK}
    message = litellm.completion(**asked).choices[0].message
    deltas = [chunk.choices[0].delta for chunk in litellm.completion(**asked, stream=True)]
    for found in ([message], deltas):
        assert "".join(part.content or "" for part in found) == CONTENT
        assert "".join(getattr(part, "reasoning_content", None) or "" for part in found) == REASONING


@pytest.mark.parametrize("options", [(), ("--no-stream",)], ids=["streamed", "whole"])
def test_llm_holds_a_conversation(scripted, tmp_path, monkeypatch, options):
    """Simon Willison's command line: two turns, the second with the first as history."""
    pytest.importorskip("llm", reason="pip install llm")
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    there = {"api_base": f"{scripted[0]}/v1"}
    named = [{"model_id": name, "model_name": name, **there} for name in ("tom", "tom:raw")]
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps(named))  # JSON is YAML
    turns = {("-m", "tom", "How many?"): CONTENT, ("-m", "tom:raw", "How many?"): WRONG}
    for typed, text in (turns | {("--continue", "And now?"): WRONG}).items():
        command = [sys.executable, "-m", "llm", "prompt", *options, *typed]
        assert subprocess.check_output(command, text=True).strip() == text.strip()
    asked = [message["content"] for message in scripted[1].student.asked[-1].messages]
    assert asked == ["How many?", WRONG, "And now?"]


def test_only_the_last_question_is_answered_and_raw_gets_all_messages(scripted):
    url, service = scripted
    talk = [*ASK, {"role": "assistant", "content": "7"}, {"role": "user", "content": "And with 9?"}]
    client(url).chat.completions.create(model="tom", messages=talk)
    asked = service.student.asked[0].messages
    assert asked[-1]["content"].endswith("And with 9?")
    assert "4 apples" not in asked[-1]["content"]
    reply = client(url).chat.completions.create(model="tom:raw", messages=talk)
    assert service.student.asked[-1].messages == tuple(talk)
    assert reply.choices[0].message.content == WRONG
    parts = [{"type": "text", "text": "And "}, {"type": "text", "text": "now?"}]
    asking = [{"role": "user", "content": parts}]
    client(url).chat.completions.create(model="tom:raw", messages=asking)
    assert service.student.asked[-1].messages[0]["content"] == "And now?"


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("student", "settings", "asked", "content", "reasoning"),
    [
        (Scripted(WRONG), Settings(mode=""), {}, PLAIN_WRONG, False),
        (Scripted(WRONG), Settings(mode=""), {"stop": "2. 4"}, "1. 2 + 2 = 4\n", False),
        (Scripted("<Step1", finish="length"), Settings(), {}, "", False),
        (Scripted("2 < 3 <Answer>yes</Answer>"), Settings(), {}, "2 < 3 Answer: yes", True),
        (Scripted(**CORRECTING, finish="length"), Settings(), {}, PLAIN_WRONG.replace("\nA", "\n\nA"), True),
        (Scripted(OWN), Settings(), {}, "1. 2 + 2 = 4\n2. 4 + 1 = 5\n\nAnswer: 5", True),
    ],
    ids=["no review", "no review, stop", "cut off in a tag", "no steps", "cut off", "own correction"],
)
def test_content_without_a_correction_by_the_review(student, settings, asked, content, reasoning, streamed):
    with serving(Service(student, "tom", settings, 2)) as url:
        reply = client(url).chat.completions.create(model="tom", messages=ASK, stream=streamed, **asked)
        said = [chunk.choices[0].delta for chunk in reply] if streamed else [reply.choices[0].message]
    assert "".join(part.content or "" for part in said) == content
    assert any(hasattr(part, "reasoning_content") for part in said) == reasoning
    assert len(student.asked) == 1
    student.asked.clear()


def test_stop_strings_end_the_content_without_appearing_in_it(scripted, raw):
    (reply,) = client(scripted[0]).chat.completions.create(model="tom", messages=ASK, stop=["\n2."]).choices
    assert reply.message.content == "1. 2 + 2 = 4"
    ask = {"model": "base:raw", "messages": ASK, "max_tokens": 30}
    whole = client(raw[0]).chat.completions.create(**ask).choices[0].message.content
    stop = whole[4:7]
    for streamed in (False, True):
        reply = client(raw[0]).chat.completions.create(**ask, stop=stop, stream=streamed)
        parts = [chunk.choices[0].delta.content or "" for chunk in reply] if streamed else []
        text = "".join(parts) if streamed else reply.choices[0].message.content
        assert text == whole[: whole.index(stop)]


def test_choices_have_their_own_seeds_and_a_token_limit(raw):
    ask = {"model": "base:raw", "messages": ASK, "n": 3, "temperature": 1.5, "seed": 7, "max_tokens": 24}
    first = client(raw[0]).chat.completions.create(**ask)
    texts = [choice.message.content for choice in first.choices]
    assert len(set(texts)) > 1
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert first.usage.completion_tokens <= 3 * 24
    again = ["", "", ""]
    for chunk in client(raw[0]).chat.completions.create(**ask, stream=True):
        again[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert sum(a == b for a, b in zip(texts, again, strict=True)) >= 2  # rounding differs between batches
    reply = client(raw[0]).chat.completions.create(model="base:raw", messages=ASK, max_tokens=3)
    assert (reply.choices[0].finish_reason, reply.usage.completion_tokens) == ("length", 3)


def test_request_without_a_seed_is_another_sample_each_time(raw, scripted):
    ask = {"model": "base:raw", "messages": ASK, "temperature": 1.5, "max_tokens": 24}
    replies = [client(raw[0]).chat.completions.create(**ask).choices[0].message.content for _ in range(3)]
    assert len(set(replies)) > 1
    for seed in (None, None, 0, 0):
        client(scripted[0]).chat.completions.create(model="tom:raw", messages=ASK, temperature=1, seed=seed)
    seeds = [request.seed for request in scripted[1].student.asked]
    assert seeds[0] != seeds[1]
    assert seeds[2:] == [0, 0]


def test_models_health_and_metrics(scripted):
    url, _ = scripted
    assert [model.id for model in client(url).models.list()] == ["tom", "tom:raw"]
    client(url).chat.completions.create(model="tom", messages=ASK)
    assert httpx.get(f"{url}/health").json() == {"status": "ok", "model": "tom", "active": 0}
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    assert "sclite_corrected_total 1" in lines
    scripted[1].counts['tokens_total{kind="prompt"}'] = 123456789
    assert 'sclite_tokens_total{kind="prompt"} 123456789' in httpx.get(f"{url}/metrics").text
    assert 'sclite_tokens_total{kind="generated"} 15' in lines
    assert all(re.fullmatch(r'sclite_\w+(\{\w+="\w+"\})? [\d.e+-]+', line) for line in lines)


def test_page_needs_no_network_and_other_host_names_are_refused(scripted):
    page = httpx.get(scripted[0])
    assert page.status_code == 200
    assert "connect-src 'self'" in page.headers["content-security-policy"]
    assert not re.search(r"https?://|src=|@import", page.text)
    hosts = {"/health": "evil.example", "/": "localhost.evil.example", "/v1/models": "[::2]:80"}
    for path, host in hosts.items():
        reply = httpx.get(scripted[0] + path, headers={"host": host})
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_host")
    for origin, status in (("http://evil.example", 403), ("null", 403), (scripted[0], 200), ("app://x", 200)):
        body = {"model": "tom", "messages": ASK}
        reply = httpx.post(f"{scripted[0]}/v1/chat/completions", json=body, headers={"origin": origin})
        assert reply.status_code == status, origin
    for host in ("localhost", "LOCALHOST:8000", "[::1]:8000", "127.0.0.1"):
        assert httpx.get(f"{scripted[0]}/health", headers={"host": host}).status_code == 200


@pytest.mark.skipif(not shutil.which("node"), reason="needs node")
def test_page_shows_the_correction_of_any_step():
    """One that a step has of its own, and that of a step after the reviewed one."""
    page = (ROOT / "sclite/chat/page.html").read_text()
    code = page[page.index("function steps(") : page.index("// The text received so far")]
    code += page[page.index("function draw(") : page.index("async function ask(")]
    code += "function add(parent, tag, kind, text) { parent.children.push({ text, children: [] });"
    code += "return parent.children.at(-1); }"
    own = Step("2 + 2 = 5", "Count.", "Four.", "2 + 2 = 4"), Step("4 + 1 = 5")
    final = Step("2 + 2 = 4"), Step("4 + 1 = 5"), Step("5 + 1 = 7", None, "Too many.", "5 + 1 = 6")
    found = {"first": WRONG, "accused": 2, "cause": "Five.", "correction": "4 + 1 = 5", "answer": "6"}
    found |= {"step_scores": [-2.0, 3.0, -1.0], "final": render(Trace(final, None, "6"))}
    code += f"const turn = {{ children: [] }}; draw(turn, {json.dumps(found)});"
    code += "const texts = item => item.children.map(part => part.text);"
    code += f"const own = steps({json.dumps(render(Trace(own, None, '5')))});"
    code += "console.log(JSON.stringify([own, turn.children[0].children.map(texts)]));"
    shown, drawn = json.loads(subprocess.check_output(["node", "-e", code]))
    assert shown == [[1, "2 + 2 = 5", "Four.", "2 + 2 = 4"], [2, "4 + 1 = 5", None, None]]
    assert drawn == [
        ["·", 1, "12%", "2 + 2 = 4"],
        ["✗", 2, "95%", "4 + 1 = 6", "Five."],
        ["→", 2, "", "4 + 1 = 5"],
        ["✗", 3, "", "5 + 1 = 7", "Too many."],
        ["→", 3, "", "5 + 1 = 6"],
    ]


def test_null_is_the_default_of_a_field(scripted):
    body = {"model": "tom", "messages": ASK} | dict.fromkeys(("n", "stream", "stop", "temperature", "seed"))
    reply = httpx.post(f"{scripted[0]}/v1/chat/completions", json=body)
    assert [each["message"]["content"] for each in reply.json()["choices"]] == [CONTENT]


def test_name_that_ends_in_raw_has_a_model_that_reviews():
    with serving(Service(Scripted(**CORRECTING), "math:raw", Settings(), 1)) as url:
        for name, content in (("math:raw", CONTENT), ("math:raw:raw", WRONG)):
            reply = client(url).chat.completions.create(model=name, messages=ASK)
            assert reply.choices[0].message.content == content


LONG = "word " * 600
PICTURE = {"type": "image_url", "image_url": {"url": "data:,"}}
IMAGE = {"messages": [{"role": "user", "content": [PICTURE]}]}


def test_messages_that_the_chat_template_rejects_are_a_bad_request():
    class Strict(Scripted):
        def stream(self, ask, cancel=None, pieces=True):
            raise DataError("the chat template cannot render the messages: roles must alternate", "")
            yield

    service = Service(Strict(), "tom", Settings(mode=""), 1)
    with serving(service) as url, pytest.raises(openai.BadRequestError, match="must alternate"):
        client(url).chat.completions.create(model="tom:raw", messages=ASK)


@pytest.mark.parametrize(
    ("change", "status", "code", "parameter"),
    [
        ({"model": "gpt-5"}, 404, "model_not_found", "model"),
        ({"n": 0}, 400, None, "n"),
        ({"n": 9}, 400, None, "n"),
        ({"temperature": -1}, 400, None, "temperature"),
        ({"max_tokens": 0}, 400, None, "max_tokens"),
        ({"messages": []}, 400, None, "messages"),
        ({"messages": [{"role": "user", "content": "  "}]}, 400, None, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, 400, None, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 3}]}, 400, None, "messages.0.content"),
        (IMAGE, 400, None, "messages.0.content"),
        ({"stop": list("abcde")}, 400, None, "stop"),
        ({"stop": 5}, 400, None, "stop"),
        ({"messages": [{"role": "user", "content": LONG}]}, 400, "context_length_exceeded", "messages"),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_errors_are_those_of_openai(scripted, change, status, code, parameter, streamed):
    body = {"model": "tom", "messages": ASK, "stream": streamed} | change
    reply = httpx.post(f"{scripted[0]}/v1/chat/completions", json=body)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (status, code, parameter)
    assert error["type"] == "invalid_request_error"
    assert error["message"]


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/chat/completions", b"{broken", 400),
        ("POST", "/v1/chat/completions", b'"\\ud800"', 400),
        ("POST", "/v1/chat/completions", b"x" * 10_000_000, 413),
        ("GET", "/v1/chat/completions", b"", 405),
        ("GET", "/v2", b"", 404),
    ],
)
def test_bad_requests_get_an_error_object(scripted, method, path, body, status):
    reply = httpx.request(method, scripted[0] + path, content=body)
    assert reply.status_code == status
    assert reply.json()["error"]["message"]


def test_an_unexpected_error_is_an_error_object_too(scripted, monkeypatch):
    def fail(ask, cancel=None, pieces=True):
        raise RuntimeError("secret")

    monkeypatch.setattr(scripted[1].student, "stream", fail)
    reply = httpx.post(f"{scripted[0]}/v1/chat/completions", json={"model": "tom", "messages": ASK})
    assert (reply.status_code, reply.json()["error"]["type"]) == (500, "server_error")
    assert "secret" not in reply.text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = sorted(Completion.model_fields)


@pytest.mark.parametrize("examples", [150, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_body_causes_an_internal_error(scripted, examples):
    with httpx.Client(timeout=60) as http:

        @settings(max_examples=examples, deadline=None, database=None)
        @given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4))
        def check(change):
            body = json.dumps({"model": "tom", "messages": ASK} | change)
            reply = http.post(f"{scripted[0]}/v1/chat/completions", content=body)
            assert reply.status_code in (200, 400, 404)

        check()


@pytest.mark.parametrize("examples", [150, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_request_to_any_address_causes_an_internal_error(scripted, examples):
    known = st.sampled_from(["", "v1/models", "v1/chat/completions", "health", "metrics"])
    header = st.sampled_from(
        ["authorization", "content-type", "accept", "origin", "range", "content-encoding"]
    )
    value = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=20)
    with httpx.Client(timeout=60) as http:

        @settings(max_examples=examples, deadline=None, database=None)
        @given(
            method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"]),
            path=known | st.text(max_size=20).map(quote),
            query=st.text(max_size=10).map(quote),
            headers=st.dictionaries(header, value),
            body=st.binary(max_size=40),
        )
        def check(method, path, query, headers, body):
            url = f"{scripted[0]}/{path}?{query}"
            reply = http.request(method, url, headers=headers, content=body)
            assert reply.status_code < 500

        check()


def test_key_is_needed_if_one_is_set():
    service = Service(Scripted(), "tom", Settings(), 2)
    with serving(service, key="sécret") as url:
        for key in ("wrong", ""):
            reply = httpx.get(f"{url}/v1/models", headers={"authorization": f"Bearer {key}"} if key else {})
            assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
        assert httpx.get(f"{url}/metrics").status_code == 401
        given_key = {"authorization": "Bearer sécret".encode()}
        assert httpx.get(f"{url}/v1/models", headers=given_key).status_code == 200
        assert httpx.get(f"{url}/health").status_code == 200


def test_open_address_needs_a_key_and_a_port_must_be_free(scripted, monkeypatch, gguf):
    monkeypatch.delenv("SCLITE_API_KEY", raising=False)
    options = {"name": "x", "parallel": 1, "off": ""}
    with pytest.raises(UsageError, match="needs a key"):
        run_server(gguf, Config(), None, host="0.0.0.0", port=0, **options)
    taken = int(scripted[0].rpartition(":")[2])
    with pytest.raises(UsageError, match="cannot listen"):
        run_server(gguf, Config(), None, host="127.0.0.1", port=taken, **options)


class Blocked(Scripted):
    """Its replies wait until they are released; each repeats its question."""

    def __init__(self, blocked=True):
        super().__init__()
        self.release = threading.Event()
        if not blocked:
            self.release.set()

    def stream(self, ask, cancel=None, pieces=True):
        if pieces:
            yield "begun "
        while not self.release.wait(0.01):
            if cancel is not None and cancel.is_set():
                return
        text = ask.messages[-1]["content"]
        yield text if pieces else f"begun {text}"
        yield Reply(0, f"begun {text}", 3, 5, "stop")


def test_too_many_requests_are_rejected_and_a_slow_answer_is_ended():
    service = Service(Blocked(), "tom", Settings(mode=""), 1)
    service.most = 2
    with serving(service) as url, ThreadPoolExecutor(2) as pool:
        ask = client(url).chat.completions.create
        first = [pool.submit(ask, model="tom:raw", messages=ASK) for _ in range(2)]
        wait_until(lambda: service.active == 2)
        with pytest.raises(openai.RateLimitError):
            ask(model="tom:raw", messages=ASK)
        service.student.release.set()
        assert all("begun" in each.result().choices[0].message.content for each in first)
    service = Service(Blocked(), "tom", Settings(mode=""), 1, seconds=0.2)
    with serving(service) as url:
        with pytest.raises(openai.APIStatusError) as error:
            client(url).chat.completions.create(model="tom:raw", messages=ASK)
        assert error.value.status_code == 504
        wait_until(lambda: service.active == 0)


@pytest.mark.parametrize("streamed", [True, False])
def test_client_that_disconnects_frees_the_engine(raw, engine, streamed):
    url, service = raw
    body = {"model": "base:raw", "messages": ASK, "temperature": 2, "max_tokens": 400, "n": 8}
    body["stream"] = streamed
    if streamed:
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body) as reply:
            next(reply.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/chat/completions", json=body, timeout=0.05)
    wait_until(lambda: service.active == 0 and not engine.scheduler.active)


@pytest.mark.parametrize("streamed", [True, False])
def test_client_that_disconnects_before_the_first_text_frees_its_slot(streamed):
    student = Blocked()
    service = Service(student, "tom", Settings(mode=""), 1)
    with serving(service) as url:
        # the first is not streamed and has no text before its end, the second waits for it
        for stream in (False, streamed):
            body = {"model": "tom:raw", "messages": ASK, "stream": stream}
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{url}/v1/chat/completions", json=body, timeout=0.2)
        try:
            wait_until(lambda: service.active == 0)
        finally:
            student.release.set()


def test_client_that_disconnects_while_sending_is_not_a_failure(scripted):
    url, service = scripted
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
        connection.sendall(f'{head}{{"model": '.encode())
        time.sleep(0.2)
    wait_until(lambda: service.counts)
    assert list(service.counts) == ['errors_total{status="499"}']
    assert httpx.get(f"{url}/health").json()["active"] == 0


def test_no_reply_is_lost_or_mixed_up():
    service, pool = Service(Blocked(blocked=False), "tom", Settings(mode=""), 4), ThreadPoolExecutor(16)
    with serving(service) as url, pool, httpx.Client(base_url=url, timeout=60) as http:

        def ask(number: int) -> str:
            body = {"model": "tom:raw", "messages": [{"role": "user", "content": f"question {number}"}]}
            if number % 10 == 0:  # disconnects
                with http.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as reply:
                    next(reply.iter_lines())
                return f"begun question {number}"
            return http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]

        assert list(pool.map(ask, range(120))) == [f"begun question {number}" for number in range(120)]
        wait_until(lambda: service.active == 0)


@pytest.mark.slow
def test_500_requests_of_16_clients_to_a_real_model(raw, engine):
    """A tenth disconnect. The prompt's token count identifies each reply: texts differ between batches."""
    url, service = raw
    body = {"model": "base:raw", "temperature": 1.5, "max_tokens": 40}
    talks = [[{"role": "user", "content": "How many? " + "1 + " * (n % 60)}] for n in range(500)]
    with ThreadPoolExecutor(16) as pool, httpx.Client(base_url=url, timeout=300) as http:

        def ask(number: int) -> int | None:
            asked = body | {"messages": talks[number], "seed": number}
            if number % 10 == 0:  # disconnects
                with http.stream("POST", "/v1/chat/completions", json=asked | {"stream": True}) as reply:
                    next(reply.iter_lines())
                return None
            return http.post("/v1/chat/completions", json=asked).json()["usage"]["prompt_tokens"]

        lengths = [len(engine.chat_ids(talk)) if n % 10 else None for n, talk in enumerate(talks)]
        assert list(pool.map(ask, range(500))) == lengths
    wait_until(lambda: service.active == 0 and not engine.scheduler.active)


def test_a_second_signal_ends_requests_in_flight_with_an_error():
    service = Service(Blocked(), "tom", Settings(mode=""), 1)
    with serving(service) as url, ThreadPoolExecutor(2) as pool:
        given = {"json": {"model": "tom:raw", "messages": ASK}, "timeout": 60}
        asked = [pool.submit(httpx.post, f"{url}/v1/chat/completions", **given) for _ in range(2)]
        wait_until(lambda: service.active == 2)
        server = Server(service)
        server.handle_exit(signal.SIGINT, None)
        assert server.should_exit
        assert service.active == 2
        server.handle_exit(signal.SIGINT, None)
        replies = [each.result() for each in asked]
    assert [reply.status_code for reply in replies] == [503, 503]
    assert replies[0].json()["error"]["code"] == "shutting_down"


@pytest.mark.parametrize("clients", [1, pytest.param(16, marks=pytest.mark.slow)])
def test_sigterm_finishes_requests_in_flight(gguf, clients):
    options = ("--model", gguf, "--port", "0", "--parallel", "2", "--json")
    command = [sys.executable, "-m", "sclite", "serve", *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    begun, signalled = threading.Event(), threading.Event()
    try:
        served = json.loads(process.stdout.readline())
        assert (served["model"], served["file"]) == ("base", str(gguf))
        assert "has not been fitted" in served["note"]
        url = served["url"].removesuffix("/v1")
        body = {"model": "base:raw", "messages": ASK, "stream": True}
        body |= {"temperature": 1.9, "max_tokens": 300, "n": 2}

        def ask(_: int) -> list[str]:
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=300) as reply:
                lines = reply.iter_lines()
                next(lines)
                begun.set()
                signalled.wait()
                return list(lines)

        with ThreadPoolExecutor(clients) as pool:
            replies = pool.map(ask, range(clients))
            if clients > 1:  # all must have arrived; those that wait are answered, too
                active = 2 * clients
                wait_until(lambda: httpx.get(f"{url}/health").json()["active"] == active)
            begun.wait()
            process.send_signal(signal.SIGTERM)
            signalled.set()
            assert [rest[-2:] for rest in replies] == [["data: [DONE]", ""]] * clients
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.stdout.close()


def test_plain_text_grows_as_its_trace_does():
    growing = [plain_text(WRONG[:count], complete=False) for count in range(len(WRONG) + 1)]
    assert all(later.startswith(earlier) for earlier, later in pairwise(growing))
    assert plain_text(WRONG, complete=True) == "1. 2 + 2 = 4\n2. 4 + 1 = 6\n3. 6 + 1 = 7\nAnswer: 7"
    assert parse(WRONG).trace.answer == "7"
