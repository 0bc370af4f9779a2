"""The teacher: many requests at once through LiteLLM, each reply checked, mended by asking again, and paid for once."""

import asyncio
import logging
import os
import queue
import random
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from ipaddress import ip_address
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

from sclite import config
from sclite.errors import TeacherFault, UsageFault
from sclite.teacher import failures
from sclite.teacher.ledger import Entry, Ledger, request_key
from sclite.teacher.loop import Loop

Messages = Sequence[Mapping[str, str]]
SEVERAL = 5  # different requests that must fail alike before the teacher, and not they, is to blame
_LOCAL_PROVIDERS = ("ollama", "ollama_chat", "lm_studio", "llamafile")


@dataclass(frozen=True)
class Flaw:
    """Why a reply cannot be used: `reason` is a name that is counted, `text` says it to the teacher and the user."""

    reason: str
    text: str


@dataclass(frozen=True)
class Job:
    """One thing to ask. `messages(fault)` builds the chat; the fault is empty at first, then says what to mend.

    `check(reply)` gives None for a good reply. It runs in a thread, several at once, and may take its time.
    `parameters` (temperature, top_p, max_tokens ..) hold for this job alone, before the teacher's own.
    """

    id: str
    messages: Callable[[str], Messages]
    check: Callable[[str], Flaw | None]
    sample: int = 0
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """What became of a job: `text` passed its check, or is None and `flaw` is the last thing that was wrong.

    `raw` is the last reply whatever it is worth, `requests` how many replies it took; `entry` is the last one as the
    ledger has it, None where none came.
    """

    id: str
    sample: int
    text: str | None
    flaw: Flaw | None
    raw: str
    requests: int
    entry: Entry | None = None


def import_litellm() -> ModuleType:
    """LiteLLM, imported when it is first needed (seconds), silent and without a look at the net or at .env files."""
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    os.environ["LITELLM_MODE"] = "PRODUCTION"
    import litellm

    # a call that is cancelled in its first moments leaves a coroutine behind, which Python reports on the terminal
    warnings.filterwarnings("ignore", r"coroutine '.*completion' was never awaited", RuntimeWarning)
    litellm.suppress_debug_info = True
    litellm.telemetry = False
    logging.getLogger("LiteLLM").setLevel(logging.CRITICAL)
    return litellm


