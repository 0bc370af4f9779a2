"""The problems of a run: read from a file or the hub in any of the usual forms, and divided between the two stages."""

import csv
import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sclite import answers, config
from sclite.errors import DataFault, UsageFault
from sclite.records import Drop, Problem
from sclite.run import Run

FILE, STAGE = "problems.jsonl", "problems"
FORMS = "question and answer (GSM8K, or plain), or problem and solution with \\boxed{} (MATH)"
_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_CALCULATOR = re.compile(r"<<[^<>\n]*>>")
_HUB_REMEDY = "download it as JSONL where there is a net, and give the file as problems.source"
Rows = Iterator[tuple[int, Mapping[str, Any]]]


def load_problems(
    source: str,
    subset: str = "",
    split: str = "train",
    limit: int | None = None,
    drops: list[Drop] | None = None,
) -> list[Problem]:
    """The first `limit` different problems of a local file (.jsonl .json .csv .parquet) or of a hub data set.

    A question that stands there already is left out and noted in `drops`. Ids are the rows' own, else a hash of the
    question: other rows do not change them. Raises DataFault with file, line and remedy where the file cannot be used;
    in a hub data set, which nobody can mend, a row without an answer is left out and noted instead.
    """
    if not source:
        raise UsageFault(
            "problems.source is not set", f"add --set problems.source=FILE.jsonl, a file with {FORMS}"
        )
    local = source.lower().endswith(_SUFFIXES) or Path(source).exists()
    rows = _local_rows(Path(source)) if local else _hub_rows(source, subset, split)
    return _collect(source, rows, local, limit, [] if drops is None else drops)


def gather_problems(settings: config.Config, run: Run) -> list[Problem]:
    """All problems of the run: read from problems.source and written to problems.jsonl, else those that lie there."""
    chosen = settings.problems
    if not chosen.source:
        return run.require(FILE, Problem, f"add --set problems.source=FILE.jsonl, a file with {FORMS}")
    drops: list[Drop] = []
    problems = load_problems(chosen.source, chosen.subset, chosen.split, chosen.limit, drops)
    run.replace(FILE, problems)
    run.replace_drops([STAGE], drops)
    return problems


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


# -- rows into problems --------------------------------------------------------------------------------------------


def _collect(source: str, rows: Rows, local: bool, limit: int | None, drops: list[Drop]) -> list[Problem]:
    problems: list[Problem] = []
    questions: dict[str, str] = {}  # question -> id
    ids: dict[str, int] = {}
    empty = True
    for number, row in rows:
        empty = False
        where = f"{source}, line {number}"
        try:
            problem = _problem(row, where)
        except DataFault as fault:
            if local or not _recognised(row):
                raise
            drops.append(Drop(stage=STAGE, id=f"row {number}", reason="no_answer", detail=fault.message))
            continue
        if problem.question in questions:
            detail = f"{where}: the question of {questions[problem.question]} again"
            drops.append(Drop(stage=STAGE, id=problem.id, reason="duplicate_question", detail=detail))
            continue
        if problem.id in ids:
            raise DataFault(
                f"{where}: the id {problem.id} stands at line {ids[problem.id]} already",
                "give each row an id of its own, or none",
            )
        questions[problem.question], ids[problem.id] = problem.id, number
        problems.append(problem)
        if len(problems) == limit:
            break
    if empty:
        raise DataFault(f"{source} is empty", f"it needs rows with {FORMS}")
    if not problems:
        raise DataFault(f"{source}: no row has an answer", f"it needs rows with {FORMS}")
    return problems


def _recognised(row: Mapping[str, Any]) -> bool:
    return bool({"question", "problem"} & row.keys() and {"answer", "solution"} & row.keys())


