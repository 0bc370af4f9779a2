"""The teacher: runs jobs concurrently; each reply is checked, repaired by further requests, and paid for once."""

import asyncio
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Generic, TypeVar

from sclite import config, console
from sclite.errors import BudgetError, DeclinedError, TeacherError, UsageError
from sclite.signature import differences
from sclite.teacher.ledger import Entry, Ledger
from sclite.teacher.limits import Budget, Price
from sclite.teacher.reply import CUT_IN_REASONING, EMPTY
from sclite.teacher.sender import REFUSED_BY_TEACHER, Messages, NoReplyError, Sender, parameters_of

T = TypeVar("T")  # what a check reads from a reply
EMPTY_REPLY, CUT_OFF, REASONING_TOO_LONG = "empty_reply", "cut_off", "reasoning_too_long"
LARGEST_BUDGET = 32_768  # tokens; a larger one is never chosen automatically
CHARACTERS_PER_TOKEN = 4.0  # of English text and formulas, roughly
PILOT = 8  # rows
CUT_OFF_ERROR = "it was cut off before its end, so write it shorter"
INSPECTION_TOKENS = 60  # a verdict and a sentence
LESS_REASONING = "teacher.extra.reasoning_effort=low (or what your provider calls it, see docs/teachers.md)"
_CLOSING_SECONDS = 2.0
_VERDICT = re.compile(r"<\s*verdict\s*>\s*(accept|reject)\w*\b", re.I)
_REASON = re.compile(r"<\s*reason\s*>(.*?)(?:</\s*reason\s*>|\Z)", re.I | re.S)


@dataclass(frozen=True)
class Rejection:
    """Why a reply cannot be used: `reason` is a code that is counted, `text` explains it to the teacher and the user."""

    reason: str
    text: str


@dataclass(frozen=True)
class Job(Generic[T]):
    """One request, and how its reply is checked."""

    id: str
    messages: Callable[[str], Messages]  # the chat, given what the last reply got wrong ("" at first)
    check: Callable[[str], T | Rejection]  # reads a reply; called in threads, and may be slow
    sample: int = 0
    parameters: Mapping[str, Any] = field(default_factory=dict)  # instead of the teacher's
    inspect: Callable[[str], Messages] | None = None  # the chat in which a second model judges a reply


@dataclass(frozen=True)
class Result(Generic[T]):
    """The outcome of a job: `text` passed its check, which read it as `made`; or `rejection` says why the last one did not."""

    id: str
    sample: int
    text: str | None
    made: T | None
    rejection: Rejection | None
    raw: str  # the last reply in any case
    requests: int  # the number of replies
    entry: Entry | None = None  # the last reply in the ledger


def identity(settings: config.Teacher) -> dict[str, Any]:
    """What identifies the origin of a teacher's replies: models and parameters, but not addresses."""
    named = {"model": settings.model, **parameters_of(settings)}
    return {**named, "inspector": settings.inspector} if settings.inspector else named


def basis_of(settings: config.Teacher, prompts: object) -> dict[str, object]:
    """What all replies of a stage have in common: prompts and teacher, but not its token limit, which may be raised."""
    teacher = {name: value for name, value in identity(settings).items() if name != "max_tokens"}
    return {"prompts": prompts, "teacher": teacher}


def refuse_other_basis(
    before: Mapping[str, object] | None, basis: Mapping[str, object], what: object, keep: str = ""
) -> None:
    """Raise UsageError if the replies of a stage come from another teacher or other prompts. `keep` ends the hint."""
    if before is not None and before != basis:
        changed = "; ".join(differences(before, basis))
        hint = "restore the old settings, or pass --fresh to discard these rows and pay for new ones"
        raise UsageError(f"{what} was created with other settings: {changed}", hint + keep)


def count_unanswered(dropped: Mapping[str, int]) -> int:
    """The number of drops due to missing replies, which re-running the command requests again."""
    return sum(dropped.get(reason, 0) for reason in ("no_reply", EMPTY_REPLY))


