"""The answer grader: whether an answer says the same as the gold answer, by math-verify in processes that can be killed.

Three verdicts: True, False, and None for unknown (a time-out or a failure of the grader), which is never counted as wrong.
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
from sclite.grading.tidy import tidy

LONGEST = 1000  # characters; sympy's parser takes minutes over longer texts
MOST_PROCESSES = 16  # each holds 100 MB
STARTUP_SECONDS = 120.0  # importing sympy takes under a second, on a machine that swaps a minute
_ENDLESS = re.compile(r"(\.\d{100})\d+$")  # 0.3333.. of a model that cannot stop
_DIGITS = re.compile(r"-?[0-9]+")


def _quick(given: str | None, gold: str) -> tuple[bool | None, str, str]:
    """The verdict where it takes no algebra, else None, and both answers tidied."""
    if given is None or not given.strip():
        return False, "", ""
    if given.strip() == gold.strip():
        return True, given, gold
    given, gold = (_ENDLESS.sub(r"\1", text) for text in (given, gold))
    if max(len(given), len(gold)) > LONGEST:
        return None, "", ""
    if _DIGITS.fullmatch(given) and _DIGITS.fullmatch(gold):
        return int(given) == int(gold), "", ""
    given, gold = (tidy(boxed(text) or text) for text in (given, gold))
    if any(
        text.count("{") != text.count("}") for text in (given, gold)
    ):  # no formula, and math-verify's parser takes minutes to say so
        return False, "", ""
    return compare(given, gold, lambda _given, _gold: None), given, gold


def _is_hard(found: tuple[bool | None, str, str]) -> bool:
    return found[0] is None and found[2] != ""


# -- algebra, in a process that can be killed -------------------------------------------------------------------


class Grader:
    """Compares answers, the hard ones in worker processes; use it as a context manager. Safe to share among threads.

    `seconds` bounds one comparison: a worker that takes longer is killed, and the verdict is None. There are as many
    workers as cores unless `processes` says otherwise. They start when first needed and end with this process, however it
    ends. They are plain subprocesses, so the threads and the `__main__` of this one do not matter.
    """

    def __init__(self, seconds: float = 5.0, processes: int | None = None):
        self.seconds = seconds
        self.processes = processes or min(os.cpu_count() or 1, MOST_PROCESSES)
        self._idle: queue.LifoQueue[subprocess.Popen | None] = queue.LifoQueue()
        for _ in range(self.processes):
            self._idle.put(None)

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the idle workers. The grader can be used again; it then starts new ones."""
        with contextlib.suppress(queue.Empty):
            workers = []
            while True:
                workers.append(self._idle.get_nowait())
        for worker in workers:
            _end(worker)
            self._idle.put(None)

    def equal(self, given: str | None, gold: str) -> Verdict:
        """Whether `given` says the same as `gold`; None when that could not be found out. No answer is a wrong answer."""
        found = _quick(given, gold)
        return self._ask(*found[1:]) if _is_hard(found) else found[0]

    def equal_many(self, pairs: Iterable[tuple[str | None, str]]) -> list[Verdict]:
        """The verdict on each (given, gold), in order, on all workers at once."""
        known = [_quick(*pair) for pair in pairs]
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
        except (
            BaseException
        ):  # an interrupted exchange leaves a reply in the pipe, which is not the next one's
            _end(worker)
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
            f"the answer grader does not start: {why}", "pip install 'math-verify[antlr4_13_2]'"
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
    """The worker's next reply, None when it died or was killed because its time was up."""
    late = threading.Event()
    clock = threading.Timer(seconds, lambda: (late.set(), worker.kill()))
    clock.daemon = True
    clock.start()
    line = b""
    try:
        if request is not None:
            worker.stdin.write(json.dumps(request).encode() + b"\n")
            worker.stdin.flush()
        line = worker.stdout.readline()
    except BrokenPipeError:
        pass
    finally:
        clock.cancel()
        clock.join()
    return None if late.is_set() or not line.endswith(b"\n") else json.loads(line)


def _serve() -> None:
    """The worker: a pair on each line of stdin, a verdict on each line of stdout, until stdin ends.

    Its parent may be gone while it hangs inside one long multiplication, where no Python code runs: so the kernel's
    alarm ends it too.
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
