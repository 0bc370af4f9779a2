"""The problems of a run: read from a file or the Hub, deduplicated, decontaminated, and split between the stages."""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from sclite.config import Config, Source
from sclite.data.problem_rows import FORMS, read_problem, read_question
from sclite.data.sources import BadRow, is_local_source, read_rows
from sclite.errors import DataError, NetworkError, UsageError
from sclite.records import Drop, Problem, from_feedback
from sclite.run import Report, Run, timed
from sclite.signature import digest

OVERLAPS = "overlaps_evaluation"
NGRAM = 13
SHARES = f"shares {NGRAM} words in a row, or the whole question, with"
_WORD = re.compile(r"\w+")
_SIGN = re.compile(r"\w+|[^\w\s.,;:!?\"'`’‘“”$]")
Question = tuple[str, str]
"""(its name in reports, its text)."""
FIT_COUNT = 50
"""With fewer problems, a single answer moves the review threshold far."""


def load_problems(
    source: Source,
    limit: int | None = None,
    drops: list[Drop] | None = None,
    avoid: Mapping[int, str] | None = None,
    key: str = "problems.source",
    known: Mapping[Question, str] | None = None,
) -> list[Problem]:
    """The first `limit` distinct problems of a local file or a Hub dataset, named by `key` in the configuration.

    A row goes to `drops` if it is unusable, repeats an id or a question, or overlaps the index `avoid` (`build_index`).
    `known` has the name of what a question overlaps, or "", without a check. Raises DataError if no row is usable;
    if all rows are usable but overlap, the list is empty.
    """
    name, avoid, known = source.source, avoid or {}, known or {}
    if not name:
        raise UsageError(f"{key} is not set", f"set it (--set {key}=train.jsonl) to a file with {FORMS}")
    drops = [] if drops is None else drops
    problems: list[Problem] = []
    questions: dict[str, str] = {}  # question -> id
    ids: dict[str, str] = {}  # id -> place
    place, first = "", None
    for place, row in read_rows(source, key):
        where = f"{name}, {place}"
        try:
            problem = read_problem(row, source.columns())
        except BadRow as bad:
            first = first or (f"{place}: {bad.message}", bad.hint)
            detail = f"{where}: {bad.message}{f' ({bad.hint})' if bad.hint else ''}"
            drops.append(Drop(stage="problems", id=place, reason=bad.reason, detail=detail, raw=bad.raw))
            continue
        question, normalized = (problem.id, problem.question), normalize_question(problem.question)
        if normalized in questions:
            reason, detail = "duplicate_question", f"{where}: same question as {questions[normalized]}"
        elif overlap := known[question] if question in known else find_overlap(problem.question, avoid):
            reason, detail = OVERLAPS, f"{where}: {SHARES} {overlap}"
        elif problem.id in ids:
            reason = "duplicate_id"
            detail = f"{where}: same id as {ids[problem.id]} (make ids unique, or remove them)"
        else:
            questions[normalized], ids[problem.id] = problem.id, place
            problems.append(problem)
            if len(problems) == limit:
                break
            continue
        raw = problem.question
        drops.append(Drop(stage="problems", id=problem.id, reason=reason, detail=detail, raw=raw))
    if not place:
        raise DataError(f"{name} is empty", f"it needs rows with {FORMS}")
    if first and not problems:
        counts = Counter(drop.reason.replace("_", " ") for drop in drops)
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
        hint = first[1].replace("problems.", f"{key.partition('.')[0]}.") or f"it needs rows with {FORMS}"
        raise DataError(f"{name}: no usable row ({reasons}); {first[0]}", hint)
    return problems


