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


@contextmanager
def open_student(path: Path, *, parallel: int, context: int) -> Iterator[Student]:
    """The GGUF as a student: one engine, or for a small model without a GPU one for each core (at most 4).

    Those take one sequence at a time, however large `parallel` is: such a model's weights stay in the processor's cache,
    so that reading them once for several brings nothing, and the caches of several do not stay there.
    """
    small = path.is_file() and path.stat().st_size <= SMALL_BYTES and not llama().llama_supports_gpu_offload()
    with ExitStack() as stack:
        first = stack.enter_context(Engine(path, parallel=1 if small else parallel, context=context))
        count = min(MOST, os.cpu_count() or 1)
        if not small or count == 1:
            yield first
            return
        others = [stack.enter_context(Engine(path, parallel=1, context=context)) for _ in range(count - 1)]
        yield Team([first, *others])


NEIGHBOURS = 4
"""Requests in a row for the same member: neighbours often begin alike, as samples of one problem do."""


class Team:
    """Students that share the work: each takes the next few requests in turn, whoever is idle, so that results repeat."""

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
            mine = [i for i in range(len(requests)) if i // NEIGHBOURS % count == number]
            try:
                for result in work(self.members[number], [requests[i] for i in mine]):
                    results.put(replace(result, index=mine[result.index]))
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
