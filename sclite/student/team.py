"""Several engines over one small GGUF, a core each: llama.cpp runs such models fastest on one thread."""

import os
import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from sclite.student.base import Reply, Request, ScoreRequest, Scores, Student
from sclite.student.engine import Engine, llama

SMALL_BYTES = 40_000_000
MOST = 4
SMALL_PARALLEL = 2


@contextmanager
def open_student(path: Path, *, parallel: int, context: int) -> Iterator[Student]:
    """The GGUF as a student: one engine, or for a small model without a GPU one for each core (at most 4).

    Those take two sequences at a time, however large `parallel` is: what they gain from weights read once they lose
    where the caches of many sequences fall out of the processor's.
    """
    small = path.is_file() and path.stat().st_size <= SMALL_BYTES and not llama().llama_supports_gpu_offload()
    with ExitStack() as stack:
        first = stack.enter_context(
            Engine(path, parallel=SMALL_PARALLEL if small else parallel, context=context)
        )
        count = min(MOST, os.cpu_count() or 1)
        if not small or count == 1:
            yield first
            return
        others = [
            stack.enter_context(Engine(path, parallel=SMALL_PARALLEL, context=context))
            for _ in range(count - 1)
        ]
        yield Team([first, *others])


class Team:
    """Students that share the work: request number i goes to member i modulo their number, so results repeat."""

    def __init__(self, members: Sequence[Student]):
        self.members = list(members)

    def generate(self, requests: Sequence[Request]) -> Iterator[Reply]:
        """Replies as each is done, by whichever member."""
        return self._share(requests, lambda member, mine: member.generate(mine))

    def score(self, requests: Sequence[ScoreRequest]) -> Iterator[Scores]:
        """Scores as each is done, by whichever member."""
        return self._share(requests, lambda member, mine: member.score(mine))

    def _share(
        self, requests: Sequence[Any], work: Callable[[Student, Sequence[Any]], Iterator[Any]]
    ) -> Iterator[Any]:
        count = len(self.members)
        results: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def run(number: int) -> None:
            try:
                for result in work(self.members[number], requests[number::count]):
                    results.put(replace(result, index=result.index * count + number))
            finally:
                results.put(None)

        with ThreadPoolExecutor(count) as threads:
            runs = [threads.submit(run, number) for number in range(count)]
            running = count
            while running:
                result = results.get()
                if result is None:
                    running -= 1
                else:
                    yield result
            for finished in runs:
                finished.result()  # raises what a member has raised