class Teacher:
    """A model behind LiteLLM, with the run's ledger. Use as a context manager.

    `prepare` is called once, after LiteLLM is imported and before the first call: a caller registers a provider of
    its own there (quickstart.provider.register).
    """

    def __init__(self, settings: config.Teacher, ledger: Ledger, prepare: Callable[[], None] | None = None):
        self.settings, self.ledger = settings, ledger
        self._prepare = prepare
        self._litellm: ModuleType | None = None
        self._parameters = {
            name: value
            for name in ("temperature", "max_tokens")
            if (value := getattr(settings, name)) is not None
        }
        self._loop = Loop()
        self._room = asyncio.Semaphore(settings.concurrency)
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._key_variable = "the environment"
        self._options: dict[str, Any] = {}
        self._free = False
        self._answered = self._succeeded = False  # any HTTP reply; any usable one
        self._refused: dict[str, BaseException] = {}  # by key
        self._unanswered = 0  # requests given up since the last reply

    def __enter__(self) -> "Teacher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the calls under way and closes connections. The ledger stays open."""
        self._loop.close(self._litellm.close_litellm_async_clients if self._litellm else None)

    def identity(self) -> dict[str, Any]:
        """What signs the rows made from its replies: the model and its parameters, wherever it runs."""
        return {"model": self.settings.model, **self._parameters}

    # -- many jobs -------------------------------------------------------------------------------------------------

    def ask_all(self, jobs: Iterable[Job], stage: str = "") -> Iterator[Result]:
        """The result of each job, as it is done. Jobs are taken when there is room for them.

        Raises TeacherFault, and cancels the rest, where no further request can succeed: a bad key, an unknown model,
        nobody there. Leaving the iterator early cancels the rest too. `stage` names the ledger's rows.
        """
        if not self.settings.model:
            raise UsageFault(
                "teacher.model is not set", "add --set teacher.model=PROVIDER/NAME or edit sclite.toml"
            )
        waiting, done, flying = iter(jobs), queue.SimpleQueue[Future](), set[Future]()
        room = 2 * self.settings.concurrency  # jobs that wait before another try leave their calls to others
        try:
            while True:
                while len(flying) < room and (job := next(waiting, None)) is not None:
                    future = self._loop.submit(self._work(job, stage))
                    flying.add(future)
                    future.add_done_callback(done.put)
                if not flying:
                    break
                future = done.get()
                flying.discard(future)
                yield future.result()
        finally:
            for future in flying:
                future.cancel()
        self._blame_refusals(SEVERAL)

    async def _work(self, job: Job, stage: str) -> Result:
        flaw, fault, raw, entry = None, "", "", None
        parameters = {**self._parameters, **job.parameters}
        for repair in range(self.settings.repairs + 1):
            reply = await self._reply(job.messages(fault), job.sample, repair, stage, parameters)
            if isinstance(reply, Flaw):
                return Result(job.id, job.sample, None, reply, raw, repair, entry)
            raw, entry = reply.text, reply
            flaw = _unfinished(reply.finish_reason) or await self._loop.in_thread(job.check, raw)
            if flaw is None:
                return Result(job.id, job.sample, raw, None, raw, repair + 1, entry)
            again = fault.startswith(flaw.text)  # the same words would bring the same reply
            fault = f"{flaw.text} (still so in reply {repair + 1})" if again else flaw.text
        return Result(job.id, job.sample, None, flaw, raw, self.settings.repairs + 1, entry)

    # -- one request -----------------------------------------------------------------------------------------------

    async def _reply(
        self, messages: Messages, sample: int, repair: int, stage: str, parameters: Mapping[str, Any]
    ) -> Entry | Flaw:
        """The reply from the ledger, else from the endpoint; the same request in two jobs is sent once."""
        settings = self.settings
        key = request_key(settings.model, settings.api_base, messages, parameters, sample, repair)
        lock = self._locks.setdefault(key, asyncio.Lock())
        async with lock:
            entry = self.ledger.get(key)
            if entry is None:
                return await self._call(key, messages, stage, parameters)
        self._succeeded = True
        return entry

    async def _call(
        self, key: str, messages: Messages, stage: str, parameters: Mapping[str, Any]
    ) -> Entry | Flaw:
        """Send until there is a reply, which is in the ledger before anybody sees it."""
        litellm = self._connect()
        faults = (litellm.exceptions.openai.OpenAIError, litellm.exceptions.httpx.HTTPError, OSError)
        for attempt in range(1, self.settings.attempts_per_call + 1):
            try:
                async with self._room:
                    entry = await self._send(litellm, messages, parameters)
            except faults as fault:
                error = fault
            else:
                self.ledger.put(key, entry, stage, self.settings.model)
                self._answered = self._succeeded = True
                self._unanswered = 0
                return entry
            self._answered = self._answered or bool(failures.headers(error))
            verdict = failures.verdict(error)
            if verdict == failures.STOP:
                raise self._stop(error)
            if verdict == failures.REFUSED:
                self._refused[key] = error
                self._blame_refusals(max(SEVERAL, self.settings.concurrency))
                return Flaw("refused_by_teacher", failures.message(error))
            wait = failures.wait_seconds(error, attempt, random.random())
            if attempt == self.settings.attempts_per_call or wait > failures.LONGEST_WAIT_SECONDS:
                break
            await asyncio.sleep(wait)
        self._unanswered += 1
        if self._unanswered >= SEVERAL or not self._answered:
            raise failures.silent(error, self.settings.model, self.settings.api_base, attempt)
        return Flaw("no_reply", failures.message(error))

    async def _send(self, litellm: ModuleType, messages: Messages, parameters: Mapping[str, Any]) -> Entry:
        began = time.monotonic()
        limit = self.settings.timeout_seconds
        async with asyncio.timeout(
            limit + 1
        ):  # LiteLLM's own limit is for silence; a trickle never reaches it
            response = await litellm.acompletion(
                model=self.settings.model,
                messages=[dict(message) for message in messages],
                timeout=limit,
                max_retries=0,
                num_retries=0,
                **parameters,
                **self._options,
            )
        if not response.choices:
            raise ConnectionError("a reply without any choice")
        usage, choice = response.get("usage"), response.choices[0]
        tokens = (
            (usage.prompt_tokens, usage.completion_tokens) if usage and usage.total_tokens else (None, None)
        )
        return Entry(
            choice.message.content or "",
            choice.finish_reason or "stop",
            *tokens,
            0.0 if self._free else response._hidden_params.get("response_cost"),
            round(time.monotonic() - began, 3),
        )

    def _connect(self) -> ModuleType:
        """Import LiteLLM and find out what it needs for this model, once."""
        if self._litellm is not None:
            return self._litellm
        litellm, settings = import_litellm(), self.settings
        if self._prepare is not None:
            self._prepare()
        try:
            provider = litellm.get_llm_provider(settings.model, api_base=settings.api_base or None)[1]
        except litellm.exceptions.BadRequestError:
            raise TeacherFault(
                f"teacher.model {settings.model} names no provider that LiteLLM knows",
                "write PROVIDER/NAME: anthropic/NAME, ollama_chat/NAME, openai/NAME for any OpenAI-compatible endpoint",
            ) from None
        missing = litellm.validate_environment(settings.model)["missing_keys"]
        missing = [name for name in missing if name.endswith("_API_KEY")]
        self._key_variable = missing[0] if missing else f"{provider.upper()}_API_KEY"
        if settings.api_base:
            self._options["api_base"] = settings.api_base
            if missing:  # an endpoint of one's own often wants none, but LiteLLM insists
                self._options["api_key"] = "none"
        self._free = _is_local(settings.api_base) or (provider in _LOCAL_PROVIDERS and not settings.api_base)
        self._litellm = litellm
        return litellm

    # -- giving up -------------------------------------------------------------------------------------------------

    def _blame_refusals(self, enough: int) -> None:
        """Stop where several different requests were refused and none has ever succeeded."""
        if not self._succeeded and len(self._refused) >= enough:
            raise self._stop(next(iter(self._refused.values())))

    def _stop(self, error: BaseException) -> TeacherFault:
        return failures.stop(error, self.settings.model, self.settings.api_base, self._key_variable)


def _unfinished(finish_reason: str) -> Flaw | None:
    if finish_reason == "stop":
        return None
    if finish_reason == "length":
        return Flaw("cut_off", "it was cut off before its end, so write it shorter")
    if finish_reason == "content_filter":
        return Flaw("filtered", "a content filter stopped it")
    return Flaw(f"finish_{finish_reason}", f"it ended with {finish_reason} and not by itself")


def _is_local(api_base: str) -> bool:
    host = urlsplit(api_base).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
