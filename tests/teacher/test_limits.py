"""Concurrency halves on overload and grows on success; limits per minute are kept."""

import asyncio
import time

import pytest

from sclite.teacher import limits
from sclite.teacher.limits import RateLimiter


def test_overload_halves_the_limit_down_to_one_call_and_successes_raise_it():
    limiter, now = RateLimiter(16), time.monotonic()
    limiter.in_flight = 16
    for began, limit in ((now, 8), (now, 8), (time.monotonic() + 1, 4)):
        limiter.record(began, overload=True)  # the second began before the last halving: the same overload
        assert limiter.limit == limit
    for second in range(2, 7):
        limiter.record(time.monotonic() + second, overload=True)
    assert limiter.limit == 1
    for _ in range(20):
        limiter.record(time.monotonic())
    assert limiter.limit == 16


@pytest.mark.parametrize("allowed", [1, 3])
def test_calls_in_flight_never_exceed_the_limit(allowed):
    seen = []

    async def run():
        limiter = RateLimiter(8)
        limiter.limit = float(allowed)

        async def call():
            async with limiter.call():
                seen.append(limiter.in_flight)
                await asyncio.sleep(0.001)

        await asyncio.gather(*(call() for _ in range(12)))
        assert limiter.in_flight == 0

    asyncio.run(run())
    assert max(seen) == allowed


@pytest.mark.parametrize("limits_per_minute", [(5, None), (None, 5 * 7)])
def test_limits_per_minute_hold_in_every_window(monkeypatch, limits_per_minute):
    monkeypatch.setattr(limits, "MINUTE_SECONDS", 0.2)
    times = []

    async def run():
        limiter = RateLimiter(12, *limits_per_minute)

        async def call():
            async with limiter.call(tokens=7):
                times.append(time.monotonic())

        await asyncio.gather(*(call() for _ in range(12)))

    asyncio.run(run())
    assert len(times) == 12
    assert min(later - earlier for earlier, later in zip(times, times[5:], strict=False)) >= 0.19


def test_amount_above_the_limit_is_admitted_alone(monkeypatch):
    monkeypatch.setattr(limits, "MINUTE_SECONDS", 0.05)

    async def run():
        limiter = RateLimiter(3, tokens_per_minute=10)
        for tokens in (3, 50, 1):
            async with limiter.call(tokens):
                pass

    asyncio.run(asyncio.wait_for(run(), 5))
