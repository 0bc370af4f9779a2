"""One request until its reply: from the ledger, else from the endpoint, with rate limits, a budget and retries."""

import asyncio
import math
import random
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from sclite import config
from sclite.teacher import failures
from sclite.teacher.cost import Budget, charge, is_plausible, max_prompt_tokens
from sclite.teacher.ledger import REFUSED, Entry, Ledger, request_key
from sclite.teacher.limits import RateLimiter
from sclite.teacher.provider import Provider, connect
from sclite.teacher.reply import Completion

Messages = Sequence[Mapping[str, str]]
LARGEST_BUDGET = 32_768  # tokens; a larger one is not chosen by itself
MIN_FAILURES = 5  # different requests that must fail before the teacher is to blame rather than the requests


class NoReply(Exception):
    """A request that was given up; `reason` is a code that is counted, the message explains it."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def parameters_of(settings: config.Teacher) -> dict[str, Any]:
    """The request parameters, beside the messages, that decide the reply."""
    chosen = {name: getattr(settings, name) for name in ("temperature", "max_tokens")}
    return {**{name: value for name, value in chosen.items() if value is not None}, **settings.extra}


class Sender:
    """Sends requests to one model. All methods but the constructor and `key` belong to the event loop.

    `prepare` is called once, after LiteLLM is imported and before the first request.
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
        self._answered = self._succeeded = False  # any HTTP response; any usable reply
        self._refused: dict[str, str] = {}  # key -> error message, in this process
        self._unanswered = 0  # requests given up since the last reply

    def key(self, messages: Messages, sample: int, repair: int, parameters: Mapping[str, Any]) -> str:
        """The ledger's key for this request."""
        settings, chosen = self.settings, {**self.parameters, **parameters}
        return request_key(
            settings.model, config.without_password(settings.api_base), messages, chosen, sample, repair
        )

    def connect(self) -> Provider:
        """Import LiteLLM and resolve the model, once."""
        if self.provider is None:
            self.provider = connect(self.settings, self._prepare)
        return self.provider

    def larger_budget(self, tokens: int) -> int:
        """Twice as many tokens, if the model can write as many."""
        provider = self.connect()
        listed = provider.litellm.model_cost.get(self.settings.model) or provider.litellm.model_cost.get(
            self.settings.model.partition("/")[2], {}
        )
        most = listed.get("max_output_tokens") or math.inf
        return max(tokens, min(2 * tokens, LARGEST_BUDGET, most))

    async def reply(
        self,
        messages: Messages,
        sample: int,
        repair: int,
        stage: str,
        parameters: Mapping[str, Any] = MappingProxyType({}),
    ) -> Entry:
        """The reply from the ledger, else from the endpoint; the same request in two jobs is sent once.

        `parameters` override those of the settings. Raises NoReply if this request fails, TeacherError if no other
        request can succeed either, BudgetError at the spending limit.
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
        """Send until there is a reply; it is in the ledger before it is returned."""
        litellm, settings = self.connect().litellm, self.settings
        errors = (litellm.exceptions.openai.OpenAIError, litellm.exceptions.httpx.HTTPError, OSError)
        for attempt in range(1, settings.attempts_per_call + 1):
            try:
                entry = await self._send(key, messages, stage, parameters, errors)
            except errors as failure:
                error = failure
            else:
                self._answered = self._succeeded = True
                self._unanswered = 0
                return entry
            unreadable = failures.is_unreadable(error)
            self._answered = self._answered or unreadable or failures.is_response(error)
            action = failures.classify(error)
            if action == failures.STOP:
                key_variable = self.provider.key_variable
                raise failures.stop_error(error, settings.model, settings.api_base, key_variable)
            if action == failures.REFUSED:
                return await self._refuse(key, failures.message(error))
            wait = failures.wait_seconds(error, attempt, random.random())
            if attempt == settings.attempts_per_call or wait > failures.LONGEST_WAIT_SECONDS:
                break
            await asyncio.sleep(wait)
        if unreadable and self._succeeded:  # the request is to blame, not the endpoint
            raise NoReply("unreadable_reply", failures.message(error))
        self._unanswered += 1
        if self._unanswered >= max(MIN_FAILURES, settings.concurrency) or not self._answered:
            raise failures.no_answer_error(error, settings.model, settings.api_base, attempt)
        raise NoReply("no_reply", failures.message(error))

    async def _send(
        self,
        key: str,
        messages: Messages,
        stage: str,
        parameters: dict[str, Any],
        errors: tuple[type[Exception], ...],
    ) -> Entry:
        """Send once, when limits and budget allow it. The request is in the ledger before it goes out."""
        limits = (max_prompt_tokens(messages), parameters.get("max_tokens", self.settings.max_tokens))
        price = self.provider.price
        max_usd = price.cost_usd(*limits) if price else 0.0
        async with self.budget.reserve(max_usd), self.limiter.call(sum(limits)) as began:
            await asyncio.wrap_future(self.ledger.sent(key, stage, self.settings.model, max_usd))
            try:
                completion = await self.provider.complete(messages, parameters, self.settings.timeout_seconds)
            except asyncio.CancelledError:
                self.ledger.given_up(key, "cancelled", max_usd)
                raise
            except errors as failure:
                if failures.is_overload(failure):
                    self.limiter.record_overload(began)
                if failures.is_free(failure):
                    self.ledger.failed(key, failures.message(failure))
                else:
                    self.ledger.given_up(key, failures.message(failure), max_usd)
                raise
            self.limiter.record_success()
            entry = self._entry(completion, limits, round(time.monotonic() - began, 3))
            written = self.ledger.put(key, entry)  # its cost counts from now on
        await asyncio.wrap_future(written)  # outside the block: the next call need not wait for the disk
        return entry

    def _entry(self, completion: Completion, limits: tuple[int, int], seconds: float) -> Entry:
        """The reply with its cost: by the user's price, else as LiteLLM computes it (it knows about cached tokens)."""
        price, cost_usd = self.provider.price, None
        known = is_plausible(completion.tokens, limits, completion.reply_bytes)
        if price is not None:
            cost_usd = charge(price, completion.tokens, limits, completion.reply_bytes)
        listed = 0 < (completion.listed_usd or 0) < math.inf
        if known and listed and not self.provider.priced_by_user and cost_usd != 0:
            cost_usd = completion.listed_usd
        tokens = completion.tokens if known else (None, None)
        return Entry(completion.text, completion.finish_reason, *tokens, cost_usd, seconds)

    async def _refuse(self, key: str, reason: str) -> Entry:
        """The entry for a refused request, kept in the ledger if others were answered: then this one is to blame."""
        self._refused[key] = reason
        self.raise_if_all_refused(max(MIN_FAILURES, self.settings.concurrency), reason)
        entry = Entry(reason, REFUSED, None, None, None, 0.0)
        if self._succeeded:
            await asyncio.wrap_future(self.ledger.put(key, entry))
        return entry

    def raise_if_all_refused(self, minimum: int, reason: str = "") -> None:
        """Raise TeacherError if at least `minimum` different requests were refused and none has succeeded."""
        if not self._succeeded and len(self._refused) >= minimum:
            reason = reason or next(iter(self._refused.values()))
            settings, key_variable = self.settings, self.provider.key_variable
            raise failures.refusal_error(reason, settings.model, settings.api_base, key_variable)
