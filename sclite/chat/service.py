"""Handles the server's requests: limits, choices in threads, and what they write, as it arrives."""

import asyncio
import random
import re
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from threading import Event
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, Field

from sclite.chat.answer import Answer, Settings, probability, solve_and_review
from sclite.errors import DataError, ScliteError
from sclite.student.base import Reply, Student
from sclite.student.self_correction import StepsScored, Writing, stream
from sclite.trace import TAG, corrected, tag_name

RAW = ":raw"
MOST_CHOICES, MOST_SECONDS = 8, 600.0
"""Limits of one request: choices, and time for all of them."""
QUEUE = 16
"""Choices that may wait per choice that the engine decodes in parallel."""


class TextPart(BaseModel):
    """A part of a message; only text parts are supported."""

    type: str
    text: str = ""


# text becomes a list of one part: an error in a union would list each of its types
Parts = Annotated[
    list[TextPart], BeforeValidator(lambda v: [TextPart(type="text", text=v)] if isinstance(v, str) else v)
]
Stops = Annotated[list[str], Field(max_length=4), BeforeValidator(lambda v: [v] if isinstance(v, str) else v)]


class Message(BaseModel):
    """One message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Parts | None = None

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content or ())


class StreamOptions(BaseModel):
    """Options of a streamed reply."""

    include_usage: bool = False


class Completion(BaseModel):
    """The body of POST /v1/chat/completions; other fields are ignored."""

    model: str
    messages: list[Message] = Field(min_length=1)
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES), BeforeValidator(lambda v: 1 if v is None else v)] = 1
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = None
    stop: Stops | None = None
    stream: Annotated[bool, BeforeValidator(lambda v: False if v is None else v)] = False
    stream_options: StreamOptions | None = None

    @property
    def question(self) -> Message | None:
        """The last user message with any content."""
        users = (m for m in reversed(self.messages) if m.role == "user")
        return next(
            (m for m in users if any(p.type != "text" or p.text.strip() for p in m.content or ())), None
        )

    @property
    def stops(self) -> tuple[str, ...]:
        return tuple(filter(None, self.stop or ()))


@dataclass(frozen=True)
class Piece:
    """New text of a choice, for its `reasoning_content` or `content`."""

    index: int
    field: str
    text: str


@dataclass(frozen=True)
class End:
    """The end of a choice."""

    index: int
    finish: str
    prompt_tokens: int
    tokens: int
    prefill_tokens: int
    seconds: float
    answer: Answer | None = None


class ApiError(Exception):
    """An error as OpenAI's API reports it."""

    def __init__(self, status: int, message: str, code: str | None = None, parameter: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.parameter = status, message, code, parameter

    @property
    def body(self) -> dict[str, dict[str, str | None]]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.parameter, "code": self.code}}


NAMES = {"key": "Key: ", "cause": "Why wrong: ", "correction": "Correct: ", "generalized": "In general: ", "answer": "Answer: "}  # fmt: skip


def plain_text(trace: str, complete: bool) -> str:
    """A trace without its tags: `1. ..`, `Answer: ..`; and without its end, if that may be the beginning of a tag."""

    def plain(tag: re.Match[str]) -> str:
        name = tag_name(tag[2])
        return "" if tag[1] else f"{tag[3]}. " if name == "step" else NAMES[name]

    begun = r"</?[A-Z]\w*\Z" if complete else r"<[^<>]{0,30}\Z"  # also if a reply was cut off
    return re.sub(r"\n{2,}", "\n", re.sub(begun, "", TAG.sub(plain, trace))).removeprefix("\n")


