"""What a user brings along in place of a stage: labelled work from a file, and rows that were put into the run folder.

Rows of a foreign file that cannot be used are left out and noted, each with its reason. Rows in the run folder claim to
be ours: the first that is not stops the command, with its file, number and remedy.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from sclite.data.problems import same_question
from sclite.data.sources import clean as storable
from sclite.data.sources import lines_of, not_utf8
from sclite.errors import DataError
from sclite.grading.extract import extract
from sclite.grading.worker import Grader
from sclite.records import Attempt, Drop, Problem, Row
from sclite.run import Run
from sclite.trace import Step, Trace, clean, parse, render


class Work(BaseModel):
    """A row of `attempts.source`. The label counts from 1; 0 and -1 say that all steps are right; None says nothing."""

    model_config = ConfigDict(allow_inf_nan=False)

    question: str = Field(validation_alias=AliasChoices("question", "problem"))
    steps: Annotated[list[str | int | float], Field(min_length=1)]
    answer: str | int | float | None = None
    first_error_step: int | None = None
    label: object = None  # another benchmark's, which may count from 0


def bring(
    path: Path, problems: Sequence[Problem], grader: Grader, drops: list[Drop] | None = None
) -> list[Attempt]:
    """Attempts brought along: JSONL rows with `question`, `steps`, and an optional `answer` and `first_error_step`.

    The label counts from 1, 0 or -1 says all is right; it decides over the grader, which judges the rows without one.
    Left out and noted in `drops`: row_not_readable, question_unknown (among `problems`), and label_contradicts_answer
    (all right, but with a wrong answer). Raises DataFault where no row is left.
    """
    if not path.is_file():
        raise DataError(f"attempts.source: {path} does not exist", "check the path")
    noted = [] if drops is None else drops
    by_question = {same_question(problem.question): problem for problem in problems}
    found: list[tuple[Problem, Work, Drop]] = []  # the drop that the row would become
    for number, line in lines_of(path):
        if not line.strip():
            continue
        drop = Drop(
            stage="attempts", id=f"line {number}", reason="row_not_readable", raw=storable(line.strip())
        )
        work = _work(line)
        if isinstance(work, str):
            noted.append(drop.model_copy(update={"detail": f"{path}, line {number}: {work}"}))
        elif (problem := by_question.get(same_question(work.question))) is None:
            detail = f"{path}, line {number}: its question is not among the problems of the run"
            noted.append(drop.model_copy(update={"reason": "question_unknown", "detail": detail}))
        else:
            found.append((problem, work, drop))
    rows = _graded(found, grader, noted)
    if not rows:
        raise DataError(*_nothing_left(path, noted))
    order = {problem.id: number for number, problem in enumerate(problems)}
    return sorted(rows, key=lambda row: order[row.id])


def _work(line: str) -> Work | str:
    """The row, or what is wrong with it."""
    if not_utf8(line):
        return "the text is not UTF-8"
    try:
        work = Work.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][:2])
        return f"{where}: {first['msg']}" if where else first["msg"]
    if work.first_error_step is None and isinstance(work.label, int):
        return (
            "it has a label, but no first_error_step: rename it and count from 1 "
            "(ProcessBench counts from 0: add 1)"
        )
    if empty := [i for i, step in enumerate(work.steps, 1) if not clean(str(step))]:
        return f"step {empty[0]} is empty"
    if not -1 <= (work.first_error_step or 0) <= len(work.steps):
        return f"first_error_step is {work.first_error_step}, but there are {len(work.steps)} steps"
    return work


def _graded(found: Sequence[tuple[Problem, Work, Drop]], grader: Grader, drops: list[Drop]) -> list[Attempt]:
    """The rows as attempts; each is right or wrong by its label, without one by its answer."""
    answers = [_answer(work) for _, work, _ in found]
    verdicts = grader.equal_many(
        (answer, problem.answer) for answer, (problem, _, _) in zip(answers, found, strict=True)
    )
    rows: list[Attempt] = []
    samples: Counter[str] = Counter()
    for (problem, work, drop), answer, verdict in zip(found, answers, verdicts, strict=True):
        label = work.first_error_step
        if label is not None and label < 1:
            if answer is not None and verdict is False:
                detail = f"labelled all right, but its answer is {answer}, not {problem.answer}"
                drops.append(drop.model_copy(update={"reason": "label_contradicts_answer", "detail": detail}))
                continue
            answer, verdict = answer or problem.answer, True  # work that is right ends in the right answer
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


def _answer(work: Work) -> str | None:
    given = str(work.answer) if work.answer is not None else extract(str(work.steps[-1]))
    return clean(given or "") or None


def _nothing_left(path: Path, drops: Sequence[Drop]) -> tuple[str, str]:
    """(message, hint) where no row could be used."""
    if not drops:
        return f"{path} is empty", "each row needs a question and its steps"
    reasons = Counter(drop.reason for drop in drops)
    if set(reasons) == {"question_unknown"}:
        return f"{path}: no row's question is among the problems of the run", "check problems.source"
    told = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    return f"{path}: no row can be used: {told}; the first: {drops[0].detail}", "mend them, see dropped.jsonl"


# -- rows that were put into the run folder ------------------------------------------------------------------------


def refuse(
    run: Run, name: str, number: int, row: Row, why: str, remedy: str = "mend or remove it"
) -> NoReturn:
    """Raise the DataFault of a row that was brought along: its file, number, id, what is wrong, and the remedy."""
    raise DataError(f"{run.path(name)}, row {number} ({row.id}): {why}", remedy)


def adopt_attempts(run: Run, problems: Sequence[Problem]) -> list[Attempt]:
    """The rows of an attempts.jsonl that was put into the run, each checked against the problems."""
    name, known = "attempts.jsonl", {problem.id for problem in problems}
    rows, seen = run.read(name, Attempt), set()
    for number, row in enumerate(rows, 1):
        if row.id not in known:
            refuse(run, name, number, row, "no problem has this id", "use the ids of problems.jsonl")
        if (row.id, row.sample) in seen:
            refuse(run, name, number, row, f"sample {row.sample} is there already", "number the samples")
        seen.add((row.id, row.sample))
        steps, label = len(parse(row.trace).trace.steps), row.first_error
        if label is not None and not -1 <= label <= steps:
            refuse(run, name, number, row, f"first_error is {label}, but it has {steps} steps")
        if label is not None and row.correct is not (label < 1):
            remedy = "a labelled step makes an attempt wrong; 0 and -1 say that all is right"
            refuse(run, name, number, row, f"first_error is {label}, but correct is {row.correct}", remedy)
    return rows
