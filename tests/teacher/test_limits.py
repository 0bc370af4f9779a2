"""Concurrency halves on overload and grows on success; limits per minute hold."""

import asyncio
import time

import pytest

from sclite.teacher import limits
from sclite.teacher.limits import Limit, RateLimiter


def test_overload_halves_the_limit_and_successes_raise_it():
    async def run():
        limiter = RateLimiter(16)
        limiter.in_flight = 16
        now = time.monotonic()
        limiter.record(now, overload=True)
        assert limiter.limit == 8
        limiter.record(now, overload=True)  # began before the last halving: the same overload
        assert limiter.limit == 8
        limiter.record(time.monotonic() + 1, overload=True)
        assert limiter.limit == 4
        for _ in range(20):
            limiter.record(time.monotonic())
        return limiter.limit

    assert asyncio.run(run()) == 16


def test_limit_never_falls_below_one_call():
    async def run():
        limiter = RateLimiter(2)
        for second in range(5):
            limiter.record(time.monotonic() + second, overload=True)
        async with limiter.call():
            return limiter.in_flight

    assert asyncio.run(run()) == 1


@pytest.mark.parametrize("allowed", [1, 3])
def test_calls_in_flight_never_exceed_the_limit(allowed):
    most = 0

    async def run():
        limiter = RateLimiter(8)
        limiter.limit = float(allowed)

        async def call():
            nonlocal most
            async with limiter.call():
                most = max(most, limiter.in_flight)
                await asyncio.sleep(0.001)

        await asyncio.gather(*(call() for _ in range(12)))
        assert limiter.in_flight == 0

    asyncio.run(run())
    assert most == allowed


def test_limit_per_minute_holds_in_every_window(monkeypatch):
    monkeypatch.setattr(limits, "MINUTE_SECONDS", 0.2)
    times = []

    async def run():
        limit = Limit(5)

        async def take():
            await limit.take(1)
            times.append(time.monotonic())

        await asyncio.gather(*(take() for _ in range(12)))

    asyncio.run(run())
    for i in range(len(times) - 5):
        assert times[i + 5] - times[i] >= 0.19
    assert len(times) == 12


def test_amount_above_the_limit_is_admitted_alone(monkeypatch):
    monkeypatch.setattr(limits, "MINUTE_SECONDS", 0.05)

    async def run():
        limit = Limit(10)
        await limit.take(3)
        await limit.take(50)
        await limit.take(1)

    asyncio.run(asyncio.wait_for(run(), 5))
