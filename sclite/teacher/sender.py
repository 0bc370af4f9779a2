"""One request at a time, until there is a reply: from the ledger, else over the net, paced, priced and tried again."""

import asyncio
import math
import random
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from sclite import config
from sclite.errors import TeacherError
from sclite.teacher import failures
from sclite.teacher.cost import Budget, charge, is_plausible, max_prompt_tokens
from sclite.teacher.ledger import REFUSED, Entry, Ledger, request_key
from sclite.teacher.limits import RateLimiter
from sclite.teacher.provider import Provider, connect
from sclite.teacher.reply import Completion

Messages = Sequence[Mapping[str, str]]
SEVERAL = 5  # different requests that must fail alike before the teacher, and not they, is to blame


class NoReply(Exception):
    """A request that was given up; `reason` is a name that is counted, the message says why."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def parameters_of(settings: config.Teacher) -> dict[str, Any]:
    """What is sent beside the messages and decides the reply."""
    chosen = {name: getattr(settings, name) for name in ("temperature", "max_tokens")}
    return {name: value for name, value in chosen.items() if value is not None}


class Sender:
    """Sends to one model. All methods but the constructor belong to the event loop.

    `prepare` is called once, after LiteLLM is imported and before the first call.
    """

    def __init__(
        self,
        settings: config.Teacher,
        ledger: Ledger,
        budget: Budget,
        prepare: Callable[[], None] | None = None,
    ):
        self.settings, self.ledger, self.budget = settings, ledger, budget
        self._prepare = prepare
        self.provider: Provider | None = None
        self.parameters = parameters_of(settings)
        self.limiter = RateLimiter(
            settings.concurrency, settings.requests_per_minute, settings.tokens_per_minute
        )
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._answered = self._succeeded = False  # any HTTP reply; any usable one
        self._refused: dict[str, str] = {}  # key -> why, those of this process
        self._unanswered = 0  # requests given up since the last reply

    def key(self, messages: Messages, sample: int, repair: int, parameters: Mapping[str, Any]) -> str:
        """What the ledger keeps this request under."""
        settings, chosen = self.settings, {**self.parameters, **parameters}
        return request_key(
            settings.model, config.without_password(settings.api_base), messages, chosen, sample, repair
        )

    def connect(self) -> Provider:
        """LiteLLM and what it needs for this model, found out once."""
        if self.provider is None:
            self.provider = connect(self.settings, self._prepare)
        return self.provider

    async def reply(
        self,
        messages: Messages,
        sample: int,
        repair: int,
        stage: str,
        parameters: Mapping[str, Any] = MappingProxyType({}),
    ) -> Entry:
        """The reply from the ledger, else from the endpoint; the same request in two jobs is sent once.

        `parameters` come before the settings' own.

        Raises NoReply for this request, TeacherFault where no other can succeed either, BudgetFault at the limit.
        """
        key = self.key(messages, sample, repair, parameters)
        lock = self._locks.setdefault(key, asyncio.Lock())
        async with lock:
            entry = self.ledger.get(key)
            if entry is None:
                entry = await self._call(key, messages, stage, {**self.parameters, **parameters})
        if entry.finish_reason == REFUSED:
            raise NoReply("refused_by_teacher", entry.text)
        self._succeeded = True
        return entry

    async def _call(self, key: str, messages: Messages, stage: str, parameters: dict[str, Any]) -> Entry:
        """Send until there is a reply, which is in the ledger before anybody sees it."""
        litellm = self.connect().litellm
        issues = (litellm.exceptions.openai.OpenAIError, litellm.exceptions.httpx.HTTPError, OSError)
        for attempt in range(1, self.settings.attempts_per_call + 1):
            try:
                entry = await self._send(key, messages, stage, parameters, issues)
            except issues as failure:
                error = failure
            else:
                self._answered = self._succeeded = True
                self._unanswered = 0
                return entry
            unreadable = failures.is_unreadable(error)
            self._answered = self._answered or unreadable or failures.is_response(error)
            verdict = failures.classify(error)
            if verdict == failures.STOP:
                raise self._stop(error)
            if verdict == failures.REFUSED:
                return await self._refusal(key, error)
            wait = failures.wait_seconds(error, attempt, random.random())
            if attempt == self.settings.attempts_per_call or wait > failures.LONGEST_WAIT_SECONDS:
                break
            await asyncio.sleep(wait)
        if unreadable and self._succeeded:  # this request is to blame, not the endpoint
            raise NoReply("unreadable_reply", failures.message(error))
        self._unanswered += 1
        if self._unanswered >= max(SEVERAL, self.settings.concurrency) or not self._answered:
            raise failures.no_answer_error(error, self.settings.model, self.settings.api_base, attempt)
        raise NoReply("no_reply", failures.message(error))

    async def _send(
        self, key: str, messages: Messages, stage: str, parameters: dict[str, Any], issues: tuple
    ) -> Entry:
        """Send once, when pace and budget allow it. What went out is in the ledger before it does."""
        most = (max_prompt_tokens(messages), parameters.get("max_tokens", self.settings.max_tokens))
        price = self.provider.price
        most_usd = price.cost_usd(*most) if price else 0.0
        async with self.budget.reserve(most_usd), self.limiter.call(sum(most)) as began:
            await asyncio.wrap_future(self.ledger.sent(key, stage, self.settings.model, most_usd))
            try:
                said = await self.provider.ask(messages, parameters, self.settings.timeout_seconds)
            except asyncio.CancelledError:
                self.ledger.given_up(key, "cancelled", most_usd)
                raise
            except issues as failure:
                if failures.is_overload(failure):
                    self.limiter.record_overload(began)
                if failures.is_free(failure):
                    self.ledger.failed(key, failures.message(failure))
                else:
                    self.ledger.given_up(key, failures.message(failure), most_usd)
                raise
            self.limiter.record_success()
            entry = self._entry(said, most, round(time.monotonic() - began, 3))
            written = self.ledger.put(key, entry)  # its cost counts from now on
        await asyncio.wrap_future(written)  # the disk takes its time, and the next call need not wait for it
        return entry

    def _entry(self, said: Completion, most: tuple[int, int], seconds: float) -> Entry:
        """The reply with its cost: by the user's own price, else as LiteLLM computes it (it knows of cached tokens)."""
        price, cost_usd = self.provider.price, None
        known = is_plausible(said.tokens, most, said.reply_bytes)
        if price is not None:
            cost_usd = charge(price, said.tokens, most, said.reply_bytes)
        if (
            known
            and not self.provider.priced_by_user
            and 0 < (said.listed_usd or 0) < math.inf
            and cost_usd != 0
        ):
            cost_usd = said.listed_usd
        tokens = said.tokens if known else (None, None)
        return Entry(said.text, said.finish_reason, *tokens, cost_usd, seconds)

    # -- giving up -------------------------------------------------------------------------------------------------

    async def _refusal(self, key: str, error: BaseException) -> Entry:
        """Keep what the endpoint will never answer, once it has answered others: then the request is to blame."""
        why = failures.message(error)
        self._refused[key] = why
        self.blame_refusals(max(SEVERAL, self.settings.concurrency), error)
        entry = Entry(why, REFUSED, None, None, None, 0.0)
        if self._succeeded:
            await asyncio.wrap_future(self.ledger.put(key, entry))
        return entry

    def blame_refusals(self, enough: int, error: BaseException | None = None) -> None:
        """Stop where several different requests were refused and none has ever succeeded."""
        if not self._succeeded and len(self._refused) >= enough:
            why = failures.message(error) if error else next(iter(self._refused.values()))
            raise failures.refusal_error(
                why, self.settings.model, self.settings.api_base, self._key_variable()
            )

    def _stop(self, error: BaseException) -> TeacherError:
        return failures.stop_error(error, self.settings.model, self.settings.api_base, self._key_variable())

    def _key_variable(self) -> str:
        return self.provider.key_variable if self.provider else "the environment"
