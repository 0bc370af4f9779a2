"""How fast to ask: calls in flight that halve when the endpoint complains and grow while it does not, and its limits."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

MINUTE_SECONDS = 60.0


class Pace:
    """Room for calls: at most `most` in flight, fewer after complaints; requests and tokens per minute where limited.

    Additive increase, multiplicative decrease (Chiu and Jain 1989): every success makes room for one more call, a
    complaint halves the room. Complaints about calls that began before the last halving do not count again.
    """

    def __init__(
        self, most: int, requests_per_minute: float | None = None, tokens_per_minute: float | None = None
    ):
        self.most = most
        self.room = float(most)
        self.flying = 0
        self._halved_at = -1.0
        self._changed = asyncio.Condition()
        self._limits = [
            Limit(per_minute) if per_minute is not None else None
            for per_minute in (requests_per_minute, tokens_per_minute)
        ]

    @asynccontextmanager
    async def call(self, tokens: float = 0.0) -> AsyncIterator[float]:
        """Wait for room, then hold it; gives the time at which the call began. `tokens` is what it will use."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.flying < max(1, int(self.room)))
            self.flying += 1
        try:
            for limit, amount in zip(self._limits, (1.0, tokens), strict=True):
                if limit is not None:
                    await limit.take(amount)
            yield time.monotonic()
        finally:
            self.flying -= 1
            await self._tell()

    def succeeded(self) -> None:
        """A reply came in time."""
        self.room = min(float(self.most), self.room + 1.0)

    def complained(self, began: float) -> None:
        """The endpoint said that it is too much, or did not answer in time; the call began at `began`."""
        if began > self._halved_at:
            self.room = max(1.0, min(self.room, self.flying) / 2)
            self._halved_at = time.monotonic()

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify(max(1, int(self.room) - self.flying))


class Limit:
    """So much per minute: what was taken in the last 60 seconds never exceeds it. A single larger amount goes alone."""

    def __init__(self, per_minute: float):
        self.per_minute = per_minute
        self._taken: deque[tuple[float, float]] = deque()  # (when, how much)
        self._sum = 0.0
        self._turn = asyncio.Lock()  # first come, first served

    async def take(self, amount: float) -> None:
        """Wait until `amount` more stays within the limit, and take it."""
        async with self._turn:
            while (wait := self._wait_seconds(amount)) > 0:
                await asyncio.sleep(wait)
            self._taken.append((time.monotonic(), amount))
            self._sum += amount

    def _wait_seconds(self, amount: float) -> float:
        now = time.monotonic()
        while self._taken and self._taken[0][0] <= now - MINUTE_SECONDS:
            self._sum -= self._taken.popleft()[1]
        if not self._taken or self._sum + amount <= self.per_minute:
            return 0.0
        return self._taken[0][0] + MINUTE_SECONDS - now
