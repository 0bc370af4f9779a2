"""What requests cost: prices, an upper bound for each request, and a spending limit that is never exceeded."""

import asyncio
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from sclite.errors import BudgetError
from sclite.teacher.ledger import Ledger

_BYTES_PER_TOKEN = 4  # of English text; bounds the charge for a reply that is longer than max_tokens
_LONGEST_TOKEN_BYTES = 128  # no vocabulary in use has a longer one
_TEMPLATE_TOKENS = 16  # that a chat template adds to each message


@dataclass(frozen=True)
class Price:
    """US dollars per prompt token and per completion token."""

    prompt_usd: float
    completion_usd: float

    def cost_usd(self, prompt_tokens: float, completion_tokens: float) -> float:
        return prompt_tokens * self.prompt_usd + completion_tokens * self.completion_usd


FREE = Price(0.0, 0.0)


def format_usd(amount: float) -> str:
    """ "$0.0473": four decimals, or two significant digits for less than a cent; never an exponent."""
    places = 4 if amount == 0 or amount >= 0.01 else 1 - math.floor(math.log10(amount))
    return f"${amount:.{max(4, places)}f}"


def max_prompt_tokens(messages: Sequence[Mapping[str, str]]) -> int:
    """An upper bound on the tokens of a prompt for any tokenizer: one per byte, which digits and LaTeX can reach."""
    return sum(_TEMPLATE_TOKENS + len(m["content"].encode(errors="surrogatepass")) for m in messages)


def is_plausible(tokens: tuple[int | None, int | None], limits: tuple[int, int], reply_bytes: int) -> bool:
    """Whether the reported (prompt, completion) counts respect the request's limits and fit the length of the reply."""
    prompt, completion = tokens
    if prompt is None or completion is None:
        return False
    return 1 <= prompt <= limits[0] and -(-reply_bytes // _LONGEST_TOKEN_BYTES) <= completion <= limits[1]


def charge(
    price: Price, tokens: tuple[int | None, int | None], limits: tuple[int, int], reply_bytes: int
) -> float:
    """US dollars for a reply: by its token counts if they are plausible, else the amount reserved for it.

    A reply that is clearly longer than max_tokens costs as many tokens as its length suggests.
    """
    if is_plausible(tokens, limits, reply_bytes):
        return price.cost_usd(*tokens)
    estimate = max(reply_bytes // _BYTES_PER_TOKEN, min(tokens[1] or 0, reply_bytes))
    return price.cost_usd(limits[0], max(limits[1], estimate))


class Budget:
    """A hard spending limit: a request is sent only if its maximum cost fits beside everything spent and reserved.

    `reserve` waits while calls in flight may still turn out cheaper; if none is left, it raises BudgetError.
    """

    def __init__(self, ledger: Ledger, limit_usd: float | None):
        self.ledger, self.limit_usd = ledger, limit_usd
        self._reserved_usd = 0.0
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def reserve(self, max_usd: float) -> AsyncIterator[None]:
        """Reserve `max_usd` until the block ends; the block records the actual cost in the ledger."""
        if self.limit_usd is None or max_usd == 0:
            yield
            return
        async with self._changed:
            await self._changed.wait_for(lambda: self._fits(max_usd) or self._reserved_usd <= 1e-12)
            if not self._fits(max_usd):
                raise BudgetError(
                    f"the spending limit of {format_usd(self.limit_usd)} is reached: "
                    f"{format_usd(self.ledger.spent_usd)} is spent, and the next request may cost up to "
                    f"{format_usd(max_usd)}",
                    "paid replies are kept: raise --max-cost or lower teacher.max_tokens, then re-run to resume",
                )
            self._reserved_usd += max_usd
        try:
            yield
        finally:
            self._reserved_usd -= max_usd
            async with self._changed:
                self._changed.notify_all()

    def _fits(self, max_usd: float) -> bool:
        return self.ledger.spent_usd + self._reserved_usd + max_usd <= self.limit_usd
