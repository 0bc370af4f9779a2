"""The problems of a run: read from a file or the Hub, deduplicated, decontaminated, and split between the two stages."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from sclite.config import Config, Source
from sclite.data.contamination import NGRAM, Question, build_index, find_overlap
from sclite.data.problem_rows import FORMS, read_problem, read_question
from sclite.data.sources import BadRow, is_local_source, read_rows
from sclite.errors import DataError, NetworkError, UsageError
from sclite.records import Drop, Problem
from sclite.run import Report, Run, timed
from sclite.signature import digest

OVERLAPS = "overlaps_evaluation"
FIT_COUNT = 50
"""With fewer problems, a single answer moves the review threshold far."""


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
    """The first `limit` distinct problems of a local file (see sources) or of a Hub dataset.

    `columns` names the columns of question, answer, solution and id (default: the usual names). A row is skipped and
    recorded in `drops`, with file and line, if it is unusable, repeats an id or a question (ignoring case and white
    space), or overlaps the index `avoid` (see contamination). Ids are the rows' own, else a hash of the question, so
    other rows do not change them. Raises DataError if the file is unreadable or has no usable row. `key` is the
    configuration key of the source.
    """
    if not source:
        raise UsageError(
            f"{key} is not set", f"set it, as in --set {key}=train.jsonl, to a file with {FORMS}"
        )
    drops = [] if drops is None else drops
    problems: list[Problem] = []
    questions: dict[int, str] = {}  # hash of a question -> id
    ids: dict[str, str] = {}  # id -> place
    empty, first = True, None
    for place, row in read_rows(source, subset, split, key):
        empty = False
        where = f"{source}, {place}"
        try:
            problem = read_problem(row, columns or {})
        except BadRow as error:
            first = first or (place, error)
            detail = f"{where}: {error.message}{f' ({error.hint})' if error.hint else ''}"
            drops.append(Drop(stage="problems", id=place, reason=error.reason, detail=detail, raw=error.raw))
            continue
        normalized = hash(normalize_question(problem.question))
        if normalized in questions:
            reason, detail = "duplicate_question", f"{where}: same question as {questions[normalized]}"
        elif name := find_overlap(problem.question, avoid or {}):
            reason, detail = OVERLAPS, _overlap_detail(where, name)
        elif problem.id in ids:
            reason = "duplicate_id"
            detail = f"{where}: same id as {ids[problem.id]} (make ids unique, or remove them)"
        else:
            questions[normalized], ids[problem.id] = problem.id, place
            problems.append(problem)
            if len(problems) == limit:
                break
            continue
        drops.append(
            Drop(stage="problems", id=problem.id, reason=reason, detail=detail, raw=problem.question)
        )
    if empty:
        raise DataError(f"{source} is empty", f"it needs rows with {FORMS}")
    if not problems and first is None:
        raise DataError(*_all_overlap(source))
    if not problems:
        place, error = first
        counts = Counter(drop.reason.replace("_", " ") for drop in drops)
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
        hint = error.hint or f"it needs rows with {FORMS}"
        raise DataError(f"{source}: no usable row ({reasons}); {place}: {error.message}", hint)
    return problems


def gather_problems(
    config: Config, run: Run, report: Report | None = None, *, reread: bool = True, keep: bool = True
) -> list[Problem]:
    """All problems of the run: from problems.source (written to problems.jsonl), else from an imported problems.jsonl.

    Problems that overlap a question of eval.source or problems.avoid are skipped. Skipped rows go to dropped.jsonl with
    a reason and are counted in `report`. Problems already gathered from the same source are read from the run if the
    source no longer exists or `reread` is false. Nothing is written unless `keep`.
    """
    chosen, drops = config.problems, []
    report = report or Report("problems")
    # digests of names, not contents: they still match after the run has been moved
    sources = ((each.source, each.subset, each.split, each.columns()) for each in (chosen, config.eval))
    inputs = {"source": digest(next(sources)), "avoid": digest([next(sources), chosen.avoid])}
    gone = is_local_source(chosen.source) and not Path(chosen.source).expanduser().exists()
    if (not reread or gone) and (
        manifest := run.done("problems", {**inputs, "problems": run.file_digest("problems.jsonl")})
    ):
        return _read_gathered(config, run, Report.of(manifest), report, gone)
    with timed(report):
        avoid = build_index(_questions_to_avoid(config))
        if chosen.source:
            source = chosen.source, chosen.subset, chosen.split, chosen.limit, drops
            problems = load_problems(*source, columns=chosen.columns(), avoid=avoid)
        else:
            problems = _read_imported(run, avoid, drops)
    report.counts = {"problems": len(problems)}
    report.dropped = dict(Counter(drop.reason for drop in drops))
    if keep:
        if chosen.source:
            run.replace("problems.jsonl", problems)
        run.replace_drops(["problems"], drops)
        run.sign("problems", {**inputs, "problems": run.file_digest("problems.jsonl")}, report)
    return problems


def _read_gathered(config: Config, run: Run, before: Report, report: Report, gone: bool) -> list[Problem]:
    """The problems that an earlier command has gathered, without those that overlapped then."""
    overlapping = {
        drop.id
        for drop in run.rows("dropped.jsonl", Drop)
        if drop.stage == "problems" and drop.reason == OVERLAPS
    }
    filtered = config.problems.source  # an imported problems.jsonl still holds the overlapping rows
    problems = [row for row in run.rows("problems.jsonl", Problem) if filtered or row.id not in overlapping]
    limit = config.problems.limit
    if gone and limit is not None and limit < len(problems):
        raise UsageError(
            f"{config.problems.source} does not exist, and the run's {len(problems)} problems cannot be limited",
            "remove --limit (problems.limit)",
        )
    report.counts, report.dropped, report.skipped = before.counts, before.dropped, True
    report.figures["gone"] = gone
    return problems


def normalize_question(text: str) -> str:
    """A question without case and white space differences, for comparison."""
    return " ".join(text.split()).casefold()


def split_for_stages(
    problems: Iterable[Problem], share: float, seed: int | str
) -> tuple[list[Problem], list[Problem]]:
    """(the rest, about `share` of the problems), by a hash of each id and the seed: a new problem moves no other."""
    sides: tuple[list[Problem], list[Problem]] = ([], [])
    for problem in problems:
        sides[_draw(problem, seed) < share].append(problem)
    return sides


def _draw(problem: Problem, seed: int | str) -> float:
    """A number in [0, 1) that depends on the id and the seed alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{problem.id}".encode()).digest()[:8]) / 2**64


