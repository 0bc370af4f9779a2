"""Handles the server's requests: limits, choices in threads, and what they write, as it arrives."""

import asyncio
import random
import re
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from threading import Event
from typing import Literal

from pydantic import BaseModel, Field, field_validator, model_validator

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


class Message(BaseModel):
    """One message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str = ""

    @field_validator("content", mode="before")
    @classmethod
    def join_parts(cls, given: object) -> object:
        """One text from the text parts of a message."""
        if not isinstance(given, list):
            return "" if given is None else given
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in given):
            raise ValueError("only parts of type text are supported")
        return "".join(str(part.get("text", "")) for part in given)


class StreamOptions(BaseModel):
    """Options of a streamed reply."""

    include_usage: bool = False


class Completion(BaseModel):
    """The body of POST /v1/chat/completions; other fields are ignored."""

    model: str
    messages: list[Message] = Field(min_length=1)
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(0.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = None
    stop: list[str] = Field([], max_length=4)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @model_validator(mode="before")
    @classmethod
    def fill_defaults(cls, body: object) -> object:
        """null is the default of a field, and one stop string a list."""
        if not isinstance(body, dict):
            return body
        given = {name: value for name, value in body.items() if value is not None}
        stop = given.get("stop", [])
        return given | {"stop": list(filter(None, [stop])) if isinstance(stop, str) else stop}

    @property
    def question(self) -> str:
        """The last user message with any text."""
        users = (m.content for m in reversed(self.messages) if m.role == "user" and m.content.strip())
        return next(users, "")


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
    answer: Answer | None = None

    @property
    def fields(self) -> dict[str, object]:
        """The fields of the choice: OpenAI's, and the steps and their review as data."""
        reviewed = {} if self.answer is None else {"sclite": self.answer.as_json()}
        return {"finish_reason": self.finish, **reviewed}


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
        self.cancels: set[Event] = set()
        """One for each request in flight, which stops its choices; the request ends with an error."""
        self.counts: defaultdict[str, float] = defaultdict(float)
        self.began = int(time.time())

    async def run(self, query: Completion) -> AsyncGenerator[Piece | End, None]:
        """Yield what the choices write, as it arrives. Closing it frees the engine. Raises ApiError."""
        if query.model not in self.names:
            raise ApiError(404, f"the model {query.model!r} does not exist", "model_not_found", "model")
        if not query.question:
            raise ApiError(400, "there is no user message", None, "messages")
        tokens = query.max_completion_tokens or query.max_tokens or self.settings.max_tokens
        settings = replace(
            self.settings,
            max_tokens=min(tokens, self.settings.max_tokens),
            temperature=query.temperature if query.temperature > 0.001 else 0.0,
            top_p=query.top_p,
            seed=random.randrange(2**31) if query.seed is None else abs(query.seed),
        )
        answer = self._reviewed if query.model == self.name else self._raw
        if self.active + query.n > self.most:
            raise ApiError(429, "too many requests are waiting; try again later", "rate_limit_exceeded")
        loop, cancel, began = asyncio.get_running_loop(), Event(), time.monotonic()
        found: asyncio.Queue[Piece | End | asyncio.Future[None]] = asyncio.Queue()

        def work(index: int) -> None:
            for item in answer(query, replace(settings, seed=settings.seed + index), index, cancel):
                loop.call_soon_threadsafe(found.put_nowait, item)

        self.active += query.n
        self.cancels.add(cancel)
        choices = [loop.run_in_executor(self.pool, work, index) for index in range(query.n)]
        for choice in choices:
            choice.add_done_callback(found.put_nowait)
        left = query.n
        try:
            while left:
                item = await asyncio.wait_for(found.get(), began + self.seconds - time.monotonic())
                if isinstance(item, asyncio.Future):
                    item.result()  # raises what its thread has raised
                    if cancel.is_set():
                        raise ApiError(503, "the server is shutting down", "shutting_down")
                    left -= 1
                    continue
                if isinstance(item, End):
                    self.counts['tokens_total{kind="prompt"}'] += item.prompt_tokens
                    self.counts['tokens_total{kind="generated"}'] += item.tokens
                    if item.answer is not None and item.answer.final is not item.answer.trace:
                        self.counts["corrected_total"] += 1
                yield item
        except TimeoutError:
            raise ApiError(504, f"no answer within {self.seconds:.0f} seconds", "timeout") from None
        except ScliteError as error:  # the chat template may reject the messages
            raise ApiError(400 if isinstance(error, DataError) else 500, error.message) from error
        finally:
            self.counts["request_seconds_count"] += 1
            self.counts["request_seconds_sum"] += time.monotonic() - began
            cancel.set()
            for choice in choices:
                choice.cancel()
            self.active -= query.n
            self.cancels.remove(cancel)

    def _raw(self, query: Completion, settings: Settings, index: int, cancel: Event) -> Iterator[Piece | End]:
        """The model's reply to the unchanged messages."""
        roles = {"developer": "system"}
        messages = tuple({"role": roles.get(m.role, m.role), "content": m.content} for m in query.messages)
        request = settings.request(messages, tuple(query.stop))
        held, hold = "", max(map(len, query.stop), default=0)  # a stop string is not part of the reply
        for found in self.student.stream(request, cancel, query.stream):
            if isinstance(found, str):
                held += found
                if len(held) > hold:
                    yield Piece(index, "content", held[: len(held) - hold])
                    held = held[len(held) - hold :]
            elif isinstance(found, Reply):
                if found.finish == "error":  # the prompt is too long
                    raise ApiError(400, found.error or "no reply", "context_length_exceeded", "messages")
                stop = next((stop for stop in query.stop if held.endswith(stop)), "")
                yield Piece(index, "content", held.removesuffix(stop))
                finish = "length" if found.finish == "length" else "stop"
                yield End(index, finish, found.prompt_tokens, found.tokens)

    def _reviewed(
        self, query: Completion, settings: Settings, index: int, cancel: Event
    ) -> Iterator[Piece | End]:
        """The last question solved and reviewed: students are trained on single problems."""
        accused, written, sent = None, "", ""
        # without a review, the text is streamed as content, unless a stop string may end it
        field, shown = "reasoning_content" if settings.mode else "content", settings.mode or not query.stop
        for event in stream(self.student, solve_and_review(query.question, settings), cancel, query.stream):
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
                if event.first.finish == "error":  # the prompt is too long
                    reason = event.first.error or "no reply"
                    raise ApiError(400, reason, "context_length_exceeded", "messages")
                final, content = corrected(event.final), plain_text(event.text, complete=True)
                if final.steps and settings.mode:
                    content = "\n".join(f"{n}. {step.text}" for n, step in enumerate(final.steps, 1))
                    content += "" if final.answer is None else f"\n\nAnswer: {final.answer}"
                ends = [at for stop in query.stop if (at := content.find(stop)) >= 0]
                if settings.mode or query.stop:
                    yield Piece(index, "content", content[: min(ends, default=len(content))])
                finish = "length" if event.first.finish == "length" and not ends else "stop"
                yield End(index, finish, event.first.prompt_tokens, event.tokens, event)