def gather_problems(
    config: Config,
    run: Run,
    report: Report | None = None,
    *,
    reread: bool = True,
    fresh: bool = False,
    keep: bool = True,
) -> list[Problem]:
    """All problems of the run, from problems.source or an imported problems.jsonl, that overlap no question to avoid.

    Problems that came with the run are never replaced. Earlier problems are read from the run if their source is gone or
    `reread` is false, even if rows were edited. Once SFT has started, questions to avoid neither remove nor restore
    problems, except with `fresh`: the evaluation skips what was trained on. Nothing is written unless `keep`.
    """
    chosen, report = config.problems, report or Report("problems")
    drops, known, path = list[Drop](), dict[Question, str](), run.path("problems.jsonl")
    source, manifest = "" if run.has_own_problems() else chosen.source, run.manifest("problems")
    before = manifest["inputs"] if manifest else {"source": "", "problems": ""}
    # a digest of the name, not of the contents: it still matches after the run has been moved
    signed = digest([source, chosen.subset, chosen.split, chosen.columns()]) if source else before["source"]
    gone = is_local_source(source) and not Path(source).exists()
    if source:
        settled = not reread or (gone and signed == before["source"])
    else:
        settled = not reread and before["problems"] == run.file_digest(path.name)
    if manifest is not None:
        existing = [row for row in trainable_problems(run, whole=settled) if not from_feedback(row)]
        if existing and settled:
            if signed != before["source"]:
                why = "problems.source or its columns have changed since the run was built"
                run.warn(f"{why}: `sclite build-data` reads {source}")
            if gone and chosen.limit is not None and chosen.limit < len(existing):
                why = f"the run's {len(existing)} problems cannot be limited"
                raise UsageError(f"{source} does not exist, and {why}", "remove --limit (problems.limit)")
            report.counts, report.dropped = {"problems": len(existing)}, manifest["dropped"]
            report.skipped = True
            return existing
        if run.path("sft").exists() and not fresh:
            known = {(row.id, row.question): "" for row in existing}
            known |= dict.fromkeys(_overlapping(run), "an earlier set to avoid")
    with timed(report):
        avoid = build_index(questions_to_avoid(config))
        if source:
            problems = load_problems(chosen, chosen.limit, drops, avoid, known=known)
        else:
            hint = f"set problems.source (--set problems.source=train.jsonl) to a file with {FORMS}"
            rows = [row for row in run.require(path.name, Problem, hint) if not from_feedback(row)]
            if repeated := [id for id, count in Counter(row.id for row in rows).items() if count > 1]:
                raise DataError(f"{path}: the id {repeated[0]} occurs twice", "make ids unique")
            problems = []
            for number, row in enumerate(rows, 1):
                question = row.id, row.question
                if overlap := known[question] if question in known else find_overlap(row.question, avoid):
                    where = {"detail": f"{path}, row {number}: {SHARES} {overlap}", "raw": row.question}
                    drops.append(Drop(stage="problems", id=row.id, reason=OVERLAPS, **where))
                else:
                    problems.append(row)
        if not problems:
            why = f"{source or path}: every problem overlaps an evaluation problem"
            raise DataError(why, "train and evaluate on different problems")
    report.counts = {"problems": len(problems)}
    report.dropped = dict(Counter(drop.reason for drop in drops))
    if keep:
        if source:
            run.mark_started("problems")
            kept = filter(from_feedback, run.read(path.name, Problem, whole=False))
            run.replace(path.name, [*kept, *problems])
        run.replace_drops("problems", drops)
        run.sign("problems", {"source": signed, "problems": run.file_digest(path.name)}, report)
    return problems


def _overlapping(run: Run) -> set[Question]:
    drops = run.rows("dropped.jsonl", Drop)
    return {(drop.id, drop.raw) for drop in drops if (drop.stage, drop.reason) == ("problems", OVERLAPS)}


def trainable_problems(run: Run, whole: bool = True) -> list[Problem]:
    """The run's problems without those that overlap a question to avoid, which an imported problems.jsonl still contains."""
    overlapping, rows = _overlapping(run), run.rows("problems.jsonl", Problem, whole)
    return [row for row in rows if (row.id, row.question) not in overlapping]


def normalize_question(text: str) -> str:
    """A question without case and white space differences, for comparison."""
    return " ".join(text.split()).casefold()


# -- the stages' shares --------------------------------------------------------------------------------------------


def split_for_stages(
    problems: Iterable[Problem], share: float, seed: int | str
) -> tuple[list[Problem], list[Problem]]:
    """(the rest, about `share` of the problems), by a hash of each id and the seed: a new problem moves no other."""
    sides: tuple[list[Problem], list[Problem]] = ([], [])
    for problem in problems:
        sides[_draw(problem, seed) < share].append(problem)
    return sides