def _problem(row: Mapping[str, Any], where: str) -> Problem:
    """One row in any of the known forms; DataFault where it is none of them."""
    if not _recognised(row):
        there = ", ".join(str(name) for name in row) or "none"
        raise DataFault(f"{where}: no known columns, only: {there}", f"rename them: {FORMS}")
    question = _text(row.get("question")) or _text(row.get("problem"))
    if not question:
        raise DataFault(f"{where}: the question is empty", "fill it in or remove the row")
    gold, solution = _text(row.get("answer")), _text(row.get("solution"))
    if "####" in gold:
        worked, _, gold = gold.rpartition("####")
        solution, gold = solution or worked, gold.strip()
    elif not gold:
        gold, solution = _gold_in(solution)
    if not gold:
        raise DataFault(
            f"{where}: no answer", "add `answer`, or end the solution in #### ANSWER or \\boxed{ANSWER}"
        )
    own = _text(row.get("id")) or _text(row.get("unique_id"))
    return Problem(
        id=own or hashlib.sha256(question.encode()).hexdigest()[:12],
        question=question,
        answer=gold,
        solution=_CALCULATOR.sub("", solution).strip() or None,
    )


def _gold_in(solution: str) -> tuple[str, str]:
    """(answer, solution) of a worked solution that ends in `#### answer` or holds it in its last box."""
    if "####" in solution:
        worked, _, gold = solution.rpartition("####")
        return gold.strip(), worked
    gold = answers.extract(solution) or ""
    inside = re.escape(gold)
    boxed = re.search(rf"\\(?:boxed|fbox)(?:\s*\{{\s*{inside}\s*\}}|\s+{inside})", solution)
    return (gold if gold and boxed else ""), solution  # without a closed box `extract` takes any number


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()


# -- where rows come from ------------------------------------------------------------------------------------------


def _local_rows(path: Path) -> Rows:
    """(line or row number from 1, row) of a file."""
    if not path.is_file():
        there = "is a folder" if path.is_dir() else "does not exist"
        raise DataFault(f"{path} {there}", "give a .jsonl, .json, .csv or .parquet file as problems.source")
    kind = path.suffix.lower()
    if kind == ".parquet":
        datasets = _datasets()
        return enumerate(datasets.load_dataset("parquet", data_files=str(path), split="train"), 1)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataFault(f"{path} cannot be read: {error}", "it must be UTF-8 text") from error
    if kind == ".csv":
        return enumerate(csv.DictReader(text.splitlines(keepends=True)), 1)
    if kind == ".json":
        return _json_rows(path, text)
    return _jsonl_rows(path, text)


def _jsonl_rows(path: Path, text: str) -> Rows:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, _object(path, line, number)


def _object(path: Path, line: str, number: int) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataFault(
            f"{path}, line {number}: not JSON: {error}", "mend or remove this line; each is one JSON object"
        ) from error
    if not isinstance(row, dict):
        raise DataFault(f"{path}, line {number}: not a JSON object", "each line is one JSON object")
    return row


def _json_rows(path: Path, text: str) -> Rows:
    try:
        rows: Sequence[Any] = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        raise DataFault(f"{path}, line {error.lineno}: not JSON: {error.msg}", "mend this line") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataFault(
            f"{path}: not a list of objects", "write [{..}, {..}], or one object per line as .jsonl"
        )
    return enumerate(rows, 1)


def _hub_rows(source: str, subset: str, split: str) -> Rows:
    datasets = _datasets()
    try:
        found = datasets.load_dataset(source, subset or None, split=split)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise DataFault(
            f"{source} is neither a file here nor a data set on the hub", "check problems.source"
        ) from error
    except OSError as error:
        raise DataFault(f"the data set {source} cannot be reached: {_line(error)}", _HUB_REMEDY) from error
    except (ValueError, RuntimeError) as error:
        raise DataFault(
            f"the data set {source}: {_line(error)}", "check problems.subset and problems.split"
        ) from error
    return enumerate(found, 1)


def _datasets():
    """The library, imported when it is first needed, without its bars and its logged retries."""
    import datasets

    datasets.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    return datasets


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
