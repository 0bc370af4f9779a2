"""What asking the rest will cost: reckoned before the first request, or measured on the first few replies."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from sclite.errors import BudgetError
from sclite.teacher.client import Job, Result, Teacher

PILOT = 8  # rows
CHARACTERS_PER_TOKEN = 4.0  # of English text and formulas, roughly


@dataclass(frozen=True)
class Forecast:
    """What a pilot of `rows` has cost, and what the `rows_left` will at that rate; None where prices are unknown."""

    rows: int
    spent_usd: float | None
    rows_left: int
    cost_usd: float | None
    seconds: float


def ask_after_pilot(
    teacher: Teacher,
    jobs: Iterable[Job],
    total: int,
    stage: str,
    confirm: Callable[[Forecast], bool] | None,
) -> Iterator[Result]:
    """The results of all jobs; where the first few cost money, the rest is asked for only if `confirm` agrees.

    Without `confirm` nobody is asked. Raises BudgetFault where it says no; what came until then has been given.
    """
    waiting, done = iter(jobs), 0
    while confirm is not None:
        before, began = teacher.ledger.totals(), time.monotonic()
        pilot = list(islice(waiting, PILOT))
        yield from teacher.ask_all(pilot, stage)
        done += len(pilot)
        after, seconds = teacher.ledger.totals(), time.monotonic() - began
        asked = after["sent"] > before["sent"]
        if asked or not pilot:
            break
    if confirm is not None and done < total and asked:
        forecast = _at_this_rate(before, after, len(pilot), total - done, seconds)
        if forecast.cost_usd != 0 and not confirm(forecast):
            raise BudgetError(
                f"stopped after {done} of {total} rows, as you said",
                "what was paid for is kept; type the same again to go on, with --yes to skip the question",
            )
    yield from teacher.ask_all(waiting, stage)


def _at_this_rate(before: dict, after: dict, rows: int, left: int, seconds: float) -> Forecast:
    spent = after["cost_usd"] + after["lost_usd"] - before["cost_usd"] - before["lost_usd"]
    known = after["unpriced"] == before["unpriced"]
    return Forecast(
        rows, spent if known else None, left, spent / rows * left if known else None, seconds / rows * left
    )


def forecast(teacher: Teacher, jobs: Iterable[Job], completion_tokens: float, stage: str) -> dict[str, Any]:
    """What asking these jobs would send and cost, without sending anything.

    `first_request` is the very first one (None where the ledger holds all replies); `completion_tokens` is a guess for
    one reply, which gives way to the mean of the replies of this stage that the ledger holds.
    """
    first, requests, characters = None, 0, 0
    for job in jobs:
        if teacher.has_answered(job):
            continue
        request = teacher.first_request(job)
        first = first or request
        requests += 1
        characters += sum(len(message["content"]) for message in request["messages"])
    known = teacher.ledger.totals(stage)
    if known["requests"] and known["completion_tokens"]:
        completion_tokens = known["completion_tokens"] / known["requests"]
    prompt, completion = round(characters / CHARACTERS_PER_TOKEN), round(requests * completion_tokens)
    price = teacher.price()
    return {
        "first_request": first,
        "requests": requests,
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "cost_usd": None if price is None else round(price.cost_usd(prompt, completion), 6),
    }
