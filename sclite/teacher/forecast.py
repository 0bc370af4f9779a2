"""What the remaining requests will cost: estimated before the first one, or measured on a pilot."""

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
    """What a pilot of `rows` cost, and the estimate for `rows_left`; None if prices are unknown."""

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
    """The results of all jobs; if the pilot costs money, the rest is requested only if `confirm` agrees.

    `confirm` None agrees to everything. Raises BudgetError if it declines, after the pilot's results.
    """
    pending, done = iter(jobs), 0
    while confirm is not None:
        before, began = teacher.ledger.totals(), time.monotonic()
        pilot = list(islice(pending, PILOT))
        yield from teacher.ask_all(pilot, stage)
        done += len(pilot)
        after, seconds = teacher.ledger.totals(), time.monotonic() - began
        sent = after["sent"] > before["sent"]
        if sent or not pilot:
            break
    if confirm is not None and done < total and sent:
        rows, left = len(pilot), total - done
        known = after["unpriced"] == before["unpriced"]
        spent = after["cost_usd"] + after["lost_usd"] - before["cost_usd"] - before["lost_usd"]
        cost_usd = spent / rows * left if known else None
        forecast = Forecast(rows, spent if known else None, left, cost_usd, seconds / rows * left)
        if cost_usd != 0 and not confirm(forecast):
            raise BudgetError(
                f"stopped after {done} of {total} rows: the rest was not confirmed",
                "paid replies are kept; re-run to resume, with --yes to skip the question",
            )
    yield from teacher.ask_all(pending, stage)


def forecast(teacher: Teacher, jobs: Iterable[Job], completion_tokens: float, stage: str) -> dict[str, Any]:
    """What these jobs would send and cost; nothing is sent.

    `first_request` is the first one in full (None if the ledger holds all replies). `completion_tokens` is a guess per
    reply, used until the ledger holds replies of this stage, whose mean then replaces it.
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
