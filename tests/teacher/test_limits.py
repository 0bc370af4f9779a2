"""Calls in flight halve on complaints and grow on success; limits per minute hold."""

import asyncio
import time

import pytest

from sclite.teacher import limits as pacing
from sclite.teacher.limits import Limit, RateLimiter


def test_a_complaint_halves_the_room_and_success_makes_it_grow_again():
    async def story():
        limiter = RateLimiter(16)
        limiter.in_flight = 16
        now = time.monotonic()
        limiter.record_overload(now)
        assert limiter.limit == 8
        limiter.record_overload(now)  # began before the last halving: it is the same complaint
        assert limiter.limit == 8
        limiter.record_overload(time.monotonic() + 1)
        assert limiter.limit == 4
        for _ in range(20):
            limiter.record_success()
        return limiter.limit

    assert asyncio.run(story()) == 16


def test_the_room_never_falls_below_one_call():
    async def story():
        limiter = RateLimiter(2)
        for second in range(5):
            limiter.record_overload(time.monotonic() + second)
        async with limiter.call():
            return limiter.in_flight

    assert asyncio.run(story()) == 1


@pytest.mark.parametrize("room", [1, 3])
def test_no_more_calls_are_in_flight_than_there_is_room(room):
    most = 0

    async def story():
        limiter = RateLimiter(8)
        limiter.limit = float(room)

        async def call():
            nonlocal most
            async with limiter.call():
                most = max(most, limiter.in_flight)
                await asyncio.sleep(0.001)

        await asyncio.gather(*(call() for _ in range(12)))
        assert limiter.in_flight == 0

    asyncio.run(story())
    assert most == room


def test_a_minute_never_holds_more_than_the_limit(monkeypatch):
    monkeypatch.setattr(pacing, "MINUTE_SECONDS", 0.2)
    times = []

    async def story():
        limit = Limit(5)

        async def take():
            await limit.take(1)
            times.append(time.monotonic())

        await asyncio.gather(*(take() for _ in range(12)))

    asyncio.run(story())
    for i in range(len(times) - 5):
        assert times[i + 5] - times[i] >= 0.19
    assert len(times) == 12


def test_one_amount_above_the_limit_goes_alone_and_does_not_wait_for_ever(monkeypatch):
    monkeypatch.setattr(pacing, "MINUTE_SECONDS", 0.05)

    async def story():
        limit = Limit(10)
        await limit.take(3)
        await limit.take(50)
        await limit.take(1)

    asyncio.run(asyncio.wait_for(story(), 5))
