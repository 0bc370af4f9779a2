"""The teacher: many jobs at once, each reply checked, mended by asking again, and paid for once."""

import asyncio
import queue
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sclite import config
from sclite.errors import BudgetError, UsageError
from sclite.teacher.cost import Budget, Price
from sclite.teacher.ledger import Entry, Ledger
from sclite.teacher.loop import Loop
from sclite.teacher.reply import EMPTY, ONLY_REASONING, REFUSAL
from sclite.teacher.sender import SEVERAL, Messages, NoReply, Sender, parameters_of

EMPTY_REPLY = "empty_reply"
_VERDICT = re.compile(r"<\s*verdict\s*>\s*(accept|reject)\w*\b", re.I)
_REASON = re.compile(r"<\s*reason\s*>(.*?)(?:</\s*reason\s*>|\Z)", re.I | re.S)


@dataclass(frozen=True)
class Rejection:
    """Why a reply cannot be used: `reason` is a name that is counted, `text` says it to the teacher and the user."""

    reason: str
    text: str


@dataclass(frozen=True)
class Job:
    """One thing to ask. `messages(fault)` builds the chat; the fault is empty at first, then says what to mend.

    `check(reply)` gives None for a good reply. It runs in a thread, several at once, and may take its time.
    `parameters` (temperature, top_p, max_tokens ..) hold for this job alone, before the teacher's own.
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
    """What became of a job: `text` passed its check, or is None and `flaw` is the last thing that was wrong.

    `raw` is the last reply whatever it is worth, `requests` how many replies it took; `entry` is the last one as the
    ledger has it, None where none came.
    """

    id: str
    sample: int
    text: str | None
    rejection: Rejection | None
    raw: str
    requests: int
    entry: Entry | None = None


def identity(settings: config.Teacher) -> dict[str, Any]:
    """What signs the rows made from its replies: the models and their parameters, wherever they run."""
    named = {"model": settings.model, **parameters_of(settings)}
    return {**named, "inspector": settings.inspector} if settings.inspector else named


class Teacher:
    """A model behind LiteLLM, with the run's ledger, and an inspector where one is named. Use as a context manager.

    `prepare` is called once, after LiteLLM is imported and before the first call: a caller registers a provider of
    its own there (quickstart.provider.register).
    """

    def __init__(self, settings: config.Teacher, ledger: Ledger, prepare: Callable[[], None] | None = None):
        self.settings, self.ledger = settings, ledger
        self._loop = Loop()
        budget = Budget(ledger, settings.max_cost)
        self._sender = Sender(settings, ledger, budget, prepare)
        self._inspector = None
        if settings.inspector:
            other = {"model": settings.inspector, "api_base": settings.inspector_api_base, "price": None}
            self._inspector = Sender(settings.model_copy(update=other), ledger, budget, prepare)

    def __enter__(self) -> "Teacher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the calls under way and closes connections. The ledger stays open."""
        self._loop.close(self._close_connections)

    async def _close_connections(self) -> None:
        for sender in (self._sender, self._inspector):
            if sender is not None and sender.provider is not None:
                await sender.provider.close()

    def identity(self) -> dict[str, Any]:
        return identity(self.settings)

    def first_request(self, job: Job) -> dict[str, Any]:
        """What the first request of a job says, exactly; nothing is sent."""
        chat = [dict(message) for message in job.messages("")]
        return {"model": self.settings.model, "messages": chat, **self._sender.parameters, **job.parameters}

    def has_answered(self, job: Job) -> bool:
        """Whether the first reply to this job is in the ledger."""
        return self.ledger.get(self._sender.key(job.messages(""), job.sample, 0, job.parameters)) is not None

    def price(self) -> Price | None:
        """US dollars per token; None where nobody knows. Imports LiteLLM, which takes seconds, and sends nothing."""
        return self._sender.connect().price

    # -- many jobs -------------------------------------------------------------------------------------------------

    def ask_all(self, jobs: Iterable[Job], stage: str = "") -> Iterator[Result]:
        """The result of each job, as it is done. Jobs are taken when there is room for them.

        Raises TeacherFault, and cancels the rest, where no further request can succeed: a bad key, an unknown model,
        nobody there. At the spending limit what is under way is finished and given, then BudgetFault is raised.
        Leaving the iterator early cancels the rest too. `stage` names the ledger's rows.
        """
        if not self.settings.model:
            raise UsageError(
                "teacher.model is not set",
                "add a LiteLLM model, as in --set teacher.model=openai/gpt-4.1, or set it in sclite.toml",
            )
        waiting, done, flying = iter(jobs), queue.SimpleQueue[asyncio.Task](), 0
        tasks = self._loop.group(done.put)
        room = 2 * self.settings.concurrency  # jobs that wait before another try leave their calls to others
        reached: BudgetError | None = None
        try:
            while True:
                while reached is None and flying < room and (job := next(waiting, None)) is not None:
                    tasks.start(self._work(job, stage))
                    flying += 1
                if not flying:
                    break
                task = done.get()
                flying -= 1
                if isinstance(task.exception(), BudgetError):
                    reached = task.exception()
                else:
                    yield task.result()
        finally:
            tasks.cancel()
        if reached is not None:
            raise reached
        self._sender.blame_refusals(SEVERAL)

    async def _work(self, job: Job, stage: str) -> Result:
        rejection, error, raw, entry = None, "", "", None
        for repair in range(self.settings.repairs + 1):
            try:
                entry = await self._sender.reply(
                    job.messages(error), job.sample, repair, stage, job.parameters
                )
                raw = entry.text
                rejection = await self._flaw(job, raw, entry.finish_reason, stage)
            except NoReply as silence:
                return Result(
                    job.id, job.sample, None, Rejection(silence.reason, str(silence)), raw, repair, entry
                )
            if rejection is None:
                return Result(job.id, job.sample, raw, None, raw, repair + 1, entry)
            again = error.startswith(rejection.text)  # the same words would bring the same reply
            error = f"{rejection.text} (still so in reply {repair + 1})" if again else rejection.text
        return Result(job.id, job.sample, None, rejection, raw, self.settings.repairs + 1, entry)

    async def _flaw(self, job: Job, text: str, finish_reason: str, stage: str) -> Rejection | None:
        """What is wrong with a reply: its end, then the job's own check, then what the inspector says."""
        rejection = _unfinished(finish_reason, text) or await self._loop.in_thread(job.check, text)
        if rejection is not None or self._inspector is None or job.inspect is None:
            return rejection
        said = await self._inspector.reply(job.inspect(text), job.sample, 0, f"{stage} inspection")
        return _judged(said.text)