class Teacher(AbstractContextManager["Teacher"]):
    """A LiteLLM model with the run's ledger, and an inspector if one is configured. Use as a context manager.

    `prepare` is called after LiteLLM is imported, to register a custom provider. `confirm` (default: no question) is called
    before the rest of a stage is paid for, with the rows done, their cost, the rows left and an estimate of theirs, in US
    dollars, None if unknown. The event loop runs in the caller's thread, while `ask_all` waits for a result.
    """

    def __init__(
        self,
        settings: config.Teacher,
        ledger: Ledger,
        prepare: Callable[[], None] | None = None,
        confirm: Callable[[int, float | None, int, float | None], bool] | None = None,
    ):
        self.settings, self.ledger, self.confirm = settings, ledger, confirm
        budget = Budget(ledger, settings.max_cost)
        self._sender = Sender(settings, ledger, budget, prepare)
        self._inspector = None
        if settings.inspector:
            other = {"model": settings.inspector, "api_base": settings.inspector_api_base}
            chosen = settings.model_copy(update={**other, "price": settings.inspector_price, "extra": {}})
            self._inspector = Sender(chosen, ledger, budget, prepare)
        self._runner = asyncio.Runner()
        # not the loop's default executor, in which LiteLLM needs a thread for each call
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="check")
        self._has_warned = False

    def __exit__(self, *_: object) -> None:
        """Cancel calls in flight and close connections. The ledger stays open."""

        async def finish() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            if others:
                await asyncio.wait(others, timeout=_CLOSING_SECONDS)
            for sender in (self._sender, self._inspector):
                if sender is not None and sender.provider is not None:
                    await sender.provider.close()

        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._sender.provider is not None:
            self._runner.run(finish())
        self._runner.close()

    def price(self) -> Price | None:
        """US dollars per token; None if unknown. Imports LiteLLM, which takes seconds; sends nothing."""
        return self._sender.connect().price

    def ask_all(self, jobs: Iterable[Job[T]], stage: str = "") -> Iterator[Result[T]]:
        """Yield each job's result as it completes. Jobs are taken from the iterable only when there is room for them.

        Raises TeacherError if no further request can succeed. At the spending limit, calls in flight are completed and
        yielded, then BudgetError is raised. Leaving the iterator early cancels the rest. `stage` labels the ledger's rows.
        """
        loop, pending = self._runner.get_loop(), iter(jobs)
        active, done = set[asyncio.Task[Result[T]]](), asyncio.Queue[asyncio.Task[Result[T]]]()
        limit_error: BudgetError | None = None

        def finish(task: asyncio.Task[Result[T]]) -> None:
            if not task.cancelled():
                task.exception()  # retrieved, else asyncio prints it as never retrieved
            done.put_nowait(task)

        try:
            while True:
                # twice as many as requests in flight: jobs that wait for a retry leave their slot to others
                room = 2 * self.settings.concurrency - len(active) if limit_error is None else 0
                for job in islice(pending, room):
                    task = loop.create_task(self._work(job, stage))
                    task.add_done_callback(finish)
                    active.add(task)
                if not active:
                    break
                try:
                    task = self._runner.run(done.get())
                except KeyboardInterrupt:
                    raise KeyboardInterrupt from None  # without the CancelledError by which asyncio stops
                active.discard(task)
                if isinstance(error := task.exception(), BudgetError):
                    limit_error = error
                else:
                    yield task.result()
        finally:
            for task in active:
                task.cancel()
        if limit_error is not None:
            raise limit_error

    def stream(self, job: Job[T], stage: str = "") -> Generator[str | Result[T], None, None]:
        """Yield the text of one reply as it arrives, then the result (alone if it is in the ledger); otherwise like `ask_all`."""
        texts = asyncio.Queue[str | None]()
        task = self._runner.get_loop().create_task(self._work(job, stage, texts.put_nowait))
        task.add_done_callback(lambda _: texts.put_nowait(None))
        try:
            while (text := self._runner.run(texts.get())) is not None:
                yield text
            yield task.result()
        finally:
            task.cancel()
            self._runner.run(asyncio.wait([task], timeout=_CLOSING_SECONDS))

    async def _work(self, job: Job[T], stage: str, on_text: Callable[[str], None] | None = None) -> Result[T]:
        rejection: Rejection | None = None
        entry: Entry | None = None
        error, requests, parameters = "", 0, dict(job.parameters)
        budget = own_budget = parameters.get("max_tokens", self.settings.max_tokens)
        while requests <= self.settings.repairs:
            try:
                # the requests that may have followed a reply that was cut off, in its reasoning or after it
                repaired = (job.messages(each) for each in (error, CUT_OFF_ERROR))
                later = (self._sender.key(chat, job.sample, requests + 1, parameters) for chat in repaired)
                asked = job.messages(error), job.sample, requests, stage, parameters, on_text, later
                entry = await self._sender.reply(*asked)
                found = await self._check(job, entry, budget, stage)
            except NoReplyError as failure:
                # a model without a larger budget refuses it: the reasoning is to blame
                if budget == own_budget or failure.reason != REFUSED_BY_TEACHER:
                    rejection = Rejection(failure.reason, str(failure))
                break
            requests += 1
            if not isinstance(found, Rejection):
                return Result(job.id, job.sample, entry.text, found, None, entry.text, requests, entry)
            if found.reason == REASONING_TOO_LONG:
                rejection = found
                larger = min(2 * budget, LARGEST_BUDGET, self._sender.connect().max_output_tokens)
                if budget > own_budget or larger <= budget:
                    break
                if not self._has_warned and requests <= self.settings.repairs:
                    self._has_warned = True
                    console.note(
                        f"[yellow]warning:[/] reasoning used up a reply's whole budget of {budget} tokens; such requests are "
                        f"sent once more with {larger}. To pay once, raise teacher.max_tokens or set {LESS_REASONING}"
                    )
                parameters["max_tokens"] = budget = larger
                continue
            repeated = rejection == found  # the same messages would get the same reply
            error = f"{found.text} (still so in reply {requests})" if repeated else found.text
            rejection = found
        raw = entry.text if entry else ""
        return Result(job.id, job.sample, None, None, rejection, raw, requests, entry)

    async def _check(self, job: Job[T], entry: Entry, budget: int, stage: str) -> T | Rejection:
        """What the check read, or a rejection: by the finish reason, the check or the inspector, in this order."""
        if entry.finish_reason != "stop":
            thought = (
                f"its reasoning used up the budget of {budget} tokens: raise teacher.max_tokens, or shorten the reasoning, for "
                f"example with --set {LESS_REASONING}"
            )
            rejections = {
                "length": Rejection(CUT_OFF, CUT_OFF_ERROR),
                "content_filter": Rejection("filtered", "a content filter stopped it"),
                CUT_IN_REASONING: Rejection(REASONING_TOO_LONG, thought),
                EMPTY: Rejection(EMPTY_REPLY, "the reply is empty, or there is only reasoning"),
            }
            other = Rejection("not_finished", f"it ended with finish reason {entry.finish_reason}")
            return rejections.get(entry.finish_reason, other)
        made = await self._runner.get_loop().run_in_executor(self._threads, job.check, entry.text)
        if isinstance(made, Rejection) or self._inspector is None or job.inspect is None:
            return made
        chat = job.inspect(entry.text)
        for repair in range(2):
            try:
                judged = await self._inspector.reply(chat, job.sample, repair, f"{stage} inspection", {})
            except (TeacherError, UsageError) as error:
                # name the inspector's own settings
                own = (
                    re.sub(r"teacher\.(?=price|api_base)", "teacher.inspector_", text)
                    for text in (error.message, error.hint)
                )
                raise type(error)(*(x.replace("teacher.model", "teacher.inspector") for x in own)) from None
            verdict, reason = _VERDICT.search(judged.text), _REASON.search(judged.text)
            if verdict is not None or judged.finish_reason != "stop":
                break
        if verdict is None:
            why = "the inspector gave no verdict; if it was cut off, raise teacher.max_tokens"
            raise NoReplyError("inspector_not_readable", why)  # another reply of the teacher would not help
        if verdict[1].lower() == "accept":
            return made
        text = " ".join(reason[1].split()) if reason else "the inspector rejects it"
        return Rejection("rejected_by_inspector", text)

    # -- cost estimates --------------------------------------------------------------------------------------------

    def ask_after_pilot(self, jobs: Iterable[Job[T]], total: int, stage: str) -> Iterator[Result[T]]:
        """Like `ask_all`; if the first few new jobs cost money, requests the rest only if `confirm` agrees.

        Otherwise raises DeclinedError. `confirm` is called once.
        """
        if self.confirm is not None:
            jobs = list(jobs)
            new = list(filter(self._is_new, jobs))
            pilot, left = new[:PILOT], len(new[PILOT:])
            if left:
                spent, unpriced = self.ledger.spent_usd, self.ledger.totals()["unpriced"]
                yield from self.ask_all(pilot, stage)
                known = self.ledger.totals()["unpriced"] == unpriced
                cost_usd = self.ledger.spent_usd - spent if known else None
                if cost_usd != 0:
                    if not self.confirm(PILOT, cost_usd, left, cost_usd and cost_usd / PILOT * left):
                        hint = "paid replies are kept; re-run to resume, with --yes to skip the question"
                        raise DeclinedError(f"stopped after {PILOT} of {total} rows, as requested", hint)
                    self.confirm = None
                jobs = [job for job in jobs if job not in pilot]
        yield from self.ask_all(jobs, stage)

    def _is_new(self, job: Job[T]) -> bool:
        """Whether the first request of a job is not in the ledger."""
        key = self._sender.key(job.messages(""), job.sample, 0, job.parameters)
        repaired = (job.messages(each) for each in ("", CUT_OFF_ERROR))
        later = (self._sender.key(chat, job.sample, 1, job.parameters) for chat in repaired)
        return self._sender.known(key, job.parameters, later) is None

    def preview(self, jobs: Iterable[Job[T]], completion_tokens: float, stage: str) -> dict[str, Any]:
        """What these jobs would send and cost, and the first request in full; nothing is sent.

        `completion_tokens` is a guess per reply, until the ledger holds replies of this stage.
        """
        first, requests, characters = None, 0, 0
        for job in filter(self._is_new, jobs):
            messages = [dict(message) for message in job.messages("")]
            parameters = {**self._sender.parameters, **job.parameters}
            first = first or {"model": self.settings.model, "messages": messages, **parameters}
            requests += 1
            characters += sum(len(message["content"]) for message in messages)
        known = self.ledger.totals(stage)
        if known["requests"] and known["completion_tokens"]:
            completion_tokens = known["completion_tokens"] / known["requests"]
        prompt, completion = round(characters / CHARACTERS_PER_TOKEN), round(requests * completion_tokens)
        price = self.price()
        cost_usd = None if price is None else price.cost_usd(prompt, completion)
        if self._inspector is not None:  # it reads the prompt and the reply, and writes a sentence
            read, written = prompt + completion, INSPECTION_TOKENS * requests
            prompt, completion, price = prompt + read, completion + written, self._inspector.connect().price
            cost_usd = None if cost_usd is None or price is None else cost_usd + price.cost_usd(read, written)
        return {
            "first_request": first,
            "requests": requests,
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "cost_usd": None if cost_usd is None else round(cost_usd, 6),
        }
