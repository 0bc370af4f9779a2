"""Templates under a storm of errors, kills and interrupts: no invalid template, nothing paid twice."""

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
from sclite.records import Template
from sclite.run import Run
from sclite.settings import load
from sclite.teacher.ledger import Ledger
from sclite.teacher.sender import Sender
from sclite.trace import Trace
from tests.replay import BROKEN, HTML, TeacherServer, client, fail, number_of, say, sums, template

KEY = "sk-storm-0123456789"
PROBLEMS = sums(200)


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def right(request, seconds):
    return say(template(number_of(request) + 1), seconds=seconds)


def storm(request, nth):
    """A third of the first requests fail, in various ways; retries succeed."""
    answer = number_of(request) + 1
    issues = (
        fail(429, retry_after="0"), fail(500), BROKEN, HTML, say("Sure! Let me think."),
        say(template(answer)[:40], "length"), say(template(-12345)), say("late", seconds=1.5),
        say(template(answer, rule="As the reference solution shows, count on.")),
    )  # fmt: skip
    draw = int(hashlib.sha256(str(request["messages"]).encode()).hexdigest(), 16) % 27
    again = nth > 1 or "could not be used" in request["messages"][1]["content"]
    return say(template(answer)) if again or draw >= len(issues) else issues[draw]


def chosen(url, *more):
    named = ["teacher.model=openai/replay", f"teacher.api_base={url}", "teacher.timeout_seconds=1"]
    return load(None, [*named, "teacher.concurrency=16", *more], {}, own_file=False)


def build(run, settings, grader, problems=PROBLEMS, **options):
    with client(run, settings.teacher) as teacher:
        report = write_templates(settings, run, teacher=teacher, grader=grader, problems=problems, **options)
        return report, teacher.ledger.totals()


@pytest.mark.parametrize("direct", ["true", "false"])
def test_storm_of_errors_ends_with_valid_templates_and_a_correct_ledger(run, grader, direct):
    with TeacherServer(storm) as server:
        settings = chosen(server.url, f"teacher.direct={direct}")
        report, totals = build(run, settings, grader)
        sent = len(server.requests)
        again, _ = build(run, settings, grader)
        assert len(server.requests) == sent
    rows = run.read("templates.jsonl", Template)
    assert [row.id for row in rows] == [problem.id for problem in PROBLEMS]
    checked = (check_template(r.trace, p, grader) for r, p in zip(rows, PROBLEMS, strict=True))
    assert all(isinstance(found, Trace) for found in checked)
    assert report.counts["templates"] == again.counts["templates"] == len(PROBLEMS)
    assert totals["sent"] == sent
    assert totals["given_up"] > 0
    assert report.figures["repaired"] > 0
    files = [path for path in run.folder.rglob("*") if path.is_file()]
    assert len(files) >= 4
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


PROGRAM = """
import sys
from tests.data.test_storm import PROBLEMS, build, chosen
from sclite.grading.grader import Grader
from sclite.run import Run
if __name__ == "__main__":
    folder, url, count, *more = sys.argv[1:]
    run, show = Run(folder), lambda done, total, spent: print(done, flush=True)
    with run.lock(), Grader() as grader:
        build(run, chosen(url, *more), grader, PROBLEMS[:int(count)], progress=show)
"""


@pytest.fixture
def start(tmp_path, run):
    """Start building `count` templates in a separate process."""
    script = tmp_path / "build.py"
    script.write_text(PROGRAM)

    def start(server, count, *more):
        command = [sys.executable, str(script), str(run.folder), server.url, str(count), *more]
        environment, pipe = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, subprocess.PIPE
        return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)

    return start


def wait_for_row(process, number):
    while process.stdout.readline().strip() not in (str(number), ""):
        pass


def test_after_a_kill_replies_in_the_ledger_are_not_requested_again(run, start):
    with TeacherServer(lambda request, nth: right(request, 0.05)) as server:
        process = start(server, 60, "teacher.concurrency=4")
        wait_for_row(process, 20)
        process.kill()
        process.communicate()
        with Ledger(run.path("ledger.sqlite")) as ledger:
            paid = ledger.totals()["requests"]
        before = len(server.requests)
        assert 20 <= paid <= before < 60
        assert len(run.read("templates.jsonl", Template)) >= 19
        second = start(server, 60, "teacher.concurrency=4")
        _, errors = second.communicate()
        assert (second.returncode, errors) == (0, "")
    assert len(server.requests) - before == 60 - paid
    rows = run.read("templates.jsonl", Template)
    assert [row.id for row in rows] == [f"p{i}" for i in range(60)]


def test_interrupt_stops_without_waiting_and_with_one_traceback(start):
    def answer(request, nth):  # the last 20 take a minute
        return right(request, 0.05 if number_of(request) < 40 else 60)

    with TeacherServer(answer) as server:
        process = start(server, 60, "teacher.concurrency=4", "teacher.timeout_seconds=90")
        wait_for_row(process, 20)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=50)  # the replies in flight take 60 s
    assert errors.strip().splitlines()[-1] == "KeyboardInterrupt"
    assert errors.count("Traceback") == 1


@pytest.mark.slow
def test_twenty_kills_repeat_only_requests_in_flight(tmp_path, run, start, grader):
    """Replies in the ledger are never requested again, requests in flight at most once more."""
    draw = random.Random(0)
    with TeacherServer(lambda request, _: right(request, 0.3)) as server:
        settings = chosen(server.url)
        counts = []
        for _ in range(20):
            process = start(server, len(PROBLEMS))
            before, deadline = len(server.requests), time.monotonic() + 30
            while len(server.requests) == before and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.6 * draw.random())
            process.kill()
            process.wait()
            counts.append((held_replies(run, server), server.counts.copy()))
        _, totals = build(run, settings, grader)
        for held, before in counts:
            assert all(server.counts[asked] == before[asked] for asked in held)
        again = sum(count - 1 for count in server.counts.values())
        assert 0 < again <= totals["given_up"] <= 20 * settings.teacher.concurrency
        whole = Run(tmp_path / "whole")
        build(whole, settings, grader)
    print(f"{again} of {sum(server.counts.values())} requests were repeated; replies in the ledger at kills:")
    print(*(len(held) for held, _ in counts))
    for name in ("templates.jsonl", "dropped.jsonl"):
        assert run.path(name).read_bytes() == whole.path(name).read_bytes()


def held_replies(run, server):
    """The messages whose replies are in the ledger of a killed build, as the server counts them."""
    sender = Sender(chosen(server.url).teacher, ledger=None, budget=None)
    with Ledger.reading(run.path("ledger.sqlite")) as ledger:
        asked = {json.dumps(request["messages"]) for request in server.requests}
        return {text for text in asked if ledger.get(sender.key(json.loads(text), 0, 0, {})) is not None}
