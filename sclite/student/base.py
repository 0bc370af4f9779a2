"""What every student can do: generate replies, and weigh two continuations against each other."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

Messages = tuple[dict[str, str], ...]
"""Chat messages, each {"role": ..., "content": ...}."""


@dataclass(frozen=True)
class Request:
    """One generation.

    `pieces` is assistant text that stands before the first new token. Each piece is tokenised by itself and the ids are
    concatenated (METHOD section 1), so that training and inference see the same tokens. `stop` strings end the reply;
    the reply's text includes the one that was met.
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
    """What came of request number `index`; `text` holds only what is new. `finish` is stop, length or error."""

    index: int
    text: str
    tokens: int
    prompt_tokens: int
    finish: str
    error: str | None = None


@dataclass(frozen=True)
class ScoreRequest:
    """Which of two strings comes next, read after each piece whose number (from 0) is in `marks`.

    `options` are two strings for each mark, `others` what else may stand there. Where no two of them all begin with the same
    token, the first tokens of the options are compared, else the whole options.
    """

    messages: Messages
    pieces: tuple[str, ...]
    marks: tuple[int, ...]
    options: tuple[tuple[str, str], ...]
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scores:
    """For request number `index`: log p(first option) - log p(second) in nats at each mark, in order."""

    index: int
    log_odds: tuple[float, ...]
    prompt_tokens: int


def tokens_to_compare(
    first: list[int], second: list[int], others: Sequence[list[int]]
) -> tuple[list[int], list[int]]:
    """The tokens by which two options are compared; see `ScoreRequest`."""
    heads = [option[0] for option in (first, second, *others)]
    alike = any(heads.count(option[0]) > 1 for option in (first, second))
    return (first, second) if alike else (first[:1], second[:1])


class Student(Protocol):
    """Anything that solves and reviews: the trainable model, a GGUF in the engine, an endpoint."""

    def generate(self, requests: Sequence[Request]) -> Iterator[Reply]:
        """Yield one reply for each request, as each is done, in any order."""
        ...

    def score(self, requests: Sequence[ScoreRequest]) -> Iterator[Scores]:
        """Yield the scores of each request, in any order. Endpoints raise NotImplementedError."""
        ...
