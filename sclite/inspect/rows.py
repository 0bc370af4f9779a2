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

_OUTCOMES = {True: "right", False: "wrong", None: "unknown"}
AnyRow = Problem | Template | Attempt | Review | Pair | Drop

KINDS: dict[str, Callable[[Any], str]] = {
    "attempts": lambda row: _OUTCOMES[row.correct],
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

    def matches(self, row: Any) -> bool:
        return (
            (self.reason is None or row.reason == self.reason)
            and (self.kind is None or KINDS[self.what](row) == self.kind)
            and (self.id is None or row.id.startswith(self.id))
        )


def require_run(run: Run) -> None:
    """Raise DataError if the run folder does not exist, with the runs beside it as a hint."""
    if run.folder.is_dir():
        return
    runs = sorted(str(path.parent) for path in run.folder.parent.glob(f"*/{RUN_FILE}"))
    hint = "start one with `sclite build-data` or `sclite quickstart`"
    if runs:
        hint = f"use --run with one of: {', '.join(runs[:8])}"
    raise DataError(f"the run {run.folder} does not exist", hint)


def choose(run: Run, choice: Choice) -> tuple[int, Iterator[tuple[int, Any]]]:
    """(number of matching rows, (number, row) from `first` on). Rows are read lazily.

    Every row is validated before the first is yielded. Raises UsageError with the known values for an unknown `what`,
    reason or kind, and DataError for a damaged row.
    """
    require_run(run)
    what = choice.what
    if what not in FILES:
        raise UsageError(f"unknown kind of rows: {what}", f"use one of {', '.join(FILES)}")
    if choice.reason is not None and what != "drops":
        raise UsageError(f"--reason applies to drops, not to {what}", "sclite show drops --reason REASON")
    if choice.kind is not None and what not in KINDS:
        raise UsageError(f"--kind does not apply to {what}", f"use it with {', '.join(KINDS)}")
    total = sum(1 for _ in _matching(run, choice))
    if not total:
        _check_filters(run, choice)
    last = total if choice.limit is None else min(total, choice.first - 1 + choice.limit)
    numbered = enumerate(_matching(run, choice), 1)
    return total, itertools.islice(numbered, choice.first - 1, max(last, choice.first - 1))


def overview(run: Run) -> list[dict[str, Any]]:
    """{"what", "rows", "kinds": {kind: rows}, "reasons": {reason: rows}} for each file of rows."""
    require_run(run)
    found = []
    for what in FILES:
        kinds, reasons, total = Counter(), Counter(), 0
        for row in run.rows(*FILES[what]):
            total += 1
            kinds.update([KINDS[what](row)] if what in KINDS else [])
            reasons.update([row.reason] if isinstance(row, Drop) else [])
        counts = {"kinds": dict(kinds.most_common()), "reasons": dict(reasons.most_common())}
        found.append({"what": what, "rows": total, **counts})
    return found


class Problems:
    """The problems of a run by id. Only their offsets in the file are kept in memory."""

    def __init__(self, run: Run):
        name, kind = FILES["problems"]
        self._path = run.path(name)
        self._offsets = {problem.id: offset for offset, problem in run.rows_with_offsets(name, kind)}

    def get(self, id: str) -> Problem | None:
        if id not in self._offsets:
            return None
        with open(self._path, "rb") as file:
            file.seek(self._offsets[id])
            return Problem.model_validate_json(file.readline())


def _matching(run: Run, choice: Choice) -> Iterator[Any]:
    return (row for row in run.rows(*FILES[choice.what]) if choice.matches(row))


def _check_filters(run: Run, choice: Choice) -> None:
    """Raise UsageError if no row at all has the chosen reason or kind."""
    for option, value, key in (
        ("--reason", choice.reason, lambda row: row.reason),
        ("--kind", choice.kind, KINDS.get(choice.what)),
    ):
        if value is None:
            continue
        known = Counter(key(row) for row in run.rows(*FILES[choice.what]))
        if value not in known:
            counts = ", ".join(f"{other} ({count})" for other, count in known.most_common())
            raise UsageError(
                f"no {choice.what} with {option} {value}",
                f"use one of {counts}" if known else f"the run has no {choice.what}",
            )
