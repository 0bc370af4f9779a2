"""What requests cost: prices, the most that one request can cost, and a limit that is never passed."""

import asyncio
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from sclite.errors import BudgetError
from sclite.teacher.ledger import Ledger

_PLAUSIBLE_BYTES_PER_TOKEN = (
    4  # of English text: what a reply without a count is charged as, where that is more
)
_LONGEST_TOKEN_BYTES = 128  # no vocabulary in use has a longer one
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
    """An upper bound of the tokens in a prompt, without its tokenizer: one for each byte, as digits and LaTeX can take."""
    return sum(_FRAME_TOKENS + len(m["content"].encode(errors="surrogatepass")) for m in messages)


def is_plausible(tokens: tuple[int | None, int | None], most: tuple[int, int], written_bytes: int) -> bool:
    """Whether these counts (sent, written) can be those of a request of at most `most` and a reply of so many bytes."""
    sent, written = tokens
    if sent is None or written is None:
        return False
    least = -(-written_bytes // _LONGEST_TOKEN_BYTES)
    return 1 <= sent <= most[0] and least <= written <= most[1]


def charge(
    price: Price, tokens: tuple[int | None, int | None], most: tuple[int, int], written_bytes: int
) -> float:
    """US dollars for a reply: by its counts where they are plausible, else what was reserved for it.

    A reply that is evidently longer than it was allowed to be costs as many tokens as its length makes plausible.
    """
    if is_plausible(tokens, most, written_bytes):
        return price.cost_usd(*tokens)
    shown = max(written_bytes // _PLAUSIBLE_BYTES_PER_TOKEN, min(tokens[1] or 0, written_bytes))
    return price.cost_usd(most[0], max(most[1], shown))


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

    def _reached(self, most_usd: float) -> BudgetError:
        return BudgetError(
            f"the limit of {dollars(self.limit_usd)} is reached: {dollars(self.ledger.spent_usd)} is spent, and the next "
            f"request may cost up to {dollars(most_usd)}",
            "what was paid for is kept: type the same again with a higher --max-cost, or lower teacher.max_tokens",
        )
