"""The problems of a run: read from a file or the hub in any of the usual forms, and divided between the two stages."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from sclite import config
from sclite.data.contamination import SPAN, Question, index_of, overlap
from sclite.data.problem_rows import FORMS, read_problem, read_question
from sclite.data.sources import BadRow, Rows, is_local, rows_of
from sclite.errors import DataError, NetworkError, UsageError
from sclite.records import Drop, Problem
from sclite.run import Report, Run, timed
from sclite.signature import digest

FILE, STAGE = "problems.jsonl", "problems"
OVERLAPS = "overlaps_evaluation"


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
    """The first `limit` different problems of a local file (see sources) or of a Hub dataset.

    `columns` names the columns of question, answer, solution and id; without them the usual names are known. Skipped and
    noted in `drops`, with file and line, is a row that cannot be used, that repeats a question (but for case and blanks) or
    an id, or that overlaps one of the index `avoid` (see contamination). Ids are the rows' own, else a hash of the
    question: other rows do not change them. Raises DataFault where the file cannot be read, or no row of it can be used.
    `key` is the configuration's name for the source.
    """
    if not source:
        raise UsageError(f"{key} is not set", f"name a file, as in --set {key}=train.jsonl, with {FORMS}")
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
        raise UsageError(
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
    columns, first, found = source.columns(), "", False
    try:
        for place, row in rows_of(source.source, source.subset, source.split, key):
            try:
                id_, question = read_question(row, columns)
            except BadRow as error:
                first = first or f"the first: {place}: {error.message}"
            else:
                found = True
                yield f"{id_} of {source.source}", question
        if first and not found:
            raise DataError(f"{source.source}: no row has a question; {first}", f"it needs rows with {FORMS}")
    except (DataError, NetworkError) as failure:
        raise type(failure)(
            f"{key}, whose questions must not be trained on: {failure.message}", f"{failure.hint}; {way_out}"
        ) from failure


def _put_there(run: Run, avoid: Mapping[int, str], drops: list[Drop]) -> list[Problem]:
    """The rows of a problems.jsonl that was put into the run; the file stays as it is."""
    rows = run.require(FILE, Problem, f"name a file, as in --set problems.source=train.jsonl, with {FORMS}")
    numbers: dict[str, int] = {}
    problems = []
    for number, problem in enumerate(rows, 1):
        if problem.id in numbers:
            raise DataError(
                f"{run.path(FILE)}, row {number}: the id {problem.id} stands at row {numbers[problem.id]} already",
                "give each row an id of its own",
            )
        numbers[problem.id] = number
        if name := overlap(problem.question, avoid):
            drops.append(_overlap_drop(problem, f"{run.path(FILE)}, row {number}", name))
        else:
            problems.append(problem)
    if not problems:
        raise DataError(*_all_overlap(str(run.path(FILE))))
    return problems


def _overlap_drop(problem: Problem, where: str, name: str) -> Drop:
    detail = f"{where}: {SPAN} words in a row, or all of it, stand in {name}"
    return Drop(stage=STAGE, id=problem.id, reason=OVERLAPS, detail=detail, raw=problem.question)


def _all_overlap(source: str) -> tuple[str, str]:
    message = f"{source}: every problem overlaps those of the evaluation"
    return message, "train and evaluate on different problems"


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
    empty, first = True, None
    for place, row in rows:
        empty = False
        where = f"{source}, {place}"
        try:
            problem = read_problem(row, columns)
        except BadRow as error:
            first = first or (place, error)
            detail = f"{where}: {error.message}{f' ({error.hint})' if error.hint else ''}"
            drops.append(Drop(stage=STAGE, id=place, reason=error.reason, detail=detail, raw=error.raw))
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
            detail = f"{where}: the id of {ids[problem.id]} again (give each row an id of its own, or none)"
            given = {"id": problem.id, "reason": "duplicate_id", "raw": problem.question}
            drops.append(Drop(stage=STAGE, detail=detail, **given))
            continue
        questions[alike], ids[problem.id] = problem.id, place
        problems.append(problem)
        if len(problems) == limit:
            break
    if empty:
        raise DataError(f"{source} is empty", f"it needs rows with {FORMS}")
    if not problems and first is None:
        raise DataError(*_all_overlap(source))
    if not problems:
        place, error = first
        counts = Counter(drop.reason.replace("_", " ") for drop in drops)
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
        hint = error.hint or f"it needs rows with {FORMS}"
        raise DataError(f"{source}: no row can be used ({reasons}); {place}: {error.message}", hint)
    return problems
