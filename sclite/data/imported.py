"""Imported data that replaces a stage: labelled work from a file, and rows put into the run folder.

Unusable rows of a foreign file are skipped, with a reason. The first invalid row in the run folder stops the command.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, NoReturn

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, model_validator

from sclite.config import Source
from sclite.data.problems import normalize_question
from sclite.data.sources import BadRow, read_rows
from sclite.errors import DataError
from sclite.grading.extract import extract
from sclite.grading.grader import Grader
from sclite.records import Attempt, Drop, Pair, Problem, TraceRow
from sclite.run import Run
from sclite.trace import Step, Trace, clean, render


class LabelledWork(BaseModel):
    """A row of `attempts.source`. `first_error_step` counts from 1; 0 and -1 mean no error; None means no label."""

    model_config = ConfigDict(allow_inf_nan=False)

    question: str = Field(validation_alias=AliasChoices("question", "problem"))
    steps: Annotated[list[str | int | float], Field(min_length=1)]
    answer: str | int | float | None = None
    first_error_step: int | None = None

    @property
    def final_answer(self) -> str | None:
        """Its `answer`, else the one in its last step."""
        answer = extract(str(self.steps[-1])) if self.answer is None else str(self.answer)
        return clean(answer or "") or None

    @property
    def trace(self) -> Trace:
        """Its steps, without an answer."""
        return Trace(tuple(Step(clean(str(step))) for step in self.steps))

    @model_validator(mode="after")
    def _check_steps_and_label(self) -> "LabelledWork":
        label = self.first_error_step
        if empty := [i for i, step in enumerate(self.steps, 1) if not clean(str(step))]:
            raise ValueError(f"step {empty[0]} is empty")
        if not -1 <= (label or 0) <= len(self.steps):
            raise ValueError(f"first_error_step is {label}, but there are {len(self.steps)} steps")
        return self


def _read_work(path: Path, key: str, stage: str) -> Iterator[tuple[LabelledWork | None, Drop]]:
    """Each row of the file that the setting `key` names, None if it cannot be read, with what it becomes if it is skipped."""
    for place, row in read_rows(Source(source=str(path)), key):
        raw, work, why = row.raw if isinstance(row, BadRow) else json.dumps(row, default=str), None, ""
        try:
            if isinstance(row, BadRow):
                raise row
            work = LabelledWork.model_validate_json(raw)
        except BadRow as error:
            why = f"{path}, {place}: {error.message}"
        except ValidationError as error:
            first = error.errors()[0]
            where = "".join(f"{part}: " for part in first["loc"][:2])
            why = f"{path}, {place}: {where}{first['msg'].removeprefix('Value error, ')}"
        yield work, Drop(stage=stage, id=place, reason="row_not_readable", raw=raw, detail=why)


def read_labelled(path: Path) -> list[tuple[str, Trace, int]]:
    """(question, work, first wrong step or 0) of each row of `eval.labelled` that has a label.

    Raises DataError for a row that cannot be read, or if none has a label.
    """
    found = []
    for work, drop in _read_work(path, "eval.labelled", "eval"):
        if work is None:
            raise DataError(drop.detail, "fix or remove this row of eval.labelled")
        if work.first_error_step is not None:
            found.append((work.question, work.trace, max(0, work.first_error_step)))
    if not found:
        hint = "each row needs `question`, `steps` and `first_error_step`"
        raise DataError(f"eval.labelled: {path} has no labels", hint)
    return found


def import_attempts(
    path: Path, problems: Sequence[Problem], grader: Grader, drops: list[Drop]
) -> list[Attempt]:
    """The usable rows of `attempts.source` as attempts, judged by their label or, without one, by their answer.

    Skipped rows go to `drops`. Raises DataError if no row is usable.
    """
    by_question = {normalize_question(problem.question): problem for problem in problems}
    found: list[tuple[Problem, LabelledWork, Drop]] = []
    for work, drop in _read_work(path, "attempts.source", "attempts"):
        if work is None:
            drops.append(drop)
        elif problem := by_question.get(normalize_question(work.question)):
            found.append((problem, work, drop))
        else:
            detail = f"{path}, {drop.id}: its question is not among the run's problems"
            drops.append(drop.model_copy(update={"reason": "question_unknown", "detail": detail}))
    verdicts = grader.equal_many((work.final_answer, problem.answer) for problem, work, _ in found)
    rows: list[Attempt] = []
    samples: Counter[str] = Counter()
    for (problem, work, drop), verdict in zip(found, verdicts, strict=True):
        answer, label = work.final_answer, work.first_error_step
        wrong = label if label and label > 0 else None
        if label is not None and not wrong and answer is not None and verdict is False:
            detail = f"labelled right, but its answer is {answer}, not {problem.answer}"
            drops.append(drop.model_copy(update={"reason": "label_contradicts_answer", "detail": detail}))
            continue
        if label is not None:
            verdict = wrong is None
            answer = answer or (problem.answer if verdict else None)  # right work ends in the right answer
        trace = render(replace(work.trace, answer=answer))
        of = {"id": problem.id, "sample": samples[problem.id]}
        rows.append(Attempt(**of, trace=trace, answer=answer, correct=verdict, first_error=wrong))
        samples[problem.id] += 1
    if not rows:
        reasons = Counter(drop.reason for drop in drops)
        counts = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        why = f"no usable row: {counts}; the first: {drops[0].detail}" if drops else "the file is empty"
        hint = "each row needs `question` (that of one of the run's problems) and `steps`"
        raise DataError(f"{path}: {why}", hint)
    order = {problem.id: number for number, problem in enumerate(problems)}
    return sorted(rows, key=lambda row: order[row.id])


def reject_row(run: Run, name: str, number: int, row: TraceRow | Pair, why: str, hint: str) -> NoReturn:
    """Raise DataError for an invalid imported row."""
    raise DataError(f"{run.path(name)}, row {number} ({row.id}): {why}", hint)
