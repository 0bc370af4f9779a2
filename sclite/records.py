"""The row types of the JSONL files in a run folder. Steps count from 1."""

from functools import cached_property
from typing import Literal

from pydantic import BaseModel, ConfigDict

from sclite.trace import ParsedTrace, Trace, parse

FEEDBACK = "feedback.jsonl"
FROM_FEEDBACK = "feedback-"
"""Prefix of the IDs of problems and attempts that come from the chat's /good and /bad."""


class Row(BaseModel):
    """One line of a JSONL file: immutable; rejects unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TraceRow(Row):
    """A row with a trace, which is parsed once, on first use."""

    id: str
    trace: str

    @cached_property
    def parsed(self) -> ParsedTrace:
        """The trace and its formal errors."""
        return parse(self.trace)


class Problem(Row):
    """A question with its gold answer and, if known, its gold solution."""

    id: str
    question: str
    answer: str
    solution: str | None = None


class Template(TraceRow):
    """The teacher's trace for one problem, in canonical form; its answer equals the gold answer."""

    question: str
    answer: str
    requests: int = 1


class Attempt(TraceRow):
    """A student's attempt at a problem. `correct` None means unknown; `first_error` is an imported label."""

    sample: int
    answer: str | None
    correct: bool | None
    first_error: int | None = None


class Review(TraceRow):
    """The teacher's review of one attempt: the first wrong step (None: all are right), the cause and the correction.

    `trace` is the complete review: the steps up to `step` unchanged, then a new solution from there.
    """

    sample: int
    step: int | None
    cause: str | None = None
    correction: str | None = None
    requests: int = 1


class Pair(Row):
    """A preference: after `prefix` (the assistant's text so far, in pieces) `chosen` is better than `rejected`.

    A pair of `kind` decision compares `<Cause>` with the step's closing tag; content compares two corrections.
    `origin` says who wrote the chosen content: teacher, student, or label for a decision.
    """

    id: str
    sample: int
    step: int
    kind: Literal["decision", "content"]
    attempt: str
    prefix: tuple[str, ...]
    chosen: str
    rejected: str
    origin: Literal["teacher", "student", "label"] = "label"

    @cached_property
    def work(self) -> Trace:
        """The attempt."""
        return parse(self.attempt).trace


class Drop(Row):
    """A dropped row: the stage, the reason and the raw text."""

    stage: str
    id: str
    sample: int | None = None
    reason: str
    detail: str = ""
    raw: str = ""


class Feedback(Row):
    """A user's verdict on an answer in the chat: the first attempt, the text after its review, the flagged step."""

    question: str
    attempt: str
    final: str
    accused: int | None
    good: bool
    model: str

    @cached_property
    def parsed(self) -> ParsedTrace:
        """The final text."""
        return parse(self.final)


def from_feedback(row: Problem | Attempt | Review) -> bool:
    """Whether a row comes from the chat's /good and /bad."""
    return row.id.startswith(FROM_FEEDBACK)


ROWS: dict[str, type[Row]] = {
    "problems.jsonl": Problem,
    "templates.jsonl": Template,
    "attempts.jsonl": Attempt,
    "reviews.jsonl": Review,
    "pairs.jsonl": Pair,
    "dropped.jsonl": Drop,
}
"""The row type of each JSONL file in a run folder."""
