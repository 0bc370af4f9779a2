"""A project whose student learns a mistake that it can correct, cheap enough to run through every stage.

In the problems that SFT learns, Tom gets 10 nuts, in all others 20, and the teacher's templates know of 10 only: those of the
others are dropped. So the student solves every problem with 10, also after stage 2, which replays what SFT has learned, and the
teacher corrects every attempt to 20. The words are those that the bundled student knows.

    with nuts_project(folder):
        run_command(folder, "build-data")
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import tomlkit

from sclite.config import Config
from sclite.data.problems import split_problems
from sclite.quickstart.flow import DEFAULTS
from sclite.records import Problem
from sclite.trace import Step, Trace, parse, render
from tests.replay import TeacherServer, say
from tests.toy import write_rows

OWN = {
    "sft": {"num_train_epochs": 6},
    "attempts": {"samples": 1, "reviews": 1, "temperature": 0.3},
    "warmup": {"num_train_epochs": 3},
}
QUESTION = "Tom has {} nuts. How many nuts does Tom have now?"
WORK = "The student's work:\n"
KEPT = ("student", "attempts", "sft", "warmup", "dpo", "export", "eval")  # of the quickstart


def run_command(folder: Path, *arguments: str, text: str = "") -> str:
    """What a command prints, run in its own process."""
    command = [sys.executable, "-m", "sclite", *arguments]
    environment = {**os.environ, "OPENAI_API_KEY": "sk-test"}
    options = {"cwd": folder, "env": environment, "capture_output": True, "text": True, "check": False}
    done = subprocess.run(command, input=text, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def nuts_project(folder: Path, **own: Mapping[str, object]) -> Iterator[TeacherServer]:
    """Problems and a configuration in the folder, with the bundled student and a teacher behind HTTP."""
    asked = [Problem(id=f"p{n}", question=QUESTION.format(n), answer="?") for n in range(10, 210)]
    learned = {problem.id for problem in split_problems(Config(), asked).sft}
    more = {n: 10 if f"p{n}" in learned else 20 for n in range(10, 210)}
    rows = [{"id": f"p{n}", "question": QUESTION.format(n), "answer": str(n + more[n])} for n in more]
    write_rows(folder / "nuts.jsonl", rows)
    others = [{"question": QUESTION.format(n), "answer": str(n + 20)} for n in range(210, 230)]
    write_rows(folder / "others.jsonl", others)

    def reply(request, nth):
        text = request["messages"][-1]["content"]
        n, work = int(re.search(r"Tom has (\d+) nuts\. How", text)[1]), text.partition(WORK)[2]
        got = more[n] if work else 10
        last = f"With the new ones {n} + {got} = {n + got} nuts."
        steps = (Step(f"Tom has {n} nuts."), Step(last))
        if work:  # its last step is wrong
            first = parse(work).trace.steps
            steps = (*first[:-1], replace(first[-1], cause="The change is not 10.", correction=last))
        return say(render(Trace(steps, "Follow the amount through each change.", str(n + got))))

    with TeacherServer(reply) as server:
        tree = {name: {**DEFAULTS[name], **OWN.get(name, {}), **own.get(name, {})} for name in KEPT}
        tree["teacher"] = {"model": "openai/replay", "api_base": server.url, "repairs": 0}
        tree["problems"] = {"source": "nuts.jsonl"}
        (folder / "sclite.toml").write_text(tomlkit.dumps(tree))
        yield server