def _judged(text: str) -> Rejection | None:
    """What the inspector's reply says of the work: None where it accepts."""
    verdict = _VERDICT.search(text)
    if verdict is None:
        return Rejection("inspector_not_readable", "the inspector gave no verdict")
    if verdict[1].lower() == "accept":
        return None
    reason = _REASON.search(text)
    return Rejection(
        "rejected_by_inspector", " ".join(reason[1].split()) if reason else "the inspector rejects it"
    )


def _unfinished(finish_reason: str, text: str) -> Rejection | None:
    if finish_reason == "stop":
        return None
    if finish_reason == "length":
        if text.strip():
            return Rejection("cut_off", "it was cut off before its end, so write it shorter")
        return Rejection(
            "cut_off", "it was cut off before its first word: think less, or raise teacher.max_tokens"
        )
    if finish_reason == "content_filter":
        return Rejection("filtered", "a content filter stopped it")
    if finish_reason == REFUSAL:
        return Rejection("refused_by_teacher", f"it declines: {' '.join(text.split())[:200]}")
    if finish_reason == ONLY_REASONING:
        return Rejection("only_reasoning", "there is reasoning but no reply after it")
    if finish_reason == EMPTY:
        return Rejection(EMPTY_REPLY, "the reply is empty")
    return Rejection(f"finish_{finish_reason}", f"it ended with {finish_reason} and not by itself")


def count_unanswered(dropped: Mapping[str, int]) -> int:
    """How many drops are no verdict on their rows, so that the same command asks for them again."""
    return sum(dropped.get(reason, 0) for reason in ("no_reply", "unreadable_reply", EMPTY_REPLY))
