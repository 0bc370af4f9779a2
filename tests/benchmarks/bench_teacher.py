"""How close build-data comes to the best that an endpoint allows, what a call costs, and how memory grows.

    python tests/benchmarks/bench_teacher.py --teacher "replay-teacher --problems p.jsonl" --problems p.jsonl
    python tests/benchmarks/bench_teacher.py --teacher .. --problems .. --memory

`--teacher` is a command that serves OpenAI's chat completions and prints its port; `--port 0 --latency SECONDS` is added.
"""

import argparse
import cProfile
import os
import pstats
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from sclite import config
from sclite.data.problems import load_problems
from sclite.data.templates import build_templates
from sclite.grader import Grader
from sclite.run import Run
from sclite.teacher.client import Teacher
from sclite.teacher.ledger import Ledger

PILOT = 64


@contextmanager
def serving(command: str, latency: float):
    process = subprocess.Popen(
        [*shlex.split(command), "--port", "0", "--latency", str(latency)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
    finally:
        process.terminate()


def settings(url: str, in_flight: int) -> config.Config:
    chosen = ["teacher.model=openai/replay", f"teacher.api_base={url}", f"teacher.concurrency={in_flight}"]
    return config.load(None, chosen, {}, own_file=False)


def seconds_for(chosen: config.Config, problems, folder: Path) -> tuple[float, int]:
    """Seconds from the first request after the pilot to the last reply, and how many templates came."""
    run = Run(folder)
    with (
        Grader() as grader,
        Ledger(run.path("ledger.sqlite")) as ledger,
        Teacher(chosen.teacher, ledger) as teacher,
    ):
        build_templates(chosen, run, teacher=teacher, grader=grader, problems=problems[:PILOT])
        began, last = time.monotonic(), 0.0

        def progress(*_):
            nonlocal last
            last = time.monotonic()

        report = build_templates(
            chosen, run, teacher=teacher, grader=grader, problems=problems, progress=progress
        )
        return last - began, report.counts["templates"] - PILOT


def throughput(options, problems) -> None:
    for latency, count, runs in ((1.0, 1920, 1), (0.1, 1920, 3)):
        shares, rates = [], []
        for _ in range(runs):
            with serving(options.teacher, latency) as url, tempfile.TemporaryDirectory() as folder:
                taken, kept = seconds_for(
                    settings(url, options.in_flight), problems[: PILOT + count], Path(folder)
                )
            shares.append(count * latency / options.in_flight / taken)
            rates.append(count / taken)
        print(
            f"latency {latency} s, {options.in_flight} in flight, {count} problems, {kept} kept: "
            f"{statistics.median(rates):.1f}/s, {statistics.median(shares):.3f} of the ideal (median of {runs})"
        )


def split(options, problems) -> None:
    """CPU time of a call inside LiteLLM and inside our code, by profiling the event loop's thread."""
    import threading

    profiles = []

    def profiled(loop_run):
        def run(*arguments):
            profile = cProfile.Profile(time.thread_time)
            profiles.append(profile)
            return profile.runcall(loop_run, *arguments)

        return run

    threading.Thread.run = profiled(threading.Thread.run)
    with serving(options.teacher, 0.0) as url, tempfile.TemporaryDirectory() as folder:
        seconds_for(settings(url, 16), problems[: PILOT + 500], Path(folder))
    ours = others = 0.0
    for profile in profiles:
        profile.disable()
        for (file, _, _), (_, _, own, _, _) in pstats.Stats(profile).stats.items():
            if f"{os.sep}sclite{os.sep}" in file:
                ours += own
            else:
                others += own
    print(
        f"CPU per call in the client's threads: {1e3 * ours / 564:.2f} ms in lines of sclite, {1e3 * others / 564:.2f} ms in "
        f"LiteLLM, what it stands on, and the standard library"
    )


def memory(options) -> None:
    """The peak of a process at 2,000 and at 20,000 problems."""
    code = (
        "import sys, resource\nsys.path[:0] = sys.argv[4].split(':')\n"
        "from pathlib import Path\nimport bench_teacher as b\n"
        "found = b.load_problems(sys.argv[2])\n"
        "many = [p.model_copy(update={'id': f'{n}-{p.id}', 'question': f'{n}. {p.question}'}) "
        "for n in range(8) for p in found][: int(sys.argv[3])]\ndel found\n"
        "b.seconds_for(b.settings(sys.argv[1], 64), many, Path(sys.argv[5]))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    peaks = {}
    path = ":".join([str(Path(__file__).parent), os.getcwd()])
    for count in (2000, 20000):
        with serving(options.teacher, 0.0) as url, tempfile.TemporaryDirectory() as folder:
            arguments = [sys.executable, "-c", code, url, options.problems, str(count), path, folder]
            done = subprocess.run(arguments, capture_output=True, text=True, check=True)
            peaks[count] = int(done.stdout.split()[-1]) / 1024
    print(
        f"peak at 2,000 problems {peaks[2000]:.0f} MB, at 20,000 {peaks[20000]:.0f} MB: {peaks[20000] / peaks[2000]:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--problems", required=True)
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--memory", action="store_true")
    options = parser.parse_args()
    os.environ.setdefault("OPENAI_API_KEY", "none")
    if options.memory:
        memory(options)
        return
    problems = load_problems(options.problems)
    throughput(options, problems)
    split(options, problems)
    print(f"peak of this process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


if __name__ == "__main__":
    main()
