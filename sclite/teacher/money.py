"""What requests cost: prices, the most that one request can cost, and a limit that is never passed."""

import asyncio
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from sclite.errors import BudgetFault
from sclite.teacher.ledger import Ledger

BYTES_PER_TOKEN = 2.0  # no tokenizer in use makes more tokens of ordinary text, in any script
_FRAME_TOKENS = 16  # what a chat template puts around a message


@dataclass(frozen=True)
class Price:
    """US dollars per token, for what is sent and for what is written."""

    prompt_usd: float
    completion_usd: float

    def cost_usd(self, prompt_tokens: float, completion_tokens: float) -> float:
        return prompt_tokens * self.prompt_usd + completion_tokens * self.completion_usd


FREE = Price(0.0, 0.0)


def dollars(amount: float) -> str:
    """ "$0.0473": four decimals, and as many as it takes to show two figures of less than a cent; never an exponent."""
    places = 4 if amount == 0 or amount >= 0.01 else 1 - math.floor(math.log10(amount))
    return f"${amount:.{max(4, places)}f}"


def most_prompt_tokens(messages: Sequence[Mapping[str, str]]) -> int:
    """An upper bound of the tokens in a prompt, without its tokenizer."""
    return sum(_FRAME_TOKENS + round(len(m["content"].encode()) / BYTES_PER_TOKEN) for m in messages)


class Budget:
    """A hard limit on what the ledger holds: a request goes out only if it fits at its dearest, beside all others.

    `reserve` waits while calls in flight may still turn out cheaper, and raises BudgetFault when none is left.
    """

    def __init__(self, ledger: Ledger, limit_usd: float | None):
        self.ledger, self.limit_usd = ledger, limit_usd
        self._reserved_usd = 0.0
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def reserve(self, most_usd: float) -> AsyncIterator[None]:
        """Hold `most_usd` until the block ends, in which the ledger is told what was really spent."""
        if self.limit_usd is None or most_usd == 0:
            yield
            return
        async with self._changed:
            await self._changed.wait_for(lambda: self._fits(most_usd) or self._reserved_usd <= 1e-12)
            if not self._fits(most_usd):
                raise self._reached(most_usd)
            self._reserved_usd += most_usd
        try:
            yield
        finally:
            self._reserved_usd -= most_usd
            async with self._changed:
                self._changed.notify_all()

    def _fits(self, most_usd: float) -> bool:
        return self.ledger.spent_usd + self._reserved_usd + most_usd <= self.limit_usd

    def _reached(self, most_usd: float) -> BudgetFault:
        return BudgetFault(
            f"the limit of {dollars(self.limit_usd)} is reached: {dollars(self.ledger.spent_usd)} is spent, and the next "
            f"request may cost up to {dollars(most_usd)}",
            "what was paid for is kept: type the same again with a higher --max-cost, or lower teacher.max_tokens",
        )