class Service:
    """Answers requests with one student. Each choice runs in a thread; the engine decodes them together."""

    def __init__(
        self, student: Student, name: str, settings: Settings, parallel: int, *, seconds: float = MOST_SECONDS
    ):
        self.student, self.name, self.settings, self.seconds = student, name, settings, seconds
        self.most = parallel * (1 + QUEUE)
        self.pool = ThreadPoolExecutor(parallel, "answer")
        self.names = name, name + RAW
        self.active = 0
        self.put_into: set[Callable[[Exception], None]] = set()
        """One function for each request, which ends it with an error."""
        self.counts: defaultdict[str, float] = defaultdict(float)
        self.began = int(time.time())

    async def run(self, query: Completion) -> AsyncGenerator[Piece | End, None]:
        """Yield what the choices write, as it arrives. Closing it frees the engine. Raises ApiError."""
        if query.model not in self.names:
            raise ApiError(404, f"the model {query.model!r} does not exist", "model_not_found", "model")
        if query.question is None:
            raise ApiError(400, "there is no user message", None, "messages")
        for message in [query.question] if query.model == self.name else query.messages:
            if other := next((part.type for part in message.content or () if part.type != "text"), ""):
                why = f"a message has a part of type {other!r}; only text is supported"
                raise ApiError(400, why, None, "messages")
        tokens = query.max_completion_tokens or query.max_tokens or self.settings.max_tokens
        temperature = query.temperature or 0.0
        settings = replace(
            self.settings,
            max_tokens=min(tokens, self.settings.max_tokens),
            temperature=temperature if temperature > 0.001 else 0.0,
            top_p=query.top_p or 1.0,
            seed=random.randrange(2**31) if query.seed is None else abs(query.seed),
        )
        answer = self._reviewed if query.model == self.name else self._raw
        if self.active + query.n > self.most:
            raise ApiError(429, "too many requests are waiting; try again later", "rate_limit_exceeded")
        loop, cancel = asyncio.get_running_loop(), Event()
        found: asyncio.Queue[Piece | End | Exception] = asyncio.Queue()
        began, left = time.monotonic(), query.n

        def put(item: Piece | End | Exception) -> None:
            with suppress(RuntimeError):  # the loop is closed: the server has stopped
                loop.call_soon_threadsafe(found.put_nowait, item)

        def work(index: int) -> None:
            for piece in answer(query, replace(settings, seed=settings.seed + index), index, cancel):
                put(piece)

        def check(done: Future[None]) -> None:
            if not done.cancelled() and isinstance(error := done.exception(), Exception):
                # the chat template may reject the messages
                status = 400 if isinstance(error, DataError) else 500
                put(ApiError(status, error.message) if isinstance(error, ScliteError) else error)

        late = ApiError(504, f"no answer within {self.seconds:.0f} seconds", "timeout")
        deadline = loop.call_later(self.seconds, found.put_nowait, late)
        self.active += query.n
        self.put_into.add(put)
        choices = [self.pool.submit(work, index) for index in range(query.n)]
        for each in choices:
            each.add_done_callback(check)
        try:
            while left:
                item = await found.get()
                if isinstance(item, Exception):
                    raise item
                if isinstance(item, End):
                    left -= 1
                    self.counts['tokens_total{kind="prompt"}'] += item.prompt_tokens
                    self.counts['tokens_total{kind="prefill"}'] += item.prefill_tokens
                    self.counts['tokens_total{kind="generated"}'] += item.tokens
                    if item.answer is not None and item.answer.review is not None:
                        self.counts["reviewed_total"] += 1
                        self.counts["corrected_total"] += item.answer.review.trace is not None
                yield item
        finally:
            self.counts["request_seconds_count"] += 1
            self.counts["request_seconds_sum"] += time.monotonic() - began
            deadline.cancel()
            cancel.set()
            for each in choices:
                each.cancel()
            self.active -= query.n
            self.put_into.remove(put)

    def stop(self) -> None:
        """End all requests with an error."""
        for put in list(self.put_into):
            put(ApiError(503, "the server is shutting down", "shutting_down"))

    def _raw(self, query: Completion, settings: Settings, index: int, cancel: Event) -> Iterator[Piece | End]:
        """The model's reply to the unchanged messages."""
        roles = {"developer": "system"}
        messages = tuple({"role": roles.get(m.role, m.role), "content": m.text} for m in query.messages)
        request = settings.request(messages, query.stops)
        began = time.monotonic()
        held, hold = "", max(map(len, query.stops), default=0)  # a stop string is not part of the reply
        for found in self.student.stream(request, cancel, query.stream):
            if isinstance(found, str):
                held += found
                if len(held) > hold:
                    yield Piece(index, "content", held[: len(held) - hold])
                    held = held[len(held) - hold :]
            elif isinstance(found, Reply):
                check_reply(found)
                stop = next((stop for stop in query.stops if held.endswith(stop)), "")
                yield Piece(index, "content", held.removesuffix(stop))
                finish = "length" if found.finish == "length" else "stop"
                counts = found.prompt_tokens, found.tokens, found.prefill_tokens
                yield End(index, finish, *counts, time.monotonic() - began)

    def _reviewed(
        self, query: Completion, settings: Settings, index: int, cancel: Event
    ) -> Iterator[Piece | End]:
        """The last question solved and reviewed: students are trained on single problems."""
        assert query.question is not None  # `run` has checked it
        question, accused, written, sent = query.question.text, None, "", ""
        # without a review, the text is streamed as content, unless a stop string may end it
        field, shown = "reasoning_content" if settings.mode else "content", settings.mode or not query.stops
        for event in stream(self.student, solve_and_review(question, settings), cancel, query.stream):
            written += event if isinstance(event, str) else ""
            whole = plain_text(written, complete=not isinstance(event, str))
            text, sent = whole[len(sent) :], whole
            if isinstance(event, Writing):
                written = sent = ""
                guided = f"\n\nReview of step {accused}\nWhy wrong: "
                parts = {"review": "\n\nReview\n", "correction": guided, "continuation": "\n"}
                text += parts.get(event.part, "")
            elif isinstance(event, StepsScored):
                accused = event.accused
                errors = [f"{100 * probability(odds):.0f} %" for odds in event.scores]
                listed = ", ".join(f"step {n}: {error}" for n, error in enumerate(errors, 1))
                text += f"\n\nProbability of an error: {listed}"
            if text and shown:
                yield Piece(index, field, text)
            if isinstance(event, Answer):
                check_reply(event.first)
                final, content = corrected(event.final), plain_text(event.text, complete=True)
                if final.steps and settings.mode:
                    content = "\n".join(f"{n}. {step.text}" for n, step in enumerate(final.steps, 1))
                    content += "" if final.answer is None else f"\n\nAnswer: {final.answer}"
                ends = [at for stop in query.stops if (at := content.find(stop)) >= 0]
                if settings.mode or query.stops:
                    yield Piece(index, "content", content[: min(ends, default=len(content))])
                finish = "length" if event.first.finish == "length" and not ends else "stop"
                counts = event.first.prompt_tokens, event.tokens, event.prefill
                yield End(index, finish, *counts, event.seconds, event)


def check_reply(reply: Reply) -> None:
    """Raises ApiError if the student could not reply because the prompt is too long."""
    if reply.finish == "error":
        raise ApiError(400, reply.error or "no reply", "context_length_exceeded", "messages")
