"""One answer: the first solution of a question and its review. Chat and server run the same script."""

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

from sclite import console, prompts
from sclite.config import Config
from sclite.student.base import Reply, Request
from sclite.student.llama_cpp.engine import Engine, check_gguf
from sclite.student.self_correction import Reviewed, ReviewSettings, Script, Writing, review
from sclite.student.step_scores import Cutoff
from sclite.trace import Trace, parse, render


@dataclass(frozen=True)
class Settings(ReviewSettings):
    """How to answer. `mode`: guided, free, or "" for no review. Temperature, seed and top_p are those of the solution."""

    max_tokens: int = 1024
    top_p: float = 1.0
    mode: str = "guided"

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
    review_seconds: float = 0.0  # the part of `seconds` that the review took
    asked: str = ""  # the question as the student received it, with earlier ones before it

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

    def as_json(self) -> dict[str, object]:
        """The answer as `sclite chat --json` prints it."""
        row = {
            "question": self.question,
            "first": self.first.text,
            "answer": self.final.answer,
            "note": self.note,
        }
        reviewed: dict[str, object] = {}
        if (review := self.review) is not None:
            reviewed = {"accused": review.accused, "cause": review.cause, "correction": review.correction}
            reviewed |= {"step_scores": [round(score, 4) for score in review.scores], "final": self.text}
        return {**row, **reviewed, "tokens": self.tokens, "seconds": round(self.seconds, 3)}


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
        greedy = replace(settings, temperature=0.0, seed=0)
        reviewed = yield from review(question, trace, greedy, settings.mode)
    note = "" if reviewed is None else reviewed.note
    if reply.finish == "length":
        remedy = "raise max_tokens (/set max_tokens, or eval.max_tokens)"
        if reply.tokens < settings.max_tokens:
            remedy = (
                "the context is full: shorten the question, or use a longer context (eval.context for a GGUF)"
            )
        note = f"the answer was cut off at {reply.tokens} tokens; {remedy}"
    elif trace.answer is None:
        note = note or "the steps do not lead to an answer"
    ended = time.monotonic()
    return Answer(question, reply, trace, reviewed, note, ended - began, ended - solved)


def open_gguf(path: Path, context: int, parallel: int | None) -> Engine:
    """A GGUF in llama.cpp. Raises DataError if it cannot be loaded."""
    with console.spinner(f"loading {path.name}"):
        check_gguf(path)
        return Engine(path, parallel=parallel, context=context)


def probability(log_odds: float) -> float:
    """The probability of an error from its log-odds in nats."""
    return 1 / (1 + math.exp(min(-log_odds, 700.0)))  # more would overflow
