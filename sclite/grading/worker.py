"""The answer grader: compares answers with gold answers, using math-verify in killable processes.

A verdict is True, False, or None for unknown (a timeout or a failure of the grader), which is never counted as wrong.
"""

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sclite.errors import ScliteError
from sclite.grading.equality import Verdict, compare
from sclite.grading.extract import boxed
from sclite.grading.normalization import normalize

MAX_LENGTH = 1000  # characters; sympy's parser takes minutes for longer texts
MAX_PROCESSES = 16  # each takes 100 MB
STARTUP_SECONDS = 120.0  # importing sympy takes under a second, but a minute on a swapping machine
CODE = "from sclite.grading.worker import answer_pairs; answer_pairs()"
"""What a worker runs."""
_ENDLESS = re.compile(r"(\.\d{100})\d+$")  # 0.3333.. from a model that does not stop
_DIGITS = re.compile(r"-?[0-9]+")


def compare_quickly(given: str | None, gold: str) -> tuple[Verdict, tuple[str, str] | None]:
    """(verdict, None), or (None, both normalized answers) if the verdict needs algebra."""
    if given is None or not given.strip():
        return False, None
    if given.strip() == gold.strip():
        return True, None
    given, gold = (_ENDLESS.sub(r"\1", text) for text in (given, gold))
    if max(len(given), len(gold)) > MAX_LENGTH:
        return None, None
    if _DIGITS.fullmatch(given) and _DIGITS.fullmatch(gold):
        return int(given) == int(gold), None
    given, gold = (normalize(boxed(text) or text) for text in (given, gold))
    # unbalanced braces are no formula, but math-verify's parser takes minutes to find out
    if any(text.count("{") != text.count("}") for text in (given, gold)):
        return False, None
    verdict = compare(given, gold, lambda _given, _gold: None)
    return verdict, (given, gold) if verdict is None else None


class Grader(contextlib.AbstractContextManager["Grader"]):
    """Compares answers, the hard ones in as many worker processes as cores, or `processes`. Thread-safe.

    A comparison of more than `seconds` is killed, and the verdict is None. Workers start on demand and end with this
    process, however it ends.
    """

    def __init__(self, seconds: float = 5.0, processes: int | None = None):
        self.seconds = seconds
        self.processes = processes or min(os.cpu_count() or 1, MAX_PROCESSES)
        self.idle: queue.LifoQueue[Worker | None] = queue.LifoQueue()  # that wait; None: not started
        for _ in range(self.processes):
            self.idle.put(None)

    def __exit__(self, *_: object) -> None:
        """End the idle workers. The grader can still be used, and then starts new ones."""
        workers = []
        with contextlib.suppress(queue.Empty):
            while True:
                workers.append(self.idle.get_nowait())
        for worker in workers:
            if worker is not None:
                worker.end()
            self.idle.put(None)

    def equal(self, given: str | None, gold: str) -> Verdict:
        """Whether `given` equals `gold`; None if unknown. No answer is a wrong answer."""
        verdict, hard = compare_quickly(given, gold)
        return self._ask(*hard) if hard else verdict

    def equal_many(self, pairs: Iterable[tuple[str | None, str]]) -> list[Verdict]:
        """The verdicts on all pairs (given, gold), in order, computed on all workers in parallel."""
        known = [compare_quickly(*pair) for pair in pairs]
        pool = ThreadPoolExecutor(self.processes)
        try:
            asked = pool.map(lambda hard: self._ask(*hard), [hard for _, hard in known if hard])
            return [next(asked) if hard else verdict for verdict, hard in known]
        finally:
            pool.shutdown(cancel_futures=True)

    def _ask(self, given: str, gold: str) -> Verdict:
        worker, kept = self.idle.get(), None
        try:
            if worker is None or worker.process.poll() is not None:
                if worker is not None:
                    worker.end()
                worker = None
                worker = Worker(self.seconds)
            reply = worker.ask([given, gold], self.seconds)
            kept = worker if reply else None
            return reply["verdict"] if reply else None
        finally:  # a reply that was interrupted would be read as the next one's
            if worker is not None and kept is None:
                worker.end()
            self.idle.put(kept)


class Worker:
    """A process that compares pairs: one JSON line in, one out. Raises ScliteError if it cannot start."""

    def __init__(self, seconds: float):
        path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", CODE, str(seconds)],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        reply = self.ask(None, STARTUP_SECONDS)
        if not reply or reply["error"]:
            self.end()
            why = reply["error"] if reply else f"its process ended with code {self.process.returncode}"
            message = f"the answer grader failed to start: {why}"
            raise ScliteError(message, "pip install 'math-verify[antlr4_13_2]'")

    def ask(self, request: list[str] | None, seconds: float) -> dict[str, Any] | None:
        """The next reply; None if the process died, or was killed because it took longer."""
        late = threading.Event()

        def kill() -> None:
            late.set()
            self.process.kill()

        timer = threading.Timer(seconds, kill)
        timer.daemon = True
        timer.start()
        line = b""
        try:
            assert self.process.stdin is not None
            assert self.process.stdout is not None
            if request is not None:
                self.process.stdin.write(json.dumps(request).encode() + b"\n")
                self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            pass
        finally:
            timer.cancel()
            timer.join()
        return None if late.is_set() or not line.endswith(b"\n") else json.loads(line)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()


def answer_pairs() -> None:
    """The worker's side: reads one pair per line from stdin and writes one verdict per line to stdout."""
    seconds = float(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # if the parent dies while this hangs where no Python code runs, only the kernel's alarm can end it
    alarm = getattr(signal, "setitimer", lambda *_: None)
    with contextlib.suppress(ImportError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    try:
        import math_verify  # noqa: F401

        from sclite.grading.algebra import same_formula
    except ImportError as error:
        print(json.dumps({"error": str(error)}), file=replies, flush=True)
        return
    print(json.dumps({"error": ""}), file=replies, flush=True)
    for line in sys.stdin:
        given, gold = json.loads(line)
        alarm(signal.ITIMER_REAL, seconds + 1)
        verdict = compare(given, gold, same_formula)
        alarm(signal.ITIMER_REAL, 0)
        print(json.dumps({"verdict": verdict}), file=replies, flush=True)