def _draw(problem: Problem, seed: int | str) -> float:
    """A number in [0, 1) that depends only on the id and the seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{problem.id}".encode()).digest()[:8]) / 2**64


class Split(NamedTuple):
    """The problems of a run by use. Each problem is in one list."""

    sft: list[Problem]
    stage2: list[Problem]
    fit: list[Problem]
    """Never trained on: the review threshold is fitted on them."""


def split_problems(config: Config, problems: Iterable[Problem]) -> Split:
    """Split by hashes of the ids, or by position in the quickstart; without problems from the chat's feedback.

    The threshold gets `problems.fit_share` of them, at least `FIT_COUNT` if these are a quarter or less; of the rest,
    stage 2 gets `problems.correction_share`. A new problem never moves another one from training to the fit.
    """
    found, settings = [row for row in problems if not from_feedback(row)], config.problems
    share = settings.fit_share if len(found) >= 4 * FIT_COUNT else 0
    if config.teacher.embedded:
        rest = len(found) - (max(round(len(found) * share), FIT_COUNT) if share else 0)
        first = rest - round(rest * settings.correction_share)
        return Split(found[:first], found[first:rest], found[rest:])
    seed = f"fit:{config.seed}"
    if share:  # the draw of number FIT_COUNT + 1 falls as problems are added, so that none leaves training
        share = max(share, sorted(_draw(problem, seed) for problem in found)[FIT_COUNT])
    trained, fit = split_for_stages(found, share, seed)
    return Split(*split_for_stages(trained, settings.correction_share, config.seed), fit)


# -- questions that must not be trained on -------------------------------------------------------------------------

# Problems overlap if they share 13 words in a row (the criterion of GPT-3, Brown et al. 2020, appendix C). A shorter
# question overlaps only with an identical one, signs included: `What is 2 + 1?` is not `What is 2 - 1?`.


def ngram_hashes(question: str) -> Iterator[int]:
    """A hash of every 13-gram, or of the whole question if it is shorter; valid within this process only."""
    text = unicodedata.normalize("NFKC", question).lower()
    words = _WORD.findall(text)
    if len(words) < NGRAM:
        yield hash(tuple(_SIGN.findall(text)))
    for start in range(len(words) - NGRAM + 1):
        yield hash(tuple(words[start : start + NGRAM]))


def build_index(questions: Iterable[Question]) -> dict[int, str]:
    """{n-gram hash: name of the first question that contains it}."""
    index: dict[int, str] = {}
    for name, question in questions:
        for ngram in ngram_hashes(question):
            index.setdefault(ngram, name)
    return index


def find_overlap(question: str, index: Mapping[int, str]) -> str | None:
    """The name of an indexed question that overlaps this one, or None."""
    return next((index[ngram] for ngram in ngram_hashes(question) if ngram in index), None) if index else None


def questions_to_avoid(config: Config) -> Iterator[Question]:
    """The questions of eval.source and of every source in problems.avoid, named by id and file; rows need no answer."""
    avoided: list[tuple[Source, str, str]] = []
    # if training and evaluation share one source, the evaluation skips what was trained on instead
    tested, learned = (
        (str(Path(each.source).resolve()),)
        if is_local_source(each.source)
        else (each.source, each.subset, each.split)
        for each in (config.eval, config.problems)
    )
    if config.eval.source and tested != learned:
        avoided.append((config.eval, "eval.source", "--set eval.source= skips this check"))
    for name in config.problems.avoid:
        avoided.append((Source(source=name), "problems.avoid", "or remove it from the list"))
    for source, key, alternative in avoided:
        found = False
        try:
            for _, row in read_rows(source, key):
                with suppress(BadRow):
                    id_, question = read_question(row, source.columns())
                    found = True
                    yield f"{id_} of {source.source}", question
            if not found:
                raise DataError(f"{source.source}: no row has a question", f"it needs rows with {FORMS}")
        except (DataError, NetworkError) as error:
            why = f"{key}, whose questions must not be trained on: {error.message}"
            raise type(error)(why, f"{error.hint}; {alternative}") from error
