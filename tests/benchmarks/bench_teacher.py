"""build-data: throughput relative to the endpoint's maximum, CPU per call, and memory growth.

    python -m tests.benchmarks.bench_teacher --teacher "replay-teacher --problems p.jsonl" --problems p.jsonl
    python -m tests.benchmarks.bench_teacher --teacher .. --problems .. --memory

`--teacher` is a command that serves OpenAI's chat completions and prints its port; it is run with `--port 0 --latency
SECONDS`.
"""

import asyncio
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path

from sclite import config
from sclite.config import Source
from sclite.data.problems import load_problems
from sclite.data.templates import write_templates
from sclite.grading.grader import Grader
from sclite.run import Run
from sclite.settings import load
from sclite.teacher.client import Teacher
from sclite.teacher.ledger import Ledger
from sclite.teacher.provider import Provider
from tests.benchmarks.turns import argument_parser

WARM_UP = 64  # problems


@contextmanager
def serve(command: str, latency: float) -> Iterator[str]:
    """Run the teacher's command; yields its base URL."""
    command = [*shlex.split(command), "--port", "0", "--latency", str(latency)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
    finally:
        process.terminate()
        process.wait()


def settings(url: str, in_flight: int, *more: str) -> config.Config:
    chosen = ["teacher.model=openai/replay", f"teacher.api_base={url}", f"teacher.concurrency={in_flight}"]
    return load(None, [*chosen, *more], {}, own_file=False)


def time_build(chosen: config.Config, problems, folder: Path) -> tuple[float, int]:
    """Seconds from the first request after the warm-up to the last reply, and the number of templates."""
    run = Run(folder)
    with Grader() as grader, Ledger(run.path("l")) as ledger, Teacher(chosen.teacher, ledger) as teacher:
        given = {"teacher": teacher, "grader": grader}
        write_templates(chosen, run, problems=problems[:WARM_UP], **given)
        began, last = time.monotonic(), 0.0

        def progress(*_):
            nonlocal last
            last = time.monotonic()

        report = write_templates(chosen, run, problems=problems, progress=progress, **given)
        return last - began, report.counts["templates"] - WARM_UP


def measure_throughput(options, problems) -> None:
    for latency, count, runs in ((1.0, 1920, 1), (0.1, 1920, 3)):
        shares, rates = [], []
        for _ in range(runs):
            with serve(options.teacher, latency) as url, tempfile.TemporaryDirectory() as folder:
                chosen = settings(url, options.in_flight)
                seconds, kept = time_build(chosen, problems[: WARM_UP + count], Path(folder))
            shares.append(count * latency / options.in_flight / seconds)
            rates.append(count / seconds)
        rate, share = statistics.median(rates), statistics.median(shares)
        start = f"latency {latency} s, {options.in_flight} in flight, {count} problems, {kept} kept"
        print(f"{start}: {rate:.1f}/s, {share:.3f} of the maximum (median of {runs})")


class Timed:
    """An awaitable that counts the CPU seconds of a coroutine's own steps, without its waits."""

    def __init__(self, coroutine: Coroutine, cpu: Counter, name: str):
        self.steps, self.cpu, self.name = coroutine.__await__(), cpu, name

    def __await__(self):
        value = thrown = None
        while True:
            began = time.thread_time()
            try:
                waiting = self.steps.send(value) if thrown is None else self.steps.throw(thrown)
            except StopIteration as end:
                return end.value
            finally:
                self.cpu[self.name] += time.thread_time() - began
            value = thrown = None
            try:
                value = yield waiting
            except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - passed on to the coroutine
                thrown = error


def count_cpu(owner: type, name: str, cpu: Counter) -> None:
    """Let a coroutine method count the CPU seconds of its steps."""
    method = getattr(owner, name)

    async def timed(*arguments, **named):
        return await Timed(method(*arguments, **named), cpu, name)

    setattr(owner, name, timed)


def measure_cpu(options, problems, count: int = 1000) -> None:
    """CPU time of a call, split into our code and the library, with and without LiteLLM."""
    cpu: Counter = Counter()
    count_cpu(Teacher, "_work", cpu)
    count_cpu(Provider, "complete", cpu)
    litellm = cpu_per_call(options, problems, count, cpu, "false")
    direct = cpu_per_call(options, problems, count, cpu, "true")
    theirs = print_cpu("LiteLLM", litellm)
    print_cpu("the OpenAI SDK", direct)
    print(f"our code is {sum(ours(direct).values()) / theirs:.1%} of LiteLLM and its event loop")


def cpu_per_call(options, problems, count: int, cpu: Counter, direct: str) -> Counter:
    """CPU milliseconds of a call by thread, and by counted method in the loop's thread."""
    with serve(options.teacher, 0.0) as url, tempfile.TemporaryDirectory() as folder:
        chosen, run = settings(url, options.in_flight, f"teacher.direct={direct}"), Run(folder)
        with Grader() as grader, Ledger(run.path("l")) as ledger, Teacher(chosen.teacher, ledger) as teacher:
            given = {"teacher": teacher, "grader": grader}
            write_templates(chosen, run, problems=problems[:WARM_UP], **given)
            before = cpu | cpu_seconds()
            write_templates(chosen, run, problems=problems[: WARM_UP + count], fresh=True, **given)
            spent = cpu | cpu_seconds()
    return Counter({name: 1e3 * (spent[name] - before[name]) / count for name in spent})


def ours(used: Counter) -> dict[str, float]:
    return {"asking": used["_work"] - used["complete"], "checks": used["check"]}


def print_cpu(name: str, used: Counter) -> float:
    """Print the parts of a call; return that of the library and the event loop."""
    mine = ours(used)
    others = used["MainThread"] - mine["asking"] + used["asyncio"]
    parts = ", ".join(f"{part} {milliseconds:.2f}" for part, milliseconds in mine.items())
    own = f"({used['complete']:.2f} in its own steps)"
    print(f"CPU per call: {others:.2f} ms in {name}, the event loop and the rows {own}")
    print(f"  {sum(mine.values()):.2f} ms in our code ({parts})")
    return others


def cpu_seconds() -> Counter:
    """CPU seconds of this process's threads, by the first word of their names."""
    cpu: Counter = Counter()
    for thread in threading.enumerate():
        clock = time.pthread_getcpuclockid(thread.ident)
        cpu[thread.name.partition("_")[0]] += time.clock_gettime(clock)
    return cpu


def measure_memory(options) -> None:
    """Peak memory of `sclite build-data` on 2,000 and 20,000 problems: the given ones, repeated with a number in front."""
    # not splitlines, which would also split at line separators inside a string
    with open(options.problems, encoding="utf-8") as file:
        known = [json.loads(line) for line in file]
    peaks = {}
    for count in (2000, 20000):
        with serve(options.teacher, 0.0) as url, tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "problems.jsonl"
            with open(source, "w", encoding="utf-8") as file:
                for number in range(count):
                    row = dict(known[number % len(known)])
                    name = "question" if "question" in row else "problem"
                    row[name] = f"{number // len(known)}. {row[name]}"
                    file.write(json.dumps(row) + "\n")
            chosen = ("model=openai/replay", f"api_base={url}", f"concurrency={options.in_flight}")
            command = [sys.executable, "-m", "sclite", "build-data", str(source), "--run", f"{folder}/run"]
            command += ["--only", "templates", "--yes", "--json"]
            command += [word for setting in chosen for word in ("--set", f"teacher.{setting}")]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            kept = json.loads(process.stdout.read())["templates"]
            peaks[count] = os.wait4(process.pid, 0)[2].ru_maxrss / 1024
            print(f"peak at {count} problems, {kept} kept: {peaks[count]:.0f} MB")
    print(f"20,000 over 2,000: {peaks[20000] / peaks[2000]:.2f}")


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--problems", required=True)
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--cpu", action="store_true", help="only the CPU time of a call")
    options = parser.parse_args()
    os.environ.setdefault("OPENAI_API_KEY", "none")
    if options.memory:
        measure_memory(options)
        return
    problems = load_problems(Source(source=options.problems))
    if not options.cpu:
        measure_throughput(options, problems)
    measure_cpu(options, problems)
    print(f"peak of this process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


if __name__ == "__main__":
    main()
