"""The answer grader: compares answers with gold answers, using math-verify in killable processes.

A verdict is True, False, or None for unknown (a timeout or a failure of the grader), which is never counted as wrong.
"""

import contextlib
import queue
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from sclite.cores import usable_cores
from sclite.grading.equality import Verdict, compare
from sclite.grading.extract import boxed
from sclite.grading.normalization import normalize
from sclite.helper_process import HelperProcess

MAX_LENGTH = 1000  # characters; sympy's parser takes minutes for longer texts
MAX_PROCESSES = 16  # each takes 100 MB
WORKER = ("sclite.grading.grader", "load_comparison", 4 << 30)
"""What a worker runs, and the bytes of memory that it may use."""
_ENDLESS = re.compile(r"(\.\d{100})\d+$")  # 0.3333.. from a model that does not stop
_DIGITS = re.compile(r"-?[0-9]+")


def compare_quickly(given: str | None, gold: str) -> tuple[Verdict, tuple[str, str] | None]:
    """(verdict, None), or (None, both normalized answers) if the verdict needs algebra."""
    if given is None or not given.strip():
        return False, None
    if given.strip() == gold.strip():
        return True, None
    given, gold = (_ENDLESS.sub(r"\1", text) for text in (given, gold))
    given, gold = (boxed(text) or text for text in (given, gold))
    if max(len(given), len(gold)) > MAX_LENGTH:
        # a text that long is not the answer; of a gold answer that long nothing is known
        return (False if len(gold) <= MAX_LENGTH // 2 else None), None
    if _DIGITS.fullmatch(given) and _DIGITS.fullmatch(gold):
        return int(given) == int(gold), None
    given, gold = map(normalize, (given, gold))
    # unbalanced braces are no formula, but math-verify's parser takes minutes to find out
    if any(text.count("{") != text.count("}") for text in (given, gold)):
        return False, None
    verdict = compare(given, gold, lambda _given, _gold: None)
    return verdict, (given, gold) if verdict is None else None


class Grader(contextlib.AbstractContextManager["Grader"]):
    """Compares answers, hard ones in worker processes: `processes`, or one per core. Thread-safe.

    A comparison of more than `seconds` is killed, and the verdict is None. Workers start on demand and end with this
    process, however it ends.
    """

    def __init__(self, seconds: float = 5.0, processes: int | None = None):
        self.seconds = seconds
        self.processes = processes or min(usable_cores(), MAX_PROCESSES)
        # workers that have started are used first
        self.idle: queue.LifoQueue[HelperProcess] = queue.LifoQueue()
        for _ in range(self.processes):
            self.idle.put(HelperProcess("answer grader", *WORKER, "pip install 'math-verify[antlr4_13_2]'"))

    def __exit__(self, *_: object) -> None:
        """End the idle workers. The grader can still be used, and then starts new ones."""
        for worker in self.idle.queue:
            worker.end()

    def equal(self, given: str | None, gold: str) -> Verdict:
        """Whether `given` equals `gold`; None if unknown. A missing answer is wrong."""
        verdict, hard = compare_quickly(given, gold)
        return self._ask(*hard) if hard else verdict

    def equal_many(self, pairs: Iterable[tuple[str | None, str]]) -> list[Verdict]:
        """The verdicts on all pairs (given, gold), in order, computed on all workers in parallel."""
        known = [compare_quickly(*pair) for pair in pairs]
        pool = ThreadPoolExecutor(self.processes)
        try:
            computed = pool.map(lambda hard: self._ask(*hard), [hard for _, hard in known if hard])
            return [next(computed) if hard else verdict for verdict, hard in known]
        finally:
            pool.shutdown(cancel_futures=True)

    def _ask(self, given: str, gold: str) -> Verdict:
        worker = self.idle.get()
        try:
            return worker.ask([given, gold], self.seconds)
        except (TimeoutError, EOFError):
            return None
        finally:
            self.idle.put(worker)


def load_comparison() -> Callable[[list[str]], Verdict]:
    """What a worker computes: the verdict on a pair of normalized answers. Loads math-verify."""
    import math_verify  # noqa: F401

    from sclite.grading.algebra import same_formula

    return lambda pair: compare(pair[0], pair[1], same_formula)