class Split(NamedTuple):
    """The problems of a run by their use. Each problem is in one list."""

    sft: list[Problem]
    stage2: list[Problem]
    fit: list[Problem]
    """Never trained on: the review threshold is fitted on them."""


def split_problems(config: Config, problems: Iterable[Problem]) -> Split:
    """Split by hashes of the ids, or by position in the quickstart.

    `problems.fit_share` of the problems, at least `FIT_COUNT` if these are a quarter of all or less, are for the
    threshold. Of the rest, `problems.correction_share` are for stage 2. A new problem never moves another one from
    training to the fit.
    """
    found, settings = list(problems), config.problems
    share = settings.fit_share if len(found) >= 4 * FIT_COUNT else 0
    if config.teacher.embedded:
        rest = len(found) - round(len(found) * share)
        first = rest - round(rest * settings.correction_share)
        return Split(found[:first], found[first:rest], found[rest:])
    seed = f"fit:{config.seed}"
    if share:  # the draw of number FIT_COUNT + 1 falls as problems are added, and takes none out of training
        share = max(share, sorted(_draw(problem, seed) for problem in found)[FIT_COUNT])
    rest, fit = split_for_stages(found, share, seed)
    return Split(*split_for_stages(rest, settings.correction_share, config.seed), fit)


# -- questions that must not be trained on -------------------------------------------------------------------------


def _questions_to_avoid(config: Config) -> Iterator[Question]:
    """The questions of eval.source and of every source in problems.avoid, named by id and file.

    If training and evaluation share one source, the evaluation skips the problems that were trained on instead.
    """
    if config.eval.source and _location(config.eval) != _location(config.problems):
        yield from _read_questions(config.eval, "eval.source", "--set eval.source= skips this check")
    for source in config.problems.avoid:
        yield from _read_questions(Source(source=source), "problems.avoid", "or remove it from the list")


def _location(source: Source) -> tuple[str, ...]:
    if is_local_source(source.source):
        return (str(Path(source.source).expanduser().resolve()),)
    return source.source, source.subset, source.split


def _read_questions(source: Source, key: str, alternative: str) -> Iterator[Question]:
    """Every question of a source, including rows without an answer."""
    columns, first, found = source.columns(), "", False
    try:
        for place, row in read_rows(source.source, source.subset, source.split, key):
            try:
                id_, question = read_question(row, columns)
            except BadRow as error:
                first = first or f"the first: {place}: {error.message}"
            else:
                found = True
                yield f"{id_} of {source.source}", question
        if first and not found:
            raise DataError(f"{source.source}: no row has a question; {first}", f"it needs rows with {FORMS}")
    except (DataError, NetworkError) as error:
        raise type(error)(
            f"{key}, whose questions must not be trained on: {error.message}", f"{error.hint}; {alternative}"
        ) from error


def _read_imported(run: Run, avoid: Mapping[int, str], drops: list[Drop]) -> list[Problem]:
    """The rows of an imported problems.jsonl; the file is not changed."""
    hint = f"set problems.source, as in --set problems.source=train.jsonl, to a file with {FORMS}"
    rows = run.require("problems.jsonl", Problem, hint)
    numbers: dict[str, int] = {}
    problems = []
    for number, problem in enumerate(rows, 1):
        if problem.id in numbers:
            raise DataError(
                f"{run.path('problems.jsonl')}, row {number}: same id {problem.id} as row {numbers[problem.id]}",
                "make ids unique",
            )
        numbers[problem.id] = number
        if name := find_overlap(problem.question, avoid):
            detail = _overlap_detail(f"{run.path('problems.jsonl')}, row {number}", name)
            drops.append(
                Drop(stage="problems", id=problem.id, reason=OVERLAPS, detail=detail, raw=problem.question)
            )
        else:
            problems.append(problem)
    if not problems:
        raise DataError(*_all_overlap(str(run.path("problems.jsonl"))))
    return problems


def _overlap_detail(where: str, name: str) -> str:
    return f"{where}: shares {NGRAM} words in a row, or the whole question, with {name}"


def _all_overlap(source: str) -> tuple[str, str]:
    message = f"{source}: every problem overlaps an evaluation problem"
    return message, "train and evaluate on different problems"
