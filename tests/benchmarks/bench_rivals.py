"""Problems per second of build-data, bespokelabs-curator and synthetic-data-kit.

    python -m tests.benchmarks.bench_rivals --teacher "replay-teacher --problems p.jsonl" --problems p.jsonl \\
        --curator-python venv-curator/bin/python --kit-python venv-kit/bin/python

`--teacher` is a command that serves OpenAI's chat completions and prints its port; it is run with `--port 0 --latency
SECONDS`. The other tools need their own virtual environments: `pip install bespokelabs-curator`, `pip install
synthetic-data-kit`.

All tools get the same problems, chats, server and concurrency; each run has a fresh server, process, home and cache, and
the tools take turns. sclite does all of its work: ledger, check, grader, rows. drive_rivals describes what the others do. A
tool with missing replies has failed, and its time does not count.

Three times per tool: `requests`, from the first connection to the last reply; `call`, the tool's own call; `process`,
with start and imports. Ratios are medians over the rounds of theirs / ours: above 1, sclite is faster.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from sclite import prompts
from sclite.config import Source
from sclite.data.problems import load_problems
from sclite.records import Problem
from tests.benchmarks.bench_teacher import WARM_UP, serve
from tests.benchmarks.turns import argument_parser

HERE = Path(__file__).resolve().parent
TIMES = ("requests", "call", "process")


@dataclass(frozen=True)
class Timing:
    """One run: seconds by the names in TIMES, CPU seconds of the process and its children, maximum calls in flight."""

    requests: float
    call: float
    process: float
    cpu: float
    most_in_flight: int


def environment_of(home: Path) -> dict[str, str]:
    """The environment variables of a run: its own home, no keys, no telemetry, no price list from the network."""
    kept = {name: value for name, value in os.environ.items() if not name.endswith(("_API_KEY", "_PROXY"))}
    kept |= {"HOME": str(home), "OPENAI_API_KEY": "none", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    kept |= {"TELEMETRY_ENABLED": "false", "CURATOR_VIEWER": "false"}
    kept.pop("PYTHONDONTWRITEBYTECODE", None)  # measured with bytecode, as installed
    return kept


def write_inputs(work: Path, problems: list[Problem]) -> None:
    """Write what the drivers read: the problems for sclite, and the chats that it makes of them for the others."""
    asked = [prompts.teacher_messages(p.question, p.solution or p.answer, p.answer) for p in problems]
    chats = [{"id": p.id, "messages": chat} for p, chat in zip(problems, asked, strict=True)]
    for name, rows in (("problems", [p.model_dump() for p in problems]), ("requests", chats)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (work / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def run_tool(options, tool: str, python: str, problems: list[Problem], latency: float) -> Timing | str:
    """One run of one tool; the last line of its errors if it failed."""
    with serve(options.teacher, latency) as url, tempfile.TemporaryDirectory() as folder:
        work, environment = Path(folder), environment_of(Path(folder))
        write_inputs(work, problems)
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
        output = [(work / name).read_text(errors="replace").splitlines() for name in ("stdout", "stderr")]
        if process.returncode:
            return f"exit {process.returncode}: {output[1][-1] if output[1] else ''}"
        found = json.loads(output[0][-1])
        if found["replies"] != len(problems) or stats["paid"] != len(problems):
            return f"{found['replies']} of {len(problems)} replies, {stats['paid']} paid"
        times = (found["seconds"], found["call_seconds"], seconds)
        return Timing(*times, used.ru_utime + used.ru_stime, stats["most_in_flight"])


def measure(options, tools: dict[str, str], problems: list[Problem], latency: float) -> None:
    """Run all tools in each round, starting with a different one each time; then print the table."""
    rounds: dict[str, list[Timing]] = {tool: [] for tool in tools}
    failed: dict[str, str] = {}
    names = list(tools)
    for number in range(options.runs):
        for tool in [*names[number % len(names) :], *names[: number % len(names)]]:
            if tool in failed:
                continue
            timing = run_tool(options, tool, tools[tool], problems, latency)
            if isinstance(timing, str):
                failed[tool] = timing
            else:
                rounds[tool].append(timing)
    count, ideal = len(problems), len(problems) * latency / options.in_flight
    print(
        f"\n{options.model}, latency {latency} s, {options.in_flight} in flight, {count} problems, {options.runs} rounds; "
        f"the server allows {count / ideal:.0f}/s"
    )
    heads = "".join(f"{name + ' s':>12}{'ratio':>8}" for name in TIMES)
    print(f"{'tool':18}{'problems/s':>12}{heads}{'CPU s':>8}{'in flight':>11}")
    for tool in names:
        if tool in failed:
            print(f"{tool:18}  failed: {failed[tool]}")
        else:
            print_row(tool, rounds[tool], rounds["sclite"], count)


def print_row(tool: str, theirs: list[Timing], ours: list[Timing], count: int) -> None:
    line = f"{tool:18}{count / statistics.median(r.requests for r in theirs):12.1f}"
    for name in TIMES:
        seconds = [getattr(timing, name) for timing in theirs]
        ratios = [mine / getattr(r, name) for mine, r in zip(seconds, ours, strict=True)]
        line += f"{statistics.median(seconds):12.2f}{statistics.median(ratios):8.2f}"
    most = max(timing.most_in_flight for timing in theirs)
    print(f"{line}{statistics.median(r.cpu for r in theirs):8.2f}{most:11}", flush=True)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--problems", required=True)
    parser.add_argument("--curator-python", help="an interpreter with bespokelabs-curator")
    parser.add_argument("--kit-python", help="an interpreter with synthetic-data-kit")
    parser.add_argument("--model", default="openai/replay", help="sclite's teacher.model, a LiteLLM name")
    parser.add_argument("--latency", type=float, nargs="+", default=[0.5, 0.05], help="seconds")
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--count", type=int, default=500, help="problems")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    tools = {"sclite": sys.executable}
    others = {("curator", "curator, LiteLLM"): options.curator_python, ("kit",): options.kit_python}
    for names, python in others.items():
        tools |= dict.fromkeys(names, str(Path(python).absolute())) if python else {}
    problems = load_problems(Source(source=options.problems), options.count)
    for tool, python in tools.items():  # warm up bytecode and file cache
        run_tool(options, tool, python, problems[:WARM_UP], 0.0)
    for latency in options.latency:
        measure(options, tools, problems, latency)


if __name__ == "__main__":
    main()
