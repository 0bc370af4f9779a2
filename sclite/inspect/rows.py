"""The rows of a run: counted by kind, or chosen by reason, kind and id and read one at a time."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sclite.errors import DataError, UsageError
from sclite.records import Attempt, Drop, Pair, Problem, Review, Row, Template
from sclite.run import Run
from sclite.settings import RUN_FILE

FILES: dict[str, tuple[str, type[Row]]] = {
    "problems": ("problems.jsonl", Problem),
    "templates": ("templates.jsonl", Template),
    "attempts": ("attempts.jsonl", Attempt),
    "reviews": ("reviews.jsonl", Review),
    "pairs": ("pairs.jsonl", Pair),
    "drops": ("dropped.jsonl", Drop),
}
"""The file and row type of each argument of `sclite show`."""

AnyRow = Problem | Template | Attempt | Review | Pair | Drop
KINDS: dict[str, Callable[[Any], str]] = {
    "attempts": lambda row: {True: "right", False: "wrong", None: "unknown"}[row.correct],
    "reviews": lambda row: "confirmation" if row.step is None else "correction",
    "pairs": lambda row: row.kind,
    "drops": lambda row: row.stage,
}
"""The kind of a row, which --kind filters by."""


@dataclass(frozen=True)
class Choice:
    """Which rows to show. `id` is a prefix; `first` (from 1) and `limit` count the matching rows."""

    what: str
    reason: str | None = None
    kind: str | None = None
    id: str | None = None
    first: int = 1
    limit: int | None = None


def require_run(run: Run) -> None:
    """Raise DataError if the run folder does not exist, with the runs beside it as a hint."""
    if run.folder.is_dir():
        return
    runs = sorted(str(path.parent) for path in run.folder.parent.glob(f"*/{RUN_FILE}"))
    hint = "start one with `sclite build-data` or `sclite quickstart`"
    if runs:
        hint = f"use --run with one of: {', '.join(runs[:8])}"
    raise DataError(f"the run {run.folder} does not exist", hint)


def choose_rows(run: Run, choice: Choice) -> tuple[int, Iterator[tuple[int, Any]]]:
    """(number of matching rows, (number, row) from `first` on). Rows are read lazily.

    Every row is validated before the first is yielded. Raises UsageError with the known values for an unknown `what`,
    reason or kind, and DataError for a damaged row.
    """
    require_run(run)
    what, kind_of = choice.what, KINDS.get(choice.what)
    if what not in FILES:
        raise UsageError(f"unknown kind of rows: {what}", f"use one of {', '.join(FILES)}")
    if choice.reason is not None and what != "drops":
        raise UsageError(f"--reason applies to drops, not to {what}", "sclite show drops --reason REASON")
    if choice.kind is not None and kind_of is None:
        raise UsageError(f"--kind does not apply to {what}", f"use it with {', '.join(KINDS)}")
    filters = [
        (option, value, value_of)
        for option, value, value_of in (
            ("--reason", choice.reason, lambda row: row.reason),
            ("--kind", choice.kind, kind_of),
        )
        if value is not None and value_of is not None
    ]

    def matching() -> Iterator[Any]:
        row: Any
        for row in run.rows(*FILES[what]):
            fits = all(value_of(row) == value for _, value, value_of in filters)
            if fits and (choice.id is None or row.id.startswith(choice.id)):
                yield row

    total = sum(1 for _ in matching())
    for option, value, value_of in filters if not total else ():
        known = Counter(value_of(row) for row in run.rows(*FILES[what]))
        if value not in known:
            counts = ", ".join(f"{other} ({count})" for other, count in known.most_common())
            hint = f"use one of {counts}" if known else f"the run has no {what}"
            raise UsageError(f"no {what} with {option} {value}", hint)
    last = total if choice.limit is None else min(total, choice.first - 1 + choice.limit)
    return total, itertools.islice(enumerate(matching(), 1), choice.first - 1, max(last, choice.first - 1))


def count_rows(run: Run) -> list[dict[str, Any]]:
    """{"what", "rows", "kinds": {kind: rows}, "reasons": {reason: rows}} for each file of rows."""
    require_run(run)
    found = []
    for what, (name, row_type) in FILES.items():
        kinds: Counter[str] = Counter()
        reasons: Counter[str] = Counter()
        total = 0
        for total, row in enumerate(run.rows(name, row_type), 1):  # noqa: B007 - the last one counts
            kinds.update([KINDS[what](row)] if what in KINDS else [])
            reasons.update([row.reason] if isinstance(row, Drop) else [])
        counts = {"kinds": dict(kinds.most_common()), "reasons": dict(reasons.most_common())}
        found.append({"what": what, "rows": total, **counts})
    return found


class Problems:
    """The problems of a run by id. Only their offsets in the file are kept in memory."""

    def __init__(self, run: Run):
        self._path = run.path("problems.jsonl")
        self._offsets = {row.id: offset for offset, row in run.rows_with_offsets(self._path.name, Problem)}

    def get(self, id: str) -> Problem | None:
        if id not in self._offsets:
            return None
        with open(self._path, "rb") as file:
            file.seek(self._offsets[id])
            return Problem.model_validate_json(file.readline())
