"""ollama/NAME as a student, in front of a server that speaks Ollama's and OpenAI's HTTP API."""

import io
import json
from pathlib import Path

import pytest

from sclite.config import Config
from sclite.context import Context
from sclite.errors import DONE, NETWORK, USAGE
from sclite.progress import ProgressDisplay
from sclite.records import Problem
from sclite.run import Run
from sclite.student.base import Request
from sclite.trace import Step, Trace, render
from tests.replay import TeacherServer, say

WRONG = render(Trace((Step("2 + 2 = 4"), Step("4 + 1 = 6")), None, "6"))
CORRECTED = Step("4 + 1 = 6", None, "Too many.", "4 + 1 = 5")
REVIEW = render(Trace((Step("2 + 2 = 4"), CORRECTED, Step("So 5.")), None, "5"))


def answer(body, nth):
    """Solves incorrectly, and corrects what it is shown."""
    return say(REVIEW if "4 + 1 = 6" in body["messages"][-1]["content"] else WRONG)


@pytest.fixture
def ollama(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-123456")
    with TeacherServer(answer, {"me:latest": "sha256:1"}) as server:
        monkeypatch.setenv("OLLAMA_HOST", server.url.removeprefix("http://").removesuffix("/v1"))
        yield server


def test_chat_takes_the_model_as_an_argument_or_an_option(sclite, ollama, monkeypatch):
    Run("runs/default").replace("problems.jsonl", [Problem(id="p", question="1 + 1?", answer="2")])
    Path("ollama").mkdir()  # is not the model's
    ended = sclite("chat", "--model", "ollama/me", "--json", "How many?")
    assert (ended.code, ended.error) == (DONE, "")
    found = json.loads(ended.out)
    assert (found["answer"], found["accused"], found["correction"]) == ("5", 2, "4 + 1 = 5")
    assert [body["model"] for body in ollama.requests] == ["me"] * 2
    assert "sk-secret" not in str(ollama.keys)
    monkeypatch.setattr("sys.stdin", io.StringIO("How many?\nHow many?\n"))
    assert sclite("chat", "ollama/me").out.split() == ["5", "5"]
    assert len(ollama.requests) == 2  # from the ledger
    ollama.models["me:latest"] = "sha256:2"  # `ollama create me` again
    assert sclite("chat", "--model", "ollama/me", "How many?").code == DONE
    assert len(ollama.requests) == 4


def test_chat_without_a_run_writes_nothing_and_finds_the_quickstarts_run(sclite, ollama, tmp_path):
    left = tmp_path / "runs/default/ledger.sqlite"  # a ledger alone is not a run
    for before in (False, True):
        if before:
            left.parent.mkdir(parents=True)
            left.touch()
        ended = sclite("chat", "--model", "ollama/me", "How many?")
        assert (ended.code, ended.error) == (DONE, "")
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == [left] * before
    Run("runs/quickstart").replace("problems.jsonl", [Problem(id="p", question="1 + 1?", answer="2")])
    assert "runs/quickstart" in sclite("status").out
    assert len(ollama.requests) == 4  # nothing was stored, so it is requested again


def test_chat_through_the_ledger_of_a_busy_run_is_refused(sclite, ollama):
    Run("runs/default").replace("problems.jsonl", [Problem(id="p", question="1 + 1?", answer="2")])
    with Run("runs/default").lock():
        ended = sclite("chat", "--model", "ollama/me", "How many?")
    assert (ended.code, ollama.requests) == (USAGE, [])
    assert "another sclite process is using runs/default" in ended.error


def test_chat_with_another_endpoint_reviews_freely(sclite, ollama):
    Run("runs/default").replace("problems.jsonl", [Problem(id="p", question="1 + 1?", answer="2")])
    options = ("--model", "openai/large", "--set", f"attempts.api_base={ollama.url}", "--json", "How many?")
    found = json.loads(sclite("chat", *options).out)
    assert (found["answer"], found["accused"], found["correction"]) == ("5", 2, "4 + 1 = 5")
    found = json.loads(sclite("chat", "--no-self-correct", *options).out)
    assert (found["answer"], "accused" in found) == ("6", False)
    assert len(ollama.requests) == 2  # the solution is not paid for twice


def test_question_with_a_slash_is_no_model(sclite):
    for question in ("What is 3/4 of 8?", "1/2", "and/or x", "x/y=3"):
        assert "contains no GGUF" in sclite("chat", question).error


def test_evaluation_of_a_model_in_ollama(sclite, ollama):
    problems = [Problem(id=str(n), question=f"{n} + {n}?", answer="5" if n % 2 else "6") for n in range(40)]
    Run(".").replace("test.jsonl", problems)
    ended = sclite("eval", "test.jsonl", "--models", "ollama/me", "--json")
    assert (ended.code, ended.error) == (DONE, "")
    summary = json.loads(ended.out)
    figures, n = summary["models"]["ollama/me"], summary["n"]
    rows = Run("runs/default").path(f"{summary['folder']}/ollama/me.jsonl").read_text()
    odd = sum(f'"{problem.question}"' in rows for problem in problems[1::2])
    assert n == figures["n"] == rows.count("\n")
    assert figures["acc_t1"] == pytest.approx(1 - odd / n)
    assert figures["acc_t2"] == pytest.approx(odd / n)
    assert figures["tokens"] > 0
    asked = len(ollama.requests)
    assert sclite("eval", "test.jsonl", "--models", "ollama/me").code == DONE
    assert len(ollama.requests) == asked
    assert sclite("status", "--json").code == DONE


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("other", "has no model other", "ollama pull other; `ollama list` shows"),
        ("", "does not answer", "ollama serve"),
    ],
)
def test_what_is_missing_in_ollama_is_reported(sclite, ollama, monkeypatch, name, message, hint):
    if not name:
        monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    for command in (("chat", "--model", f"ollama/{name or 'me'}", "1?"), ("chat", f"ollama/{name or 'me'}")):
        ended = sclite(*command)
        assert ended.code == NETWORK
        assert message in ended.error
        assert hint in ended.hint
    assert ollama.requests == []


def test_attempts_are_sampled_from_a_model_in_ollama(run, ollama):
    tree = {"attempts": {"student": "ollama/me"}, "teacher": {"max_cost": 1.0}}
    context = Context(Config.model_validate(tree), run, ProgressDisplay(quiet=True))
    requests = [Request(({"role": "user", "content": "1?"},), temperature=0.8, seed=seed) for seed in (1, 2)]
    with context.student("", "attempts") as student:
        assert [reply.text for reply in student.generate(requests)] == [WRONG, WRONG]
    assert sorted(body["seed"] for body in ollama.requests) == [1, 2]
