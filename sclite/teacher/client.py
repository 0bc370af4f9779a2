"""The teacher: many jobs at once; each reply is checked, repaired by further requests, and paid for once."""

import asyncio
import queue
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sclite import config, console
from sclite.errors import BudgetError, UsageError
from sclite.teacher.cost import Budget, Price
from sclite.teacher.ledger import Entry, Ledger
from sclite.teacher.loop import Loop
from sclite.teacher.reply import CUT_IN_REASONING, EMPTY, ONLY_REASONING, REFUSAL
from sclite.teacher.sender import MIN_FAILURES, Messages, NoReply, Sender, parameters_of

EMPTY_REPLY, CUT_OFF, REASONING_TOO_LONG = "empty_reply", "cut_off", "reasoning_too_long"
_VERDICT = re.compile(r"<\s*verdict\s*>\s*(accept|reject)\w*\b", re.I)
_REASON = re.compile(r"<\s*reason\s*>(.*?)(?:</\s*reason\s*>|\Z)", re.I | re.S)


@dataclass(frozen=True)
class Rejection:
    """Why a reply cannot be used: `reason` is a code that is counted, `text` explains it to the teacher and the user."""

    reason: str
    text: str


@dataclass(frozen=True)
class Job:
    """One request. `messages(error)` builds the chat; `error` is empty at first, then what the last reply got wrong.

    `check(reply)` returns None for a good reply; it runs in a thread, several at once, and may be slow.
    `parameters` (temperature, top_p, max_tokens ..) override the teacher's for this job.
    `inspect(reply)` builds the chat in which a second model accepts or rejects a reply that passed the check.
    """

    id: str
    messages: Callable[[str], Messages]
    check: Callable[[str], Rejection | None]
    sample: int = 0
    parameters: Mapping[str, Any] = field(default_factory=dict)
    inspect: Callable[[str], Messages] | None = None


@dataclass(frozen=True)
class Result:
    """The outcome of a job: `text` passed its check, or is None and `rejection` says why the last reply did not.

    `raw` is the last reply in any case, `requests` the number of replies, `entry` the last one in the ledger (None if
    there was none).
    """

    id: str
    sample: int
    text: str | None
    rejection: Rejection | None
    raw: str
    requests: int
    entry: Entry | None = None


def identity(settings: config.Teacher) -> dict[str, Any]:
    """What identifies the origin of its replies: models and parameters, but not addresses."""
    named = {"model": settings.model, **parameters_of(settings)}
    return {**named, "inspector": settings.inspector} if settings.inspector else named


