"""The problems of a run: read from a file or the hub in any of the usual forms, and divided between the two stages."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sclite import config
from sclite.data.contamination import SPAN, Question, index_of, overlap
from sclite.data.sources import Rows, is_local, rows_of
from sclite.errors import DataFault, NetworkFault, UsageFault
from sclite.grading.extract import extract
from sclite.records import Drop, Problem
from sclite.run import Report, Run, timed
from sclite.signature import digest

FILE, STAGE = "problems.jsonl", "problems"
FORMS = "question and answer (GSM8K, or plain), or problem and solution with \\boxed{} (MATH)"
OVERLAPS = "overlaps_evaluation"
_CALCULATOR = re.compile(r"<<[^<>\n]*>>")
_LAST_LINE = re.compile(r"^.*\bthe answer is:?[ \t]+([^\n]+?)\.?\s*\Z", re.I | re.M)
_USUAL = {"question": ("question", "problem"), "answer": ("answer",), "solution": ("solution",)}
_USUAL_IDS = ("id", "unique_id")


def load_problems(
    source: str,
    subset: str = "",
    split: str = "train",
    limit: int | None = None,
    drops: list[Drop] | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    avoid: Mapping[int, str] | None = None,
    key: str = "problems.source",
) -> list[Problem]:
    """The first `limit` different problems of a local file (.jsonl .json .csv .parquet) or of a hub data set.

    `columns` names the columns of question, answer, solution and id; without them the usual names are known. A question
    that stands there already, but for case and blanks, or that overlaps one of the index `avoid` (see contamination),
    is left out and noted in `drops`. Ids are the rows' own, else a hash of the question: other rows do not change them.
    Raises DataFault with file, line and remedy where the file cannot be used; in a hub data set, which nobody can mend,
    a row without an answer is left out and noted instead. `key` is the configuration's name for the source.
    """
    if not source:
        raise UsageFault(f"{key} is not set", f"add --set {key}=FILE.jsonl, a file with {FORMS}")
    rows = rows_of(source, subset, split, key)
    noted = [] if drops is None else drops
    return _collect(source, rows, limit, noted, columns or {}, avoid or {})


def gather_problems(
    settings: config.Config, run: Run, report: Report | None = None, *, reread: bool = True, keep: bool = True
) -> list[Problem]:
    """All problems of the run: read from problems.source and written to problems.jsonl, else those that lie there.

    Those that overlap a question of eval.source or of a file in problems.avoid are left out. What is left out stands in
    dropped.jsonl with its reason, and is counted in `report`. Problems that came from the same source before are taken
    from the run where the source is gone, or where it is not to be `reread`. Without `keep` nothing is written.
    """
    chosen, drops = settings.problems, []
    report = report or Report(STAGE)
    # by their names, as a run that was moved still has them
    sources = ((each.source, each.subset, each.split, each.columns()) for each in (chosen, settings.eval))
    inputs = {"source": digest(next(sources)), "avoid": digest([next(sources), chosen.avoid])}
    gone = is_local(chosen.source) and not Path(chosen.source).expanduser().exists()
    if (not reread or gone) and (manifest := run.done(STAGE, {**inputs, "problems": run.file_digest(FILE)})):
        return _as_before(settings, run, Report.of(manifest), report, gone)
    with timed(report):
        avoid = index_of(_avoided(settings))
        if chosen.source:
            given = (chosen.source, chosen.subset, chosen.split, chosen.limit, drops)
            problems = load_problems(*given, columns=chosen.columns(), avoid=avoid)
        else:
            problems = _put_there(run, avoid, drops)
    report.counts = {"problems": len(problems)}
    report.dropped = dict(Counter(drop.reason for drop in drops))
    if keep:
        if chosen.source:
            run.replace(FILE, problems)
        run.replace_drops([STAGE], drops)
        run.sign(STAGE, {**inputs, "problems": run.file_digest(FILE)}, report)
    return problems


def _as_before(
    settings: config.Config, run: Run, before: Report, report: Report, gone: bool
) -> list[Problem]:
    """The run's problems without those that overlapped when they were gathered."""
    overlapping = {
        drop.id for drop in run.rows("dropped.jsonl", Drop) if drop.stage == STAGE and drop.reason == OVERLAPS
    }
    whole = settings.problems.source  # else the file is the user's own, and holds what was left out too
    problems = [row for row in run.rows(FILE, Problem) if whole or row.id not in overlapping]
    limit = settings.problems.limit
    if gone and limit is not None and limit < len(problems):
        raise UsageFault(
            f"{settings.problems.source} does not exist, and the run's own {len(problems)} problems are used whole",
            "remove --limit (problems.limit)",
        )
    report.counts, report.dropped, report.skipped = before.counts, before.dropped, True
    report.figures["gone"] = gone
    return problems


