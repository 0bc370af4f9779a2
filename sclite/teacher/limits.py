"""Limits: a hard spending limit, a concurrency limit that follows the endpoint's load, and limits per minute."""

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from sclite.errors import BudgetError
from sclite.teacher.ledger import Ledger

MINUTE_SECONDS = 60.0


@dataclass(frozen=True)
class Price:
    """US dollars per prompt token and per completion token."""

    prompt_usd: float
    completion_usd: float

    def cost_usd(self, prompt_tokens: float, completion_tokens: float) -> float:
        return prompt_tokens * self.prompt_usd + completion_tokens * self.completion_usd


class Budget:
    """A hard spending limit: a request is sent only if its maximum cost fits in addition to everything spent and reserved."""

    def __init__(self, ledger: Ledger, limit_usd: float | None):
        self.ledger = ledger
        self.limit_usd = math.inf if limit_usd is None else limit_usd
        self._reserved_usd = 0.0
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def reserve(self, max_usd: float) -> AsyncIterator[None]:
        """Reserve `max_usd` until the block ends; waits while calls in flight may turn out cheaper, else BudgetError."""
        async with self._changed:
            while self.ledger.spent_usd + self._reserved_usd + max_usd > self.limit_usd:
                if self._reserved_usd > 1e-12:
                    await self._changed.wait()
                    continue
                if max_usd <= 0:
                    break
                raise BudgetError(
                    f"the spending limit of ${self.limit_usd:.4f} is reached: ${self.ledger.spent_usd:.4f} is or may be spent, and "
                    f"the next request may cost up to ${max_usd:.4f}",
                    "paid replies are kept: raise the limit, for example --set teacher.max_cost=10, or lower teacher.max_tokens, then re-run "
                    "to resume",
                )
            self._reserved_usd += max_usd
        try:
            yield
        finally:
            self._reserved_usd -= max_usd
            async with self._changed:
                self._changed.notify_all()


class RateLimiter:
    """At most `max_in_flight` calls at once, fewer while the endpoint is overloaded; optional limits per minute.

    Additive increase, multiplicative decrease (Chiu and Jain 1989); an overload of several calls counts once. The limits
    per minute hold in every window of 60 seconds; a call that alone exceeds one is admitted alone.
    """

    def __init__(
        self,
        max_in_flight: int,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
    ):
        self.max_in_flight = max_in_flight
        self.limit = float(max_in_flight)
        self.in_flight = 0
        self._halved_at = -1.0
        self._changed = asyncio.Condition()
        self._per_minute = requests_per_minute or math.inf, tokens_per_minute or math.inf
        self._admitted: deque[tuple[float, float]] = deque()  # (time, tokens) in the last minute
        self._turn = asyncio.Lock()  # first come, first served

    @asynccontextmanager
    async def call(self, tokens: float = 0.0) -> AsyncIterator[float]:
        """Wait for a free slot and hold it; yields the time at which the call began. `tokens`: how many it may use."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.in_flight < max(1, int(self.limit)))
            self.in_flight += 1
        try:
            async with self._turn:
                while self._per_minute != (math.inf, math.inf):
                    now = time.monotonic()
                    while self._admitted and self._admitted[0][0] <= now - MINUTE_SECONDS:
                        self._admitted.popleft()
                    used = sum(amount for _, amount in self._admitted)
                    requests, most_tokens = self._per_minute
                    fits = len(self._admitted) + 1 <= requests and used + tokens <= most_tokens
                    if fits or not self._admitted:
                        self._admitted.append((now, tokens))
                        break
                    await asyncio.sleep(self._admitted[0][0] + MINUTE_SECONDS - now)
            yield time.monotonic()
        finally:
            self.in_flight -= 1
            async with self._changed:
                self._changed.notify(max(1, int(self.limit) - self.in_flight))

    def record(self, began: float, overload: bool = False) -> None:
        """Record the end of the call that began at `began`; `overload`: it was rate-limited or timed out."""
        if not overload:
            self.limit = min(float(self.max_in_flight), self.limit + 1.0)
        elif began > self._halved_at:
            self.limit = max(1.0, min(self.limit, self.in_flight) / 2)
            self._halved_at = time.monotonic()
