"""The rows of a run: what each JSONL file holds, typed and checked at the edges. Steps count from 1."""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Row(BaseModel):
    """One line of a file in the run folder: immutable, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Problem(Row):
    """A question with its gold answer, and the gold solution where there is one."""

    id: str
    question: str
    answer: str
    solution: str | None = None


class Template(Row):
    """The teacher's thought trace for one problem, in canonical form; its answer equals the gold answer."""

    id: str
    question: str
    answer: str
    trace: str
    requests: int = 1


class Attempt(Row):
    """What a student made of a problem. `correct` None means unknown; `first_error` is a label brought along."""

    id: str
    sample: int
    trace: str
    answer: str | None
    correct: bool | None
    first_error: int | None = None


class Review(Row):
    """The teacher's walk over one attempt: the first wrong step (None: all are right), why, and the step made right.

    `trace` is the whole review as a trace: the steps up to `step` unchanged, then solved anew.
    """

    id: str
    sample: int
    step: int | None
    cause: str | None = None
    correction: str | None = None
    trace: str
    requests: int = 1


class Pair(Row):
    """A preference: after `prefix` (the assistant's text so far, in pieces) `chosen` is better than `rejected`.

    `kind` decision weighs `<Cause>` against the step's closer, content weighs two causes with corrections. `origin`
    says who wrote the chosen content: teacher or student.
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


class Drop(Row):
    """A row that was left out: where, why, and the raw text that shows it."""

    stage: str
    id: str
    sample: int | None = None
    reason: str
    detail: str = ""
    raw: str = ""


ROWS: dict[str, type[Row]] = {
    "problems.jsonl": Problem,
    "templates.jsonl": Template,
    "attempts.jsonl": Attempt,
    "reviews.jsonl": Review,
    "pairs.jsonl": Pair,
    "dropped.jsonl": Drop,
}
"""What each file of rows in a run folder holds."""