def same_question(text: str) -> str:
    """A question in the form in which two are compared: case and blanks do not matter."""
    return " ".join(text.split()).casefold()


def split_for_stages(
    problems: Iterable[Problem], share: float, seed: int
) -> tuple[list[Problem], list[Problem]]:
    """(problems for SFT, problems kept for stage 2), about `share` of them in the second.

    Each problem is placed by a hash of its id and the seed, so that a new one moves no other.
    """
    sides: tuple[list[Problem], list[Problem]] = ([], [])
    for problem in problems:
        drawn = hashlib.sha256(f"{seed}:{problem.id}".encode()).digest()
        sides[int.from_bytes(drawn[:8]) < share * 2**64].append(problem)
    return sides


def divide(settings: config.Config, problems: Iterable[Problem]) -> tuple[list[Problem], list[Problem]]:
    """(for SFT, kept for stage 2) of a run's problems: by `split_for_stages`, those of the quickstart by their place."""
    found, share = list(problems), settings.problems.correction_share
    if not settings.teacher.embedded:
        return split_for_stages(found, share, settings.seed)
    kept = round(len(found) * share)
    return found[: len(found) - kept], found[len(found) - kept :]


# -- what must not be trained on -----------------------------------------------------------------------------------


def _avoided(settings: config.Config) -> Iterator[Question]:
    """The questions of eval.source and of every file in problems.avoid, each under its id and its file.

    Where evaluation and training share one source, evaluation itself leaves out what was trained on.
    """
    if settings.eval.source and _place(settings.eval) != _place(settings.problems):
        yield from _questions(settings.eval, "eval.source", "--set eval.source= leaves this check out")
    for source in settings.problems.avoid:
        yield from _questions(config.Source(source=source), "problems.avoid", "or take it out of the list")


def _place(source: config.Source) -> tuple[str, ...]:
    if is_local(source.source):
        return (str(Path(source.source).expanduser().resolve()),)
    return source.source, source.subset, source.split


def _questions(source: config.Source, key: str, way_out: str) -> Iterator[Question]:
    """Every question of a source, also of rows without an answer."""
    columns = source.columns()
    try:
        for place, row in rows_of(source.source, source.subset, source.split, key):
            question = _text(_cells(row, f"{source.source}, {place}", columns, ("question",))["question"])
            if question:
                yield f"{_id(row, question, columns)} of {source.source}", question
    except (DataFault, NetworkFault) as fault:
        raise type(fault)(
            f"{key}, whose questions must not be trained on: {fault.message}", f"{fault.hint}; {way_out}"
        ) from fault


def _put_there(run: Run, avoid: Mapping[int, str], drops: list[Drop]) -> list[Problem]:
    """The rows of a problems.jsonl that was put into the run; the file stays as it is."""
    rows = run.require(FILE, Problem, f"add --set problems.source=FILE.jsonl, a file with {FORMS}")
    numbers: dict[str, int] = {}
    problems = []
    for number, problem in enumerate(rows, 1):
        if problem.id in numbers:
            raise DataFault(
                f"{run.path(FILE)}, row {number}: the id {problem.id} stands at row {numbers[problem.id]} already",
                "give each row an id of its own",
            )
        numbers[problem.id] = number
        if name := overlap(problem.question, avoid):
            drops.append(_overlap_drop(problem, f"{run.path(FILE)}, row {number}", name))
        else:
            problems.append(problem)
    if not problems:
        raise DataFault(*_nothing_left(str(run.path(FILE)), drops))
    return problems


def _overlap_drop(problem: Problem, where: str, name: str) -> Drop:
    detail = f"{where}: {SPAN} words in a row, or all of it, stand in {name}"
    return Drop(stage=STAGE, id=problem.id, reason=OVERLAPS, detail=detail, raw=problem.question)


def _nothing_left(source: str, drops: list[Drop]) -> tuple[str, str]:
    """(message, hint) where every row was left out."""
    if any(drop.reason == OVERLAPS for drop in drops):
        return (
            f"{source}: every problem overlaps those of the evaluation",
            "train and evaluate on different problems",
        )
    return f"{source}: no row has an answer", f"it needs rows with {FORMS}"


_FIELDS = set(Problem.model_fields)


# -- rows into problems --------------------------------------------------------------------------------------------