class Teacher:
    """A LiteLLM model with the run's ledger, and an inspector if one is configured. Use as a context manager.

    `prepare` is called once, after LiteLLM is imported and before the first request: the place to register a custom
    provider (tutor_provider.register).
    """

    def __init__(self, settings: config.Teacher, ledger: Ledger, prepare: Callable[[], None] | None = None):
        self.settings, self.ledger = settings, ledger
        self._loop = Loop()
        budget = Budget(ledger, settings.max_cost)
        self._sender = Sender(settings, ledger, budget, prepare)
        self._inspector, self._enlarged = None, False
        if settings.inspector:
            other = {
                "model": settings.inspector,
                "api_base": settings.inspector_api_base,
                "price": None,
                "extra": {},
            }
            self._inspector = Sender(settings.model_copy(update=other), ledger, budget, prepare)

    def __enter__(self) -> "Teacher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel calls in flight and close connections. The ledger stays open."""
        self._loop.close(self._close_connections)

    async def _close_connections(self) -> None:
        for sender in (self._sender, self._inspector):
            if sender is not None and sender.provider is not None:
                await sender.provider.close()

    def first_request(self, job: Job) -> dict[str, Any]:
        """The first request of a job, in full; nothing is sent."""
        chat = [dict(message) for message in job.messages("")]
        return {"model": self.settings.model, "messages": chat, **self._sender.parameters, **job.parameters}

    def has_answered(self, job: Job) -> bool:
        """Whether the first reply to this job is in the ledger."""
        return self.ledger.get(self._sender.key(job.messages(""), job.sample, 0, job.parameters)) is not None

    def price(self) -> Price | None:
        """US dollars per token; None if unknown. Imports LiteLLM, which takes seconds; sends nothing."""
        return self._sender.connect().price

    def ask_all(self, jobs: Iterable[Job], stage: str = "") -> Iterator[Result]:
        """Yield each job's result as it completes. Jobs are taken from the iterable only when there is room for them.

        Raises TeacherError, and cancels the rest, if no further request can succeed: a bad key, an unknown model, no
        server. At the spending limit, calls in flight are completed and yielded, then BudgetError is raised. Leaving the
        iterator early cancels the rest. `stage` labels the ledger's rows.
        """
        if not self.settings.model:
            raise UsageError(
                "teacher.model is not set",
                "add a LiteLLM model, as in --set teacher.model=openai/gpt-5.4-mini, or set it in sclite.toml",
            )
        pending, done, active = iter(jobs), queue.SimpleQueue[asyncio.Task](), 0
        tasks = self._loop.start_group(done.put)
        max_active = 2 * self.settings.concurrency  # jobs that wait for a retry leave their slot to others
        limit_error: BudgetError | None = None
        try:
            while True:
                while (
                    limit_error is None and active < max_active and (job := next(pending, None)) is not None
                ):
                    tasks.start(self._work(job, stage))
                    active += 1
                if not active:
                    break
                task = done.get()
                active -= 1
                if isinstance(task.exception(), BudgetError):
                    limit_error = task.exception()
                else:
                    yield task.result()
        finally:
            tasks.cancel()
        if limit_error is not None:
            raise limit_error
        self._sender.raise_if_all_refused(MIN_FAILURES)

    async def _work(self, job: Job, stage: str) -> Result:
        rejection, error, raw, entry = None, "", "", None
        parameters, enlarged = dict(job.parameters), False
        for repair in range(self.settings.repairs + 1):
            try:
                entry = await self._sender.reply(job.messages(error), job.sample, repair, stage, parameters)
                raw = entry.text
                if entry.finish_reason == CUT_IN_REASONING:
                    budget = parameters.get("max_tokens", self.settings.max_tokens)
                    rejection = Rejection(
                        REASONING_TOO_LONG,
                        f"its reasoning used up the budget of {budget} tokens: raise teacher.max_tokens, or make it think "
                        "less, as in --set teacher.extra.reasoning_effort=low",
                    )
                    larger = self._sender.larger_budget(budget)
                    if enlarged or larger <= budget or repair == self.settings.repairs:
                        return Result(job.id, job.sample, None, rejection, raw, repair + 1, entry)
                    parameters["max_tokens"], enlarged = larger, True
                    self._report_enlarged(budget, larger)
                    continue
                rejection = await self._check(job, raw, entry.finish_reason, stage)
            except NoReply as failure:
                if (
                    not enlarged or failure.reason != "refused_by_teacher"
                ):  # by a model that has no larger budget
                    rejection = Rejection(failure.reason, str(failure))
                return Result(job.id, job.sample, None, rejection, raw, repair, entry)
            if rejection is None:
                return Result(job.id, job.sample, raw, None, raw, repair + 1, entry)
            repeated = error.startswith(rejection.text)  # the same messages would get the same reply
            error = f"{rejection.text} (still so in reply {repair + 1})" if repeated else rejection.text
        return Result(job.id, job.sample, None, rejection, raw, self.settings.repairs + 1, entry)

    def _report_enlarged(self, budget: int, larger: int) -> None:
        """Warn once that requests are sent again with a larger budget, because it costs money."""
        if not self._enlarged:
            console.note(
                f"[yellow]warning:[/] reasoning used up a reply's whole budget of {budget} tokens; such requests are sent "
                f"once more with {larger}. To pay once, raise teacher.max_tokens or lower reasoning_effort in teacher.extra"
            )
        self._enlarged = True

    async def _check(self, job: Job, text: str, finish_reason: str, stage: str) -> Rejection | None:
        """Why a reply is rejected: by its finish reason, the job's check or the inspector, in this order."""
        rejection = _check_finish(finish_reason, text) or await self._loop.run_in_thread(job.check, text)
        if rejection is not None or self._inspector is None or job.inspect is None:
            return rejection
        entry = await self._inspector.reply(job.inspect(text), job.sample, 0, f"{stage} inspection")
        return _read_verdict(entry.text)


def _read_verdict(text: str) -> Rejection | None:
    """What the inspector's reply rejects; None if it accepts."""
    verdict = _VERDICT.search(text)
    if verdict is None:
        return Rejection("inspector_not_readable", "the inspector gave no verdict")
    if verdict[1].lower() == "accept":
        return None
    reason = _REASON.search(text)
    return Rejection(
        "rejected_by_inspector", " ".join(reason[1].split()) if reason else "the inspector rejects it"
    )


def _check_finish(finish_reason: str, text: str) -> Rejection | None:
    """Why a reply is rejected by its finish reason alone; None for one that ended by itself."""
    if finish_reason == "stop":
        return None
    rejections = {
        "length": (CUT_OFF, "it was cut off before its end, so write it shorter"),
        "content_filter": ("filtered", "a content filter stopped it"),
        REFUSAL: ("refused_by_teacher", f"it declines: {' '.join(text.split())[:200]}"),
        ONLY_REASONING: ("only_reasoning", "there is reasoning but no reply after it"),
        EMPTY: (EMPTY_REPLY, "the reply is empty"),
    }
    other = (f"finish_{finish_reason}", f"it ended with {finish_reason} and not by itself")
    return Rejection(*rejections.get(finish_reason, other))


def count_unanswered(dropped: Mapping[str, int]) -> int:
    """How many drops are due to missing replies, so that re-running the command requests them again."""
    return sum(dropped.get(reason, 0) for reason in ("no_reply", "unreadable_reply", EMPTY_REPLY))
