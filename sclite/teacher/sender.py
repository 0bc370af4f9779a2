"""Gets the reply to one request: from the ledger, else from the endpoint, with rate limits, a budget and retries."""

import asyncio
import random
import re
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

from sclite import config
from sclite.prompts import Messages
from sclite.signature import digest
from sclite.teacher.failures import LONGEST_WAIT_SECONDS, REFUSED, STOP, Failure, read_failure, teacher_error
from sclite.teacher.ledger import Entry, Ledger
from sclite.teacher.limits import Budget, RateLimiter
from sclite.teacher.provider import Provider, connect
from sclite.teacher.reply import CUT_IN_REASONING

MIN_REFUSALS = 20  # like MIN_FAILURES, if each request may be to blame and others were answered
MIN_FAILURES = 5  # different requests that must fail before the teacher is to blame
REFUSED_BY_TEACHER = "refused_by_teacher"
SENT: ContextVar[set[str]] = ContextVar("SENT")  # keys of the requests that the current job has sent
# statuses that blame the request; with 403 or 404, a blocked key or an offline tunnel affects all requests
_ABOUT_REQUEST = (400, 413, 422)
_TEMPLATE_TOKENS = 16  # added to each message by a chat template


class NoReplyError(Exception):
    """A request that was given up; `reason` is a code to count, the message explains it."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def parameters_of(settings: config.Teacher) -> dict[str, Any]:
    """The request parameters that, with the messages, decide the reply."""
    temperature = {} if settings.temperature is None else {"temperature": settings.temperature}
    return {**temperature, "max_tokens": settings.max_tokens, **settings.extra}


class Sender:
    """Sends requests to one model; `prepare` is called after LiteLLM is imported. `reply` belongs to the event loop."""

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
        per_minute = settings.requests_per_minute, settings.tokens_per_minute
        self.limiter = RateLimiter(settings.concurrency, *per_minute)
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._last_commit: asyncio.Task[None] | None = None
        self._next_commit: asyncio.Task[None] | None = None
        self._answered = self._succeeded = False  # any HTTP response; any usable reply
        self._replied = False  # the same, not from the ledger
        # by key: number, failure and ledger entry of the requests that were refused and after which none has succeeded
        self._refused: dict[str, tuple[int, Failure, Entry | None]] = {}
        self._latest = 0  # number of the latest request that has succeeded
        self._unanswered = 0  # requests given up since the last reply
        self._calls = 0

    def key(self, messages: Messages, sample: int, repair: int, parameters: Mapping[str, Any]) -> str:
        """The digest that identifies a request; another reply to the same messages has another `sample` or `repair`.

        `max_tokens` is not part of it: a complete reply does not depend on it.
        """
        address = config.without_password(self.settings.api_base).rstrip("/")
        chat, chosen = [dict(message) for message in messages], {**self.parameters, **parameters}
        chosen.pop("max_tokens", None)
        return digest([self.settings.model, address, chat, chosen, sample, repair])

    def known(self, key: str, parameters: Mapping[str, Any], later: Iterable[str] = ()) -> Entry | None:
        """The reply in the ledger, unless it was cut off at fewer tokens than are allowed now, or refused with more.

        A cut-off reply still counts if the ledger has a complete reply to one of the requests `later`, which followed it.
        """
        entry, limit = self.ledger.get(key), {**self.parameters, **parameters}["max_tokens"]
        if entry is not None and entry.max_tokens is not None:
            cut_off = entry.finish_reason in ("length", CUT_IN_REASONING) and entry.max_tokens < limit
            cut_off = cut_off and not any(
                e is not None and e.finish_reason == "stop" for e in map(self.ledger.get, later)
            )
            too_long = entry.finish_reason == REFUSED and entry.max_tokens > limit
            return None if cut_off or too_long else entry
        return entry

    def connect(self) -> Provider:
        """Import LiteLLM and resolve the model, once."""
        if self.provider is None:
            self.provider = connect(self.settings, self._prepare)
        return self.provider

    async def reply(
        self,
        messages: Messages,
        sample: int,
        repair: int,
        stage: str,
        parameters: Mapping[str, Any],
        on_text: Callable[[str], None] | None = None,
        later: Iterable[str] = (),
    ) -> Entry:
        """The reply from the ledger (`known`), else from the endpoint; the same request of two jobs is sent once.

        Raises NoReplyError if this request fails, TeacherError if no other can succeed either, BudgetError at the limit.
        """
        key = self.key(messages, sample, repair, parameters)
        lock = self._locks.setdefault(key, asyncio.Lock())
        async with lock:
            entry = self.known(key, parameters, later)
            if entry is None:
                entry = await self._call(key, messages, stage, {**self.parameters, **parameters}, on_text)
        if entry.finish_reason == REFUSED:
            raise NoReplyError(REFUSED_BY_TEACHER, entry.text)
        self._succeeded = True
        return entry

    async def _call(
        self,
        key: str,
        messages: Messages,
        stage: str,
        parameters: dict[str, Any],
        on_text: Callable[[str], None] | None,
    ) -> Entry:
        """Send until there is a reply. The request is in the ledger before it goes out, the reply before it is used."""
        begun: list[str] = []  # after a piece has been shown, another attempt would repeat it

        def pass_on(text: str) -> None:
            begun.append(text)
            if on_text is not None:
                on_text(text)

        provider, settings, shown = self.connect(), self.settings, pass_on if on_text else None
        # at most one token per byte, which digits and LaTeX can reach with any tokenizer
        sizes = (_TEMPLATE_TOKENS + len(m["content"].encode(errors="surrogatepass")) for m in messages)
        limits = (sum(sizes), parameters["max_tokens"])
        max_usd = provider.price.cost_usd(*limits) if provider.price else 0.0
        seconds_allowed, timeouts = settings.timeout_seconds, 0
        for attempt in range(1, settings.attempts_per_call + 1):
            async with self.budget.reserve(max_usd), self.limiter.call(sum(limits)) as began:
                self.ledger.sent(key, stage, settings.model, max_usd)
                SENT.get().add(key)
                self._calls += 1
                number = self._calls
                await self._flush()
                try:
                    completion = await provider.complete(messages, parameters, seconds_allowed, shown)
                except asyncio.CancelledError:
                    self.ledger.given_up(key, "cancelled", max_usd)
                    raise
                except provider.errors as error:
                    entry, failure = None, read_failure(error)
                    # LiteLLM's own has status 408
                    timeouts += isinstance(error, TimeoutError) or (
                        failure.status == 408 and not failure.free
                    )
                    if failure.overload:
                        self.limiter.record(began, overload=True)
                    if failure.free:
                        self.ledger.failed(key, failure.message)
                    else:
                        self.ledger.given_up(key, failure.message, max_usd)
                else:
                    self.limiter.record(began)
                    tokens, cost_usd = provider.charge(completion, limits)
                    usage = (*tokens, cost_usd, parameters["max_tokens"])
                    entry = Entry(completion.text, completion.finish_reason, *usage)
                    self.ledger.put(key, entry)  # its cost now counts
            if entry is not None:
                self._latest = max(self._latest, number)
                self._settle_refusals()
                await self._flush()  # outside the block: the next call need not wait for the disk
                self._answered = self._succeeded = self._replied = True
                self._unanswered = 0
                return entry
            self._answered = self._answered or failure.unreadable or failure.answered
            if failure.action == STOP:
                raise teacher_error(failure, settings, provider.key_variable)
            if failure.action == REFUSED:
                flagged = failure.status == 403 and re.search(
                    "moderat|flagged", failure.message, re.IGNORECASE
                )
                alone = failure.status in _ABOUT_REQUEST or bool(flagged)
                entry = Entry(failure.message, REFUSED, None, None, None, parameters["max_tokens"])
                self._refused[key] = number, failure, entry if alone else None
                self._settle_refusals()
                # a dataset may have several such problems in a row
                fewest = MIN_REFUSALS if alone and self._replied else MIN_FAILURES
                if len(self._refused) >= max(fewest, settings.concurrency):
                    raise teacher_error(failure, settings, provider.key_variable)
                if alone:
                    return entry
                raise NoReplyError("no_reply", failure.message)
            wait = failure.wait_seconds(attempt, random.random())
            # each late reply is paid for: one more attempt, with twice the time
            seconds_allowed = settings.timeout_seconds * (1 + timeouts)
            if attempt == settings.attempts_per_call or wait > LONGEST_WAIT_SECONDS or begun or timeouts == 2:
                break
            await asyncio.sleep(wait)
        if failure.unreadable and self._succeeded:  # the request is to blame, not the endpoint
            raise NoReplyError("unreadable_reply", failure.message)
        if timeouts == 2:
            longer = "raise teacher.timeout_seconds"
            failure = replace(failure, message=f"{failure.message}; {longer}")
        self._unanswered += 1
        if self._unanswered >= max(MIN_FAILURES, settings.concurrency) or not self._answered:
            raise teacher_error(failure, settings, provider.key_variable, attempt)
        raise NoReplyError("no_reply", failure.message)

    def _settle_refusals(self) -> None:
        """Once a later request has succeeded, record that earlier refused ones are to blame themselves."""
        for key, (number, _, entry) in list(self._refused.items()):
            if number < self._latest:
                del self._refused[key]
                if entry is not None:
                    self.ledger.put(key, entry)

    async def _flush(self) -> None:
        """Wait until the ledger is on disk: one commit writes everything queued during the last one."""
        if self._next_commit is None:
            self._next_commit = asyncio.ensure_future(self._commit(self._last_commit))
        await asyncio.shield(self._next_commit)

    async def _commit(self, last: "asyncio.Task[None] | None") -> None:
        if last is not None:
            await asyncio.wait([last])
        self._last_commit, self._next_commit = self._next_commit, None
        await asyncio.to_thread(self.ledger.flush)  # a disk may take 10 ms

    def raise_if_all_refused(self) -> None:
        """Raise TeacherError if several different requests were refused and none has succeeded."""
        if not self._replied and len(self._refused) >= MIN_FAILURES:
            _, last, _ = next(reversed(self._refused.values()))
            raise teacher_error(last, self.settings, self.connect().key_variable)
