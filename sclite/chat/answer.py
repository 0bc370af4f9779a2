"""One answer: the first solution of a question and its review. Chat and server run the same script."""

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from sclite import console, prompts
from sclite.config import Config
from sclite.student.base import Reply, Request
from sclite.student.llama_cpp.engine import Engine
from sclite.student.llama_cpp.probe import check_gguf
from sclite.student.self_correction import Reviewed, ReviewSettings, Script, Writing, review
from sclite.student.step_scores import Cutoff
from sclite.trace import Trace, parse, render


@dataclass(frozen=True)
class Settings:
    """How to answer. `mode`: guided, free, or "" for no review."""

    mode: str = "guided"
    threshold: float = 0.0
    confidence_weight: float = 0.0
    rounds: int = 1
    max_tokens: int = 1024
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    prompt_folder: str = ""

    def request(self, messages: prompts.Messages, stop: tuple[str, ...] = ()) -> Request:
        return Request(messages, (), self.max_tokens, self.temperature, self.top_p, self.seed, stop)

    @classmethod
    def of(cls, config: Config, cutoff: Cutoff | None, mode: str) -> "Settings":
        """The settings of a configuration that corrects steps by a cutoff."""
        cutoff = cutoff or Cutoff()
        return cls(
            mode=mode,
            threshold=cutoff.threshold,
            confidence_weight=cutoff.confidence_weight,
            rounds=max(1, config.review.rounds),
            max_tokens=config.eval.max_tokens,
            seed=config.seed,
            prompt_folder=config.prompts.folder,
        )


@dataclass(frozen=True)
class Answer:
    """The first reply to a question, the trace in it, and its review; `note` says why something is missing."""

    question: str
    first: Reply
    trace: Trace
    review: Reviewed | None = None
    note: str = ""
    seconds: float = 0.0
    review_seconds: float = 0.0
    """The part of `seconds` that the review took."""
    asked: str = ""
    """The question as the student received it, with earlier ones before it."""
    threshold: float = 0.0
    """The threshold of its review."""

    @property
    def complete(self) -> bool:
        """Whether the reply is complete: it neither failed nor was stopped."""
        return self.first.finish not in ("cancelled", "error")

    @property
    def final(self) -> Trace:
        """The solution after the review: the first one, unless the review changed it."""
        return self.trace if self.review is None else self.review.trace or self.trace

    @property
    def text(self) -> str:
        """The final text: the reply, unless the review changed it."""
        return self.first.text if self.final is self.trace else render(self.final)

    @property
    def result(self) -> str:
        """The final answer; the whole text if there is none."""
        return self.final.answer or self.text

    @property
    def tokens(self) -> int:
        """The tokens generated for the solution and the review."""
        return self.first.tokens + (self.review.tokens if self.review is not None else 0)

    @property
    def prefill(self) -> int:
        """The prompt tokens that were computed, not found in the cache."""
        return self.first.prefill_tokens + (self.review.prefill if self.review is not None else 0)

    def as_json(self) -> dict[str, object]:
        """The answer as `sclite chat --json` prints it."""
        row: dict[str, object] = {
            "question": self.question,
            "first": self.first.text,
            "answer": self.final.answer,
        }
        if self.review is not None:
            row |= {
                "accused": self.review.accused,
                "cause": self.review.cause,
                "correction": self.review.correction,
                "step_scores": [round(score, 4) for score in self.review.scores],
                "final": self.text,
            }
        return row | {
            "tokens": self.tokens,
            "prefill_tokens": self.prefill,
            "seconds": round(self.seconds, 3),
            "review_seconds": round(self.review_seconds, 3),
            "note": self.note,
        }


def solve_and_review(question: str, settings: Settings) -> Script[Answer]:
    """Solve a question, then review the solution. A failed reply is not reviewed."""
    began = time.monotonic()
    yield Writing("solution")
    reply = yield settings.request(prompts.solve_messages(question, settings.prompt_folder))
    assert isinstance(reply, Reply)
    trace = parse(reply.text).trace
    if reply.finish == "error" or not trace.steps:
        note = reply.error or "the answer has no steps to review"
        return Answer(question, reply, trace, None, note, time.monotonic() - began)
    solved, reviewed = time.monotonic(), None
    if settings.mode and reply.finish != "length":
        limits = (settings.threshold, settings.rounds, settings.max_tokens, settings.prompt_folder)
        chosen = ReviewSettings(*limits, confidence_weight=settings.confidence_weight)
        reviewed = yield from review(question, trace, chosen, settings.mode)
    note = "" if reviewed is None else reviewed.note
    if reply.finish == "length":
        full = 0 < reply.tokens < settings.max_tokens
        shorten = "shorten the question, or use a longer context (eval.context for a GGUF)"
        longer = "raise max_tokens (/set max_tokens, or eval.max_tokens)"
        remedy = f"the context is full: {shorten}" if full else longer
        note = f"the answer was cut off at {reply.tokens} tokens; {remedy}"
    elif trace.answer is None:
        note = note or "the steps do not lead to an answer"
    ended = time.monotonic()
    times = (ended - began, ended - solved)
    return Answer(question, reply, trace, reviewed, note, *times, threshold=settings.threshold)


@contextmanager
def open_gguf(path: Path, config: Config, parallel: int | None) -> Iterator[Engine]:
    """A GGUF in llama.cpp with the system prompt of a solution in its cache. Raises DataError if it cannot be loaded."""
    with ExitStack() as stack:
        with console.spinner(f"loading {path.name}"):
            check_gguf(path)
            engine = stack.enter_context(Engine(path, parallel=parallel, context=config.eval.context))
            list(engine.generate([Request(prompts.solve_messages("1", config.prompts.folder), max_tokens=1)]))
        yield engine


def probability(log_odds: float) -> float:
    """The probability of an error from its log-odds in nats."""
    return 1 / (1 + math.exp(min(-log_odds, 700.0)))
