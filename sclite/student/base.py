"""The student protocol: generate replies, and score one continuation against another."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import Protocol

from sclite.errors import UsageError
from sclite.prompts import Messages


@dataclass(frozen=True)
class Request:
    """One generation, after the assistant text in `pieces`; a `stop` string ends the reply and is part of its text.

    Each piece is tokenized on its own and the ids are concatenated: training and inference see the same tokens.
    """

    messages: Messages
    pieces: tuple[str, ...] = ()
    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reply:
    """The reply to request number `index`, without its `pieces`; `finish` is stop, length, cancelled or error."""

    index: int
    text: str
    tokens: int
    prompt_tokens: int
    finish: str
    error: str | None = None
    prefill_tokens: int = field(default=0, compare=False)
    """Prompt tokens that were computed, not found in a cache."""


@dataclass(frozen=True)
class ScoreRequest:
    """Which of two strings comes next, after each piece whose number (from 0) is in `marks`; -1: after the prompt.

    `options` holds two strings per mark, `others` the strings that compete with them. If the options' first tokens are
    unique among all of these, only the first tokens are compared, otherwise the whole options. Without a second option,
    the first one is compared with any other text.
    """

    messages: Messages
    pieces: tuple[str, ...]
    marks: tuple[int, ...]
    options: tuple[tuple[str, str | None], ...]
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scores:
    """For request number `index`: log p(first option) - log p(second) in nats at each mark, in order."""

    index: int
    log_odds: tuple[float, ...]
    prefill_tokens: int = field(default=0, compare=False)


class Student(Protocol):
    """Anything that solves and reviews: the trainable model, a GGUF in the engine, an endpoint."""

    def generate(self, requests: Sequence[Request]) -> Iterator[Reply]:
        """Yield one reply per request as each finishes, in any order."""

    def score(self, requests: Sequence[ScoreRequest]) -> Iterator[Scores]:
        """Yield the scores of each request, in any order. Only the engine can; others raise UsageError."""
        raise UsageError("this model cannot score its steps", "use free review (review.mode=free), or a GGUF")

    def stream(
        self, ask: Request | ScoreRequest, cancel: Event | None = None, pieces: bool = True
    ) -> Iterator[str | Reply | Scores]:
        """Yield the text of a reply as it is written (without `pieces`, once it is complete), then the reply; or the scores.

        Setting `cancel` from another thread ends it early, in students that can. The others yield the text at once.
        """
        if isinstance(ask, ScoreRequest):
            yield from self.score([ask])
            return
        for reply in self.generate([ask]):
            yield reply.text
            yield reply
