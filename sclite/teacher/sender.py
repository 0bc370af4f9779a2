"""Gets the reply to one request: from the ledger, else from the endpoint, with rate limits, a budget and retries."""

import asyncio
import random
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from sclite import config
from sclite.prompts import Messages
from sclite.signature import digest
from sclite.teacher.failures import REFUSED, RETRY, STOP, Failure, read_failure, teacher_error
from sclite.teacher.ledger import Entry, Ledger
from sclite.teacher.limits import Budget, RateLimiter
from sclite.teacher.provider import Provider, connect
from sclite.teacher.reply import CUT_IN_REASONING, EMPTY

MIN_FAILURES = (
    20  # in a row, before the teacher is to blame: a dataset may have several bad problems in a row
)
REFUSED_BY_TEACHER = "refused_by_teacher"
# statuses that blame the request; with 403 or 404, a blocked key or an offline tunnel affects all requests
_ABOUT_REQUEST = (400, 413, 422)
_BACKOFF_SECONDS, _LONGEST_BACKOFF_SECONDS = 0.5, 60.0
_LONGEST_WAIT_SECONDS = 300.0  # a server that asks for a longer wait counts as not answering
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
        self._failures = 0  # requests that failed since the last reply
        self._replied = False

    def key(self, messages: Messages, sample: int, repair: int, parameters: Mapping[str, Any]) -> str:
        """The digest that identifies a request; another reply to the same messages has another `sample` or `repair`.

        `max_tokens` is not part of it: a complete reply does not depend on it.
        """
        address = config.without_password(self.settings.api_base).rstrip("/")
        chat, chosen = [dict(message) for message in messages], {**self.parameters, **parameters}
        chosen.pop("max_tokens", None)
        return digest([self.settings.model, address, chat, chosen, sample, repair])

    def known(self, key: str, parameters: Mapping[str, Any], later: Iterable[str] = ()) -> Entry | None:
        """The reply in the ledger, unless it is empty, or was cut off at fewer tokens than are allowed now.

        A cut-off reply still counts if the ledger has a complete reply to one of the requests `later`, which followed it.
        """
        entry, limit = self.ledger.get(key), {**self.parameters, **parameters}["max_tokens"]
        if entry is None or entry.finish_reason == EMPTY:
            return None
        if entry.max_tokens is None or entry.max_tokens >= limit:
            return entry
        followed = (self.ledger.get(each) for each in later)
        cut_off = entry.finish_reason in ("length", CUT_IN_REASONING)
        if cut_off and not any(each and each.finish_reason == "stop" for each in followed):
            return None
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
        key, settings = self.key(messages, sample, repair, parameters), self.settings
        lock, chosen = self._locks.setdefault(key, asyncio.Lock()), {**self.parameters, **parameters}
        async with lock:
            if (entry := self.known(key, parameters, later)) is not None:
                return entry
            late = 0
            for attempt in range(1, settings.attempts_per_call + 1):
                # each late reply is paid for: one more attempt, with twice the time
                seconds = settings.timeout_seconds * (1 + late)
                found = await self._send(key, messages, stage, chosen, seconds, on_text)
                if isinstance(found, Entry):
                    self._failures, self._replied = 0, True
                    return found
                failure = found
                late += failure.late
                # shortened by up to half, so that jobs do not all come back at once
                backoff = min(_LONGEST_BACKOFF_SECONDS, _BACKOFF_SECONDS * 2 ** (attempt - 1))
                wait = failure.retry_after or backoff * (1 - random.random() / 2)
                # a stream that broke may have been shown: another attempt would repeat it
                broken = on_text is not None and not failure.free
                last = attempt == settings.attempts_per_call or late == 2 or broken
                if failure.action != RETRY or last or wait > _LONGEST_WAIT_SECONDS:
                    break
                await asyncio.sleep(wait)
        self._failures += 1
        # without any response so far, a teacher that cannot be reached is to blame at once
        reached = self._replied or failure.action == REFUSED or bool(failure.headers)
        most = max(MIN_FAILURES, settings.concurrency) if reached else 1
        if failure.action == STOP or self._failures >= most:
            attempts = attempt if failure.action == RETRY else 0
            raise teacher_error(failure, settings, self.connect().key_variable, attempts)
        blamed = failure.action == REFUSED and failure.status in _ABOUT_REQUEST
        raise NoReplyError(REFUSED_BY_TEACHER if blamed else "no_reply", failure.message)

    async def _send(
        self,
        key: str,
        messages: Messages,
        stage: str,
        parameters: dict[str, Any],
        seconds: float,
        on_text: Callable[[str], None] | None,
    ) -> Entry | Failure:
        """Make one attempt. The request is in the ledger before it goes out, the reply before it is used."""
        provider = self.connect()
        # at most one token per byte, which digits and LaTeX can reach with any tokenizer
        sizes = (_TEMPLATE_TOKENS + len(m["content"].encode(errors="surrogatepass")) for m in messages)
        limits = (sum(sizes), parameters["max_tokens"])
        max_usd = provider.price.cost_usd(*limits) if provider.price else 0.0
        async with self.budget.reserve(max_usd), self.limiter.call(sum(limits)) as began:
            self.ledger.sent(key, stage, self.settings.model, max_usd)
            await asyncio.to_thread(self.ledger.flush)  # a disk may take 10 ms
            try:
                completion = await provider.complete(messages, parameters, seconds, on_text)
            except asyncio.CancelledError:
                self.ledger.failed(key, "cancelled", max_usd)
                raise
            except provider.errors as error:
                failure = read_failure(error)
                if failure.overload:
                    self.limiter.record(began, overload=True)
                self.ledger.failed(key, failure.message, None if failure.free else max_usd)
                return failure
            self.limiter.record(began)
            tokens, cost_usd = provider.charge(completion, limits)
            usage = (*tokens, cost_usd, parameters["max_tokens"])
            entry = Entry(completion.text, completion.finish_reason, *usage)
            self.ledger.put(key, entry)  # its cost now counts
        await asyncio.to_thread(self.ledger.flush)  # outside the block: the next call need not wait
        return entry
