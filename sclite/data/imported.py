"""Imported data that replaces a stage: labelled work from a file, and rows put into the run folder.

Unusable rows of a foreign file are skipped and recorded with a reason. Rows in the run folder must be valid: the first
invalid one stops the command, with file, row number and hint.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from sclite.data.problems import normalize_question
from sclite.data.sources import has_invalid_utf8, read_lines, replace_surrogates
from sclite.errors import DataError
from sclite.grading.extract import extract
from sclite.grading.worker import Grader
from sclite.records import Attempt, Drop, Problem, Row
from sclite.run import Run
from sclite.trace import Step, Trace, clean, parse, render


class LabelledWork(BaseModel):
    """A row of `attempts.source`. `first_error_step` counts from 1; 0 and -1 mean no error; None means no label."""

    model_config = ConfigDict(allow_inf_nan=False)

    question: str = Field(validation_alias=AliasChoices("question", "problem"))
    steps: Annotated[list[str | int | float], Field(min_length=1)]
    answer: str | int | float | None = None
    first_error_step: int | None = None
    label: object = None  # of another benchmark, may count from 0


def import_attempts(
    path: Path, problems: Sequence[Problem], grader: Grader, drops: list[Drop] | None = None
) -> list[Attempt]:
    """Import attempts from JSONL rows with `question`, `steps`, and optionally `answer` and `first_error_step`.

    A label takes precedence over the grader, which judges only rows without one. Skipped rows go to `drops`:
    row_not_readable, question_unknown (not among `problems`), and label_contradicts_answer (labelled right, but the
    answer is wrong). Raises DataError if no row is usable.
    """
    if not path.is_file():
        raise DataError(f"attempts.source: {path} does not exist", "check the path")
    noted = [] if drops is None else drops
    by_question = {normalize_question(problem.question): problem for problem in problems}
    # with the drop that the row becomes if it is skipped
    found: list[tuple[Problem, LabelledWork, Drop]] = []
    for number, line in read_lines(path):
        if not line.strip():
            continue
        raw = replace_surrogates(line.strip())
        drop = Drop(stage="attempts", id=f"line {number}", reason="row_not_readable", raw=raw)
        work = _read_work(line)
        if isinstance(work, str):
            noted.append(drop.model_copy(update={"detail": f"{path}, line {number}: {work}"}))
        elif (problem := by_question.get(normalize_question(work.question))) is None:
            detail = f"{path}, line {number}: its question is not among the run's problems"
            noted.append(drop.model_copy(update={"reason": "question_unknown", "detail": detail}))
        else:
            found.append((problem, work, drop))
    rows = _grade_work(found, grader, noted)
    if not rows:
        _raise_no_rows(path, noted)
    order = {problem.id: number for number, problem in enumerate(problems)}
    return sorted(rows, key=lambda row: order[row.id])


def _read_work(line: str) -> LabelledWork | str:
    """The row, or what is wrong with it."""
    if has_invalid_utf8(line):
        return "the text is not UTF-8"
    try:
        work = LabelledWork.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][:2])
        return f"{where}: {first['msg']}" if where else first["msg"]
    if work.first_error_step is None and isinstance(work.label, int):
        return (
            "it has `label` but no `first_error_step`: rename it and count from 1 "
            "(ProcessBench counts from 0: add 1)"
        )
    if empty := [i for i, step in enumerate(work.steps, 1) if not clean(str(step))]:
        return f"step {empty[0]} is empty"
    if not -1 <= (work.first_error_step or 0) <= len(work.steps):
        return f"first_error_step is {work.first_error_step}, but there are {len(work.steps)} steps"
    return work


def _grade_work(
    found: Sequence[tuple[Problem, LabelledWork, Drop]], grader: Grader, drops: list[Drop]
) -> list[Attempt]:
    """The rows as attempts, judged by their label, or by their answer if they have none."""
    given = (extract(str(w.steps[-1])) if w.answer is None else str(w.answer) for _, w, _ in found)
    answers = [clean(answer or "") or None for answer in given]
    verdicts = grader.equal_many(
        (answer, problem.answer) for answer, (problem, _, _) in zip(answers, found, strict=True)
    )
    rows: list[Attempt] = []
    samples: Counter[str] = Counter()
    for (problem, work, drop), answer, verdict in zip(found, answers, verdicts, strict=True):
        label = work.first_error_step
        if label is not None and label < 1:
            if answer is not None and verdict is False:
                detail = f"labelled right, but its answer is {answer}, not {problem.answer}"
                drops.append(drop.model_copy(update={"reason": "label_contradicts_answer", "detail": detail}))
                continue
            answer, verdict = answer or problem.answer, True  # right work ends in the right answer
        wrong = label if label is not None and label > 0 else None
        trace = Trace(tuple(Step(clean(str(step))) for step in work.steps), None, answer)
        rows.append(
            Attempt(
                id=problem.id,
                sample=samples[problem.id],
                trace=render(trace),
                answer=answer,
                correct=False if wrong else verdict,
                first_error=wrong,
            )
        )
        samples[problem.id] += 1
    return rows


def _raise_no_rows(path: Path, drops: Sequence[Drop]) -> NoReturn:
    if not drops:
        raise DataError(f"{path} is empty", "each row needs `question` and `steps`")
    reasons = Counter(drop.reason for drop in drops)
    if set(reasons) == {"question_unknown"}:
        raise DataError(f"{path}: none of its questions is among the run's problems", "check problems.source")
    counts = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    raise DataError(
        f"{path}: no usable row: {counts}; the first: {drops[0].detail}", "fix them, see dropped.jsonl"
    )


# -- rows in the run folder ----------------------------------------------------------------------------------------


def reject_row(
    run: Run, name: str, number: int, row: Row, why: str, hint: str = "fix or remove it"
) -> NoReturn:
    """Raise DataError for an invalid imported row."""
    raise DataError(f"{run.path(name)}, row {number} ({row.id}): {why}", hint)


def read_imported_attempts(run: Run, problems: Sequence[Problem]) -> list[Attempt]:
    """The rows of an imported attempts.jsonl, each checked against the problems."""
    name, known = "attempts.jsonl", {problem.id for problem in problems}
    rows, seen = run.read(name, Attempt), set()
    for number, row in enumerate(rows, 1):
        if row.id not in known:
            reject_row(run, name, number, row, "no problem has this id", "use the ids of problems.jsonl")
        if (row.id, row.sample) in seen:
            reject_row(run, name, number, row, f"sample {row.sample} occurs twice", "number the samples")
        seen.add((row.id, row.sample))
        steps, label = len(parse(row.trace).trace.steps), row.first_error
        if label is not None and not -1 <= label <= steps:
            reject_row(run, name, number, row, f"first_error is {label}, but it has {steps} steps")
        if label is not None and row.correct is not (label < 1):
            hint = "an attempt with a labelled step is wrong; 0 and -1 mean that it is right"
            reject_row(run, name, number, row, f"first_error is {label}, but correct is {row.correct}", hint)
    return rows
