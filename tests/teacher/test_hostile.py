"""A hostile server: whatever it sends, the limit is kept, nothing hangs, and every row becomes a template or a drop."""

import json
import os
import random
import subprocess
import sys

import pytest

from sclite.records import Drop, Template
from sclite.run import Run
from sclite.teacher.ledger import Ledger
from tests.replay import BROKEN, HTML, Answer, TeacherServer, fail, number_of, say, sums, template

IN_FLIGHT, LIMIT, MAX_TOKENS = 64, 0.05, 200
PRICE = (1.0, 10.0)  # US dollars per million tokens


def with_usage(text, usage, **more):
    return Answer(body={**say(text).body, "usage": usage, **more})


def written(text, usage=None):
    """A reply, and how many tokens the server really generated: one per word."""
    return with_usage(text, usage), len(text.split())


def kinds(text):
    """What this server may do with a question: (answer, tokens generated for it)."""
    long, surrogate = text + " and" * 2 * MAX_TOKENS, text.replace("Count on.", "Count \ud83d on.")
    count = {"prompt_tokens": 20, "completion_tokens": 30, "total_tokens": 50}
    return [
        written(text, count), written(text, count), written(text, count), written(text), written(surrogate, count),
        written(text, {name: 2**70 for name in count}), written(text, {name: 0 for name in count}),
        written(text, {name: -5 for name in count}), written(text, {name: str(n) for name, n in count.items()}),
        written(text, {name: float("inf") for name in count}), written(text, {name: float("nan") for name in count}),
        written(text, {name: True for name in count}), written(text, [1]), written(long, count),
        (Answer(body=json.dumps(say(text).body).encode(), broken=True), len(text.split())),
        (Answer(body=b"x" * 20_000_000), MAX_TOKENS), (BROKEN, 30),
        (with_usage(text, count, choices=[{"finish_reason": ["stop"], "message": {"content": text}}]), 30),
        written("", {**count, "completion_tokens": 0}), (HTML, 0), (fail(500), 0), (fail(429, retry_after="0"), 0),
        (Answer(301, b"", {"Location": "/elsewhere"}), 0), (Answer(200, {"error": {"message": "busy", "code": 503}}), 0),
    ]  # fmt: skip


def hostile(request, nth, book, no_redirect):
    question = request["messages"][-1]["content"]
    number = number_of(request)
    found = kinds(template(number + 1, step="Count on."))
    draw = random.Random(f"{number} {nth} {len(question)}")
    answer, tokens = draw.choice([k for k in found if k[0].status != 301] if no_redirect else found)
    sent = sum(len(m["content"].split()) for m in request["messages"])
    book.append((sent, tokens))
    return answer


@pytest.mark.parametrize("direct", ["true", "false"])
def test_limit_holds_against_a_hostile_server_and_no_row_is_lost(tmp_path, direct):
    problems, run, book = tmp_path / "p.jsonl", Run(tmp_path / "run"), []
    problems.write_text("".join(row.model_dump_json() + "\n" for row in sums(100, solution=None)))
    with TeacherServer(lambda request, nth: hostile(request, nth, book, True)) as server:
        done = build(server, run, problems, direct, LIMIT)
        limited = list(book)
        assert done.returncode == 4, done.stderr
        last = build(server, run, problems, direct, 1000)
    for process in (done, last):
        assert "Traceback" not in process.stderr
        assert process.returncode in (0, 4)
    assert last.returncode == 0, last.stderr
    spent = sum(cost(sent, min(tokens, MAX_TOKENS)) for sent, tokens in limited)
    beyond = IN_FLIGHT * cost(0, MAX_TOKENS)  # the long replies have three times max_tokens
    assert 0 < spent <= LIMIT
    assert sum(cost(*each) for each in limited) <= LIMIT + beyond
    with Ledger.reading(run.path("ledger.sqlite")) as ledger:
        totals = ledger.totals()
    assert totals["cost_usd"] + totals["lost_usd"] >= sum(cost(*each) for each in book)
    kept = {row.id for row in run.rows("templates.jsonl", Template)}
    dropped = {row.id: row.reason for row in run.rows("dropped.jsonl", Drop)}
    assert len(kept) + len(dropped) == 100
    assert not kept & dropped.keys()
    assert len(kept) > 50
    assert all("\ufffd" not in row.trace for row in run.rows("templates.jsonl", Template))


def cost(sent, tokens):
    return (sent * PRICE[0] + tokens * PRICE[1]) / 1e6


def arguments(server, run, problems, direct, limit):
    chosen = {
        "model": "openai/replay", "api_base": server.url, "direct": direct, "price": list(PRICE),
        "concurrency": IN_FLIGHT, "max_tokens": MAX_TOKENS, "max_cost": limit, "attempts_per_call": 2,
        "timeout_seconds": 20,
    }  # fmt: skip
    settings = [word for name, value in chosen.items() for word in ("--set", f"teacher.{name}={value}")]
    named = ("build-data", str(problems), "--run", str(run.folder), "--yes", "--only", "templates")
    return [*named, *settings]


def build(*given):
    command = [sys.executable, "-m", "sclite", *arguments(*given)]
    environment = {**os.environ, "OPENAI_API_KEY": "sk-x", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_redirect_is_not_a_reply(sclite, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-x")  # which the fixture sclite removes
    problems = tmp_path / "p.jsonl"
    problems.write_text('{"question": "What is 1 + 1?", "answer": "2"}\n')
    answer = Answer(302, b"", {"Location": "http://me:secret@elsewhere/v1"})
    with TeacherServer(lambda request, nth: answer) as server:
        ended = sclite(*arguments(server, Run(tmp_path / "run"), problems, "true", 1))
    assert ended.code == 6
    assert "redirects to http://elsewhere/v1 (HTTP 302)" in ended.err.replace("\n", " ")
    assert "teacher.api_base" in ended.err