def _collect(
    source: str,
    rows: Rows,
    limit: int | None,
    drops: list[Drop],
    columns: Mapping[str, str],
    avoid: Mapping[int, str],
) -> list[Problem]:
    problems: list[Problem] = []
    questions: dict[int, str] = {}  # hash of a question -> id
    ids: dict[str, str] = {}  # id -> place
    empty = True
    for place, row in rows:
        empty = False
        where = f"{source}, {place}"
        cells = _cells(row, where, columns)
        try:
            problem = _problem(row, cells, where, columns)
        except DataFault as fault:
            if is_local(source):
                raise
            drops.append(Drop(stage=STAGE, id=place, reason="no_answer", detail=fault.message))
            continue
        alike = hash(same_question(problem.question))
        if alike in questions:
            detail = f"{where}: the question of {questions[alike]} again"
            given = {"id": problem.id, "reason": "duplicate_question", "raw": problem.question}
            drops.append(Drop(stage=STAGE, detail=detail, **given))
            continue
        if name := overlap(problem.question, avoid):
            drops.append(_overlap_drop(problem, where, name))
            continue
        if problem.id in ids:
            raise DataFault(
                f"{where}: the id {problem.id} stands at {ids[problem.id]} already",
                "give each row an id of its own, or none",
            )
        questions[alike], ids[problem.id] = problem.id, place
        problems.append(problem)
        if len(problems) == limit:
            break
    if empty:
        raise DataFault(f"{source} is empty", f"it needs rows with {FORMS}")
    if not problems:
        raise DataFault(*_nothing_left(source, drops))
    return problems


def _cells(
    row: Mapping[str, Any], where: str, columns: Mapping[str, str], wanted: Iterable[str] = tuple(_USUAL)
) -> dict[str, Any]:
    """{"question", "answer", "solution": value, None where there is none} by the named columns, else the usual ones.

    Raises DataFault that names the columns that are there where a named one is absent, or no known ones are there.
    """
    there = ", ".join(str(name) for name in row) or "none"
    for part, name in columns.items():
        if name not in row and part in (*wanted, "id"):
            raise DataFault(f"{where}: no column {name}, only: {there}", f"set {part}_column to one of them")
    names = {part: [columns[part]] if part in columns else _USUAL[part] for part in wanted}
    known = {part for part, usual in names.items() if any(name in row for name in usual)}
    golden = {"answer", "solution"} & names.keys()
    if "question" not in known or (golden and not golden & known):
        raise DataFault(
            f"{where}: no known columns, only: {there}",
            f"name them by question_column, answer_column and solution_column, or rename them: {FORMS}",
        )
    return {part: next((row[n] for n in usual if _text(row.get(n))), None) for part, usual in names.items()}


def _problem(
    row: Mapping[str, Any], cells: Mapping[str, Any], where: str, columns: Mapping[str, str]
) -> Problem:
    """One row in any of the known forms; DataFault where its question or answer is missing."""
    question, gold, solution = (_text(cells[part]) for part in _USUAL)
    if not question:
        raise DataFault(f"{where}: the question is empty", "fill it in or remove the row")
    if "####" in gold:
        gold, worked = _gold_in(gold)
        solution = solution or worked
    elif gold:
        solution = solution.rpartition("####")[0] or solution
    else:
        gold, solution = _gold_in(solution)
    if not gold:
        raise DataFault(
            f"{where}: no answer", "add `answer`, or end the solution in #### ANSWER or \\boxed{ANSWER}"
        )
    return Problem.model_construct(  # all texts already; the set of fields in common is a tenth of a problem's memory
        _FIELDS,
        id=_id(row, question, columns),
        question=question,
        answer=gold,
        solution=_CALCULATOR.sub("", solution).strip() or None,
    )


def _id(row: Mapping[str, Any], question: str, columns: Mapping[str, str]) -> str:
    names = [columns["id"]] if "id" in columns else _USUAL_IDS
    own = next((_text(row[name]) for name in names if _text(row.get(name))), "")
    return own or hashlib.sha256(question.encode()).hexdigest()[:12]


def _gold_in(solution: str) -> tuple[str, str]:
    """(answer, solution) of a worked solution: after its last `####`, in its last box, or in a last line that says so."""
    if "####" in solution:
        worked, _, gold = solution.rpartition("####")
        return gold.strip().partition("\n")[0].strip(), worked
    gold = extract(solution) or ""
    inside = re.escape(gold)
    boxed = re.search(rf"\\(?:boxed|fbox)(?:\s*\{{\s*{inside}\s*\}}|\s+{inside})", solution)
    if gold and boxed:
        return gold, solution
    said = _LAST_LINE.search(solution)  # without a closed box `extract` takes any number
    return (said[1].strip() if said else ""), solution


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()
