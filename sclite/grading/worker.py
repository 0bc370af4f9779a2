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

from sclite.errors import ScliteError
from sclite.grading.equality import Verdict, compare
from sclite.grading.extract import boxed
from sclite.grading.normalization import normalize

MAX_LENGTH = 1000  # characters; sympy's parser takes minutes for longer texts
MAX_PROCESSES = 16  # each takes 100 MB
STARTUP_SECONDS = 120.0  # importing sympy takes under a second, but a minute on a swapping machine
_ENDLESS = re.compile(r"(\.\d{100})\d+$")  # 0.3333.. from a model that does not stop
_DIGITS = re.compile(r"-?[0-9]+")


def _compare_quickly(given: str | None, gold: str) -> tuple[bool | None, str, str]:
    """(verdict, given, gold): the verdict if it needs no algebra, else None and both normalized answers."""
    if given is None or not given.strip():
        return False, "", ""
    if given.strip() == gold.strip():
        return True, given, gold
    given, gold = (_ENDLESS.sub(r"\1", text) for text in (given, gold))
    if max(len(given), len(gold)) > MAX_LENGTH:
        return None, "", ""
    if _DIGITS.fullmatch(given) and _DIGITS.fullmatch(gold):
        return int(given) == int(gold), "", ""
    given, gold = (normalize(boxed(text) or text) for text in (given, gold))
    # unbalanced braces are no formula, but math-verify's parser takes minutes to find out
    if any(text.count("{") != text.count("}") for text in (given, gold)):
        return False, "", ""
    return compare(given, gold, lambda _given, _gold: None), given, gold


def _is_hard(found: tuple[bool | None, str, str]) -> bool:
    return found[0] is None and found[2] != ""


class Grader:
    """Compares answers, the hard ones in worker processes. A thread-safe context manager.

    `seconds` is the timeout of one comparison: a slower worker is killed, and the verdict is None. There are as many
    workers as cores, or `processes`. They start on demand and end with this process, however it ends. They are plain
    subprocesses and so independent of the threads and the `__main__` of this process.
    """

    def __init__(self, seconds: float = 5.0, processes: int | None = None):
        self.seconds = seconds
        self.processes = processes or min(os.cpu_count() or 1, MAX_PROCESSES)
        self._idle: queue.LifoQueue[subprocess.Popen | None] = queue.LifoQueue()
        for _ in range(self.processes):
            self._idle.put(None)

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the idle workers. The grader can still be used, and then starts new ones."""
        with contextlib.suppress(queue.Empty):
            workers = []
            while True:
                workers.append(self._idle.get_nowait())
        for worker in workers:
            _end(worker)
            self._idle.put(None)

    def equal(self, given: str | None, gold: str) -> Verdict:
        """Whether `given` equals `gold`; None if unknown. No answer is a wrong answer."""
        found = _compare_quickly(given, gold)
        return self._ask(*found[1:]) if _is_hard(found) else found[0]

    def equal_many(self, pairs: Iterable[tuple[str | None, str]]) -> list[Verdict]:
        """The verdicts on all pairs (given, gold), in order, computed on all workers in parallel."""
        known = [_compare_quickly(*pair) for pair in pairs]
        pool = ThreadPoolExecutor(self.processes)
        try:
            asked = pool.map(lambda pair: self._ask(*pair[1:]), [found for found in known if _is_hard(found)])
            return [next(asked) if _is_hard(found) else found[0] for found in known]
        finally:
            pool.shutdown(cancel_futures=True)

    def _ask(self, given: str, gold: str) -> Verdict:
        worker = self._idle.get()
        try:
            if worker is None or worker.poll() is not None:
                _end(worker)
                worker = _start(self.seconds)
            reply = _exchange(worker, [given, gold], self.seconds)
        except BaseException:
            _end(
                worker
            )  # an interrupted exchange may leave a reply in the pipe, which the next one would read
            worker = None
            raise
        else:
            worker = worker if reply else _end(worker)
            return reply["verdict"] if reply else None
        finally:
            self._idle.put(worker)


def _start(seconds: float) -> subprocess.Popen:
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    command = [sys.executable, "-P", "-c", "from sclite.grading.worker import _serve; _serve()", str(seconds)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    worker = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, **pipes)
    reply = _exchange(worker, None, STARTUP_SECONDS)
    if not reply or reply["error"]:
        _end(worker)
        why = reply["error"] if reply else f"its process ended with code {worker.returncode}"
        raise ScliteError(
            f"the answer grader failed to start: {why}", "pip install 'math-verify[antlr4_13_2]'"
        )
    return worker


def _end(worker: subprocess.Popen | None) -> None:
    if worker is not None:
        worker.kill()
        worker.wait()
        for pipe in (worker.stdin, worker.stdout):
            with contextlib.suppress(OSError):
                pipe.close()


def _exchange(worker: subprocess.Popen, request: list[str] | None, seconds: float) -> dict | None:
    """The worker's next reply; None if it died or timed out and was killed."""
    late = threading.Event()
    timer = threading.Timer(seconds, lambda: (late.set(), worker.kill()))
    timer.daemon = True
    timer.start()
    line = b""
    try:
        if request is not None:
            worker.stdin.write(json.dumps(request).encode() + b"\n")
            worker.stdin.flush()
        line = worker.stdout.readline()
    except BrokenPipeError:
        pass
    finally:
        timer.cancel()
        timer.join()
    return None if late.is_set() or not line.endswith(b"\n") else json.loads(line)


def _serve() -> None:
    """The worker: reads one pair per line from stdin and writes one verdict per line to stdout.

    If its parent dies while it hangs in one long multiplication, where no Python code runs, only the kernel's alarm
    can end it.
    """
    seconds = float(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    alarm = getattr(signal, "setitimer", None)
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
        if alarm:
            alarm(signal.ITIMER_REAL, seconds + 1)
        verdict = compare(*json.loads(line), same_formula)
        if alarm:
            alarm(signal.ITIMER_REAL, 0)
        print(json.dumps({"verdict": verdict}), file=replies, flush=True)
