"""A micro-batch in shares side by side on a CPU, a thread each.

A small student's layers are too small to be spread over cores: after each operation the threads wait for each other.
Shares of a batch have only each other's end to wait for. On two idle cores that has shown no gain yet (0.97 to 1.05 of the time).
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

T, R = TypeVar("T"), TypeVar("R")
MOST = 4
"""Lanes at the most: Python itself runs in one of them at a time."""


class Lanes:
    """`count` lanes; one means that everything runs where it is asked for."""

    def __init__(self, count: int, pool: ThreadPoolExecutor | None = None):
        self.count, self._pool = count, pool

    def split(self, rows: Sequence[T]) -> list[list[T]]:
        """The rows dealt out to the lanes one by one; no lane is empty."""
        return [list(rows[lane :: self.count]) for lane in range(min(self.count, len(rows)))]

    def map(self, work: Callable[[T], R], shares: Sequence[T]) -> list[R]:
        """What `work` gives for each share, in their order."""
        if self._pool is None or len(shares) == 1:
            return [work(share) for share in shares]
        return list(self._pool.map(work, shares))


@contextmanager
def side_by_side(model: Any, rows: int) -> Iterator[Lanes]:
    """Lanes for micro-batches of so many rows: one for each thread that torch uses on a CPU; one on a card."""
    import torch

    threads = torch.get_num_threads()
    count = min(MOST, threads, rows) if next(model.parameters()).device.type == "cpu" else 1
    if count < 2:
        yield Lanes(1)
        return
    each = threads // count
    torch.set_num_threads(each)  # one number for all threads where torch computes with MKL
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(each,)) as pool:
            yield Lanes(count, pool)
    finally:
        torch.set_num_threads(threads)
