"""build-data's problems per second over those of bespokelabs-curator and synthetic-data-kit, side by side.

    python tests/benchmarks/bench_rivals.py --teacher "replay-teacher --problems p.jsonl" --problems p.jsonl \\
        --curator-python venv-curator/bin/python --kit-python venv-kit/bin/python

`--teacher` is a command that serves OpenAI's chat completions and prints its port; `--port 0 --latency SECONDS` is added.
The others want virtual environments of their own: `pip install bespokelabs-curator`, `pip install synthetic-data-kit`.

Same problems, chats, server and concurrency for all; each run has a fresh server, process, home and cache, and the tools
take turns. sclite does all of its work: ledger, check, grader, rows. What the others do is said in drive_rivals. A tool
whose replies are not all there has failed, and its time does not count.

Three times for each tool: `requests`, from the first connection to the last reply; `call`, the tool's own call from
beginning to end; `process`, with start and imports. Ratios are medians over the rounds of theirs / ours: above 1 we are
faster.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sclite import prompts
from sclite.data.problems import load_problems
from sclite.records import Problem

HERE = Path(__file__).resolve().parent
TIMES = ("requests", "call", "process")
WARM_UP = 64  # problems


@dataclass(frozen=True)
class Reading:
    """One run: seconds under the names in TIMES, CPU seconds of the process and its children, calls in flight at most."""

    requests: float
    call: float
    process: float
    cpu: float
    most_in_flight: int


@contextmanager
def serving(command: str, latency: float) -> Iterator[str]:
    process = subprocess.Popen(
        [*shlex.split(command), "--port", "0", "--latency", str(latency)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
    finally:
        process.terminate()
        process.wait()


def surroundings(home: Path) -> dict[str, str]:
    """The environment of a run: a home of its own, no key, no telemetry, no price list from the net."""
    kept = {name: value for name, value in os.environ.items() if not name.endswith(("_API_KEY", "_PROXY"))}
    kept |= {"HOME": str(home), "OPENAI_API_KEY": "none", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    kept |= {"TELEMETRY_ENABLED": "false", "CURATOR_VIEWER": "false"}
    kept.pop("PYTHONDONTWRITEBYTECODE", None)  # measured as installed, with its bytecode
    return kept


def write_work(work: Path, problems: list[Problem]) -> None:
    """What the drivers read: the problems for sclite, and for the others the very chats that it makes of them."""
    chats = [
        {"id": p.id, "messages": prompts.template_messages(p.question, p.solution or p.answer, p.answer)}
        for p in problems
    ]
    for name, rows in (("problems", [p.model_dump() for p in problems]), ("requests", chats)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (work / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def read(options, tool: str, python: str, problems: list[Problem], latency: float) -> Reading | str:
    """One run of one tool; the end of what it said where it failed."""
    with serving(options.teacher, latency) as url, tempfile.TemporaryDirectory() as folder:
        work, environment = Path(folder), surroundings(Path(folder))
        write_work(work, problems)
        command = [python, str(HERE / "drive_rivals.py"), tool, url, folder, str(options.in_flight)]
        environment.pop("PYTHONPATH", None)
        if tool == "sclite":
            command.append(options.model)
            environment["PYTHONPATH"] = str(HERE.parents[1])
        with (work / "stdout").open("w+") as out, (work / "stderr").open("w+") as errors:
            began = time.monotonic()
            process = subprocess.Popen(command, cwd=work, env=environment, stdout=out, stderr=errors)
            _, status, used = os.wait4(process.pid, 0)
            seconds = time.monotonic() - began
            process.returncode = os.waitstatus_to_exitcode(status)
        with urllib.request.urlopen(f"{url}/stats") as reply:
            stats = json.load(reply)
        said = [(work / name).read_text(errors="replace").splitlines() for name in ("stdout", "stderr")]
        if process.returncode:
            return f"exit {process.returncode}: {said[1][-1] if said[1] else ''}"
        found = json.loads(said[0][-1])
        if found["replies"] != len(problems) or stats["paid"] != len(problems):
            return f"{found['replies']} of {len(problems)} replies, {stats['paid']} paid for"
        times = (found["seconds"], found["call_seconds"], seconds)
        return Reading(*times, used.ru_utime + used.ru_stime, stats["most_in_flight"])


def measure(options, tools: dict[str, str], problems: list[Problem], latency: float) -> None:
    """Rounds in which every tool has its turn, each round beginning with another one; then the table."""
    rounds: dict[str, list[Reading]] = {tool: [] for tool in tools}
    failed: dict[str, str] = {}
    names = list(tools)
    for number in range(options.runs):
        for tool in [*names[number % len(names) :], *names[: number % len(names)]]:
            if tool in failed:
                continue
            reading = read(options, tool, tools[tool], problems, latency)
            if isinstance(reading, str):
                failed[tool] = reading
            else:
                rounds[tool].append(reading)
    count, ideal = len(problems), len(problems) * latency / options.in_flight
    print(
        f"\n{options.model}, latency {latency} s, {options.in_flight} in flight, {count} problems, {options.runs} rounds; "
        f"the server allows {count / ideal:.0f}/s"
    )
    heads = "".join(f"{name + ' s':>12}{'ratio':>8}" for name in TIMES)
    print(f"{'tool':18}{'problems/s':>12}{heads}{'CPU s':>8}{'in flight':>11}")
    for tool in names:
        if tool in failed:
            print(f"{tool:18}  could not run: {failed[tool]}")
        else:
            print_row(tool, rounds[tool], rounds["sclite"], count)


def print_row(tool: str, theirs: list[Reading], ours: list[Reading], count: int) -> None:
    line = f"{tool:18}{count / statistics.median(r.requests for r in theirs):12.1f}"
    for name in TIMES:
        seconds = [getattr(reading, name) for reading in theirs]
        ratios = [mine / getattr(r, name) for mine, r in zip(seconds, ours, strict=True)]
        line += f"{statistics.median(seconds):12.2f}{statistics.median(ratios):8.2f}"
    most = max(reading.most_in_flight for reading in theirs)
    print(f"{line}{statistics.median(r.cpu for r in theirs):8.2f}{most:11}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--problems", required=True)
    parser.add_argument("--curator-python", help="an interpreter that has bespokelabs-curator")
    parser.add_argument("--kit-python", help="an interpreter that has synthetic-data-kit")
    parser.add_argument("--model", default="openai/replay", help="sclite's teacher.model, a LiteLLM name")
    parser.add_argument("--latency", type=float, nargs="+", default=[0.5, 0.05], help="seconds")
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--count", type=int, default=500, help="problems")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    tools = {"sclite": sys.executable}
    for python, names in (
        (options.curator_python, ("curator", "curator, LiteLLM")),
        (options.kit_python, ("kit",)),
    ):
        tools |= dict.fromkeys(names, str(Path(python).absolute())) if python else {}
    problems = load_problems(options.problems, limit=options.count)
    for tool, python in tools.items():  # bytecode and file cache
        read(options, tool, python, problems[:WARM_UP], 0.0)
    for latency in options.latency:
        measure(options, tools, problems, latency)


if __name__ == "__main__":
    main()
