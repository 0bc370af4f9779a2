"""Templates under a storm of errors and repeated kills: no invalid template, nothing paid twice."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from sclite.data.templates import check_template, write_templates
from sclite.records import Problem, Template
from sclite.run import Run
from sclite.settings import load
from sclite.teacher.client import Teacher
from sclite.teacher.ledger import Ledger, request_key
from sclite.teacher.sender import parameters_of
from tests.replay import BROKEN, HTML, TeacherServer, fail, say

KEY = "sk-storm-0123456789"
PROBLEMS = [
    Problem(id=f"p{i}", question=f"What is {i} + 1?", answer=str(i + 1), solution="Count on.")
    for i in range(200)
]


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def reply(answer, rule="Count on."):
    return f"<Step1>Count on by one.\n</Step1>\n<Generalized>{rule}</Generalized>\n<Answer>{answer}</Answer>"


def number_of(request):
    return int(request["messages"][1]["content"].split("What is ")[1].split(" ")[0])


def storm(request, nth):
    """A third of the first requests fail, in various ways; retries succeed."""
    answer = number_of(request) + 1
    issues = (
        fail(429, retry_after="0"), fail(500), BROKEN, HTML, say("Sure! Let me think."), say(reply(answer)[:40], "length"),
        say(reply(-12345)), say(reply(answer, "As the reference solution shows, count on.")), say("late", seconds=1.5),
    )  # fmt: skip
    draw = int(hashlib.sha256(str(request["messages"]).encode()).hexdigest(), 16) % 27
    again = nth > 1 or "could not be used" in request["messages"][1]["content"]
    return say(reply(answer)) if again or draw >= len(issues) else issues[draw]


def chosen(url, *more):
    named = ["teacher.model=openai/replay", f"teacher.api_base={url}", "teacher.timeout_seconds=1"]
    return load(None, [*named, "teacher.concurrency=16", *more], {}, own_file=False)


def build(run, settings, grader, problems=PROBLEMS):
    with Ledger(run.path("ledger.sqlite")) as ledger, Teacher(settings.teacher, ledger) as teacher:
        report = write_templates(settings, run, teacher=teacher, grader=grader, problems=problems)
        return report, ledger.totals()


@pytest.mark.parametrize("direct", ["true", "false"])
def test_storm_of_errors_ends_with_valid_templates_and_a_correct_ledger(tmp_path, grader, direct):
    run = Run(tmp_path / "run")
    with TeacherServer(storm) as server:
        settings = chosen(server.url, f"teacher.direct={direct}")
        report, totals = build(run, settings, grader)
        sent = len(server.requests)
        again, _ = build(run, settings, grader)
        assert len(server.requests) == sent
    rows = run.read("templates.jsonl", Template)
    assert [row.id for row in rows] == [problem.id for problem in PROBLEMS]
    assert all(check_template(r.trace, p, grader) is None for r, p in zip(rows, PROBLEMS, strict=True))
    assert report.counts["templates"] == again.counts["templates"] == len(PROBLEMS)
    assert totals["sent"] == sent
    assert totals["given_up"] > 0
    assert report.figures["repaired"] > 0


def test_api_key_is_in_no_file_of_the_run(tmp_path, grader):
    run = Run(tmp_path / "run")
    with TeacherServer(storm) as server:
        build(run, chosen(server.url), grader, PROBLEMS[:40])
    files = [path for path in run.folder.rglob("*") if path.is_file()]
    assert len(files) >= 4
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


CODE = """
import json, sys
from sclite.records import Problem
from tests.data.test_storm import PROBLEMS, build, chosen
from sclite.grading.worker import Grader
from sclite.run import Run
if __name__ == "__main__":
    with Grader() as grader:
        build(Run(sys.argv[1]), chosen(sys.argv[2]), grader)
"""


@pytest.mark.slow
def test_twenty_kills_repeat_only_requests_in_flight(tmp_path, grader):
    """Replies in the ledger are never requested again, requests in flight at most once more."""
    draw = random.Random(0)
    script, run = tmp_path / "build.py", Run(tmp_path / "run")
    script.write_text(CODE)
    with TeacherServer(lambda request, _: say(reply(number_of(request) + 1), seconds=0.3)) as server:
        settings = chosen(server.url)
        counts = []
        for _ in range(20):
            killed_after(
                0.6 * draw.random(), [sys.executable, str(script), str(run.folder), server.url], server
            )
            counts.append((held_replies(run, server), server.counts.copy()))
        _, totals = build(run, settings, grader)
        for held, before in counts:
            assert all(server.counts[asked] == before[asked] for asked in held)
        again = sum(count - 1 for count in server.counts.values())
        assert 0 < again <= totals["given_up"] <= 20 * settings.teacher.concurrency
        whole = Run(tmp_path / "whole")
        build(whole, settings, grader)
    print(f"{again} of {sum(server.counts.values())} requests were asked again; replies held at the kills:")
    print(*(len(held) for held, _ in counts))
    for name in ("templates.jsonl", "dropped.jsonl"):
        assert run.path(name).read_bytes() == whole.path(name).read_bytes()


def killed_after(seconds, command, server):
    """Start a build and kill it `seconds` after its first request."""
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    before, deadline = len(server.requests), time.monotonic() + 30
    while len(server.requests) == before and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()


def held_replies(run, server):
    """The messages whose replies are in the ledger of a killed build, as the server counts them."""
    parameters = parameters_of(chosen(server.url).teacher)
    with Ledger.reading(run.path("ledger.sqlite")) as ledger:
        asked = {json.dumps(request["messages"]) for request in server.requests}
        keys = {
            text: request_key("openai/replay", server.url, json.loads(text), parameters, 0, 0)
            for text in asked
        }
        return {text for text, key in keys.items() if ledger.get(key) is not None}
