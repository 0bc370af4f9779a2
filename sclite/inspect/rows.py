"""What there is to look at in a run: its rows by kind, chosen by reason, kind and id, read one at a time."""

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
"""By the word that `sclite show` takes: file and row."""

_OUTCOMES = {True: "right", False: "wrong", None: "unknown"}
KINDS: dict[str, Callable[[Any], str]] = {
    "attempts": lambda row: _OUTCOMES[row.correct],
    "reviews": lambda row: "confirmation" if row.step is None else "correction",
    "pairs": lambda row: row.kind,
    "drops": lambda row: row.stage,
}
"""What a row is among its like; --kind chooses by it."""


@dataclass(frozen=True)
class Choice:
    """Which rows to show: `id` is the beginning of an id, `first` (from 1) and `limit` count the rows that fit the rest."""

    what: str
    reason: str | None = None
    kind: str | None = None
    id: str | None = None
    first: int = 1
    limit: int | None = None

    def fits(self, row: Any) -> bool:
        return (
            (self.reason is None or row.reason == self.reason)
            and (self.kind is None or KINDS[self.what](row) == self.kind)
            and (self.id is None or row.id.startswith(self.id))
        )


def require_run(run: Run) -> None:
    """Raise DataFault where the run folder does not exist, naming its neighbours."""
    if run.folder.is_dir():
        return
    parent = run.folder.parent
    runs = sorted(str(path.parent) for path in parent.glob(f"*/{RUN_FILE}"))
    remedy = (
        f"name one that is there with --run: {', '.join(runs[:8])}"
        if runs
        else "`sclite build-data` starts one, `sclite quickstart` a finished one"
    )
    raise DataError(f"the run {run.folder} does not exist", remedy)


def choose(run: Run, choice: Choice) -> tuple[int, Iterator[tuple[int, Any]]]:
    """(how many rows fit, those from `first` on with their numbers among them, each read when it is asked for).

    Every row is checked before the first is given. Raises UsageFault, which says what there is, for an unknown `what`,
    reason or kind; DataFault for a damaged row.
    """
    require_run(run)
    if choice.what not in FILES:
        raise UsageError(f"{choice.what}: there is no such thing to show", f"show any of {', '.join(FILES)}")
    _check(choice)
    total = sum(1 for _ in _fitting(run, choice))
    if not total:
        _explain_nothing(run, choice)
    last = total if choice.limit is None else min(total, choice.first - 1 + choice.limit)
    numbered = enumerate(_fitting(run, choice), 1)
    return total, itertools.islice(numbered, choice.first - 1, max(last, choice.first - 1))


def overview(run: Run) -> list[dict[str, Any]]:
    """For each thing to look at: {"what", "rows", "kinds": {kind: rows}, "reasons": {reason: rows}}."""
    require_run(run)
    found = []
    for what in FILES:
        kinds, reasons, total = Counter(), Counter(), 0
        for row in _rows(run, what):
            total += 1
            kinds.update([KINDS[what](row)] if what in KINDS else [])
            reasons.update([row.reason] if isinstance(row, Drop) else [])
        found.append(
            {
                "what": what,
                "rows": total,
                "kinds": dict(kinds.most_common()),
                "reasons": dict(reasons.most_common()),
            }
        )
    return found


class Problems:
    """The problems of a run by id, found again in the file by their offsets, so that none is held in memory."""

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


def _rows(run: Run, what: str) -> Iterator[Any]:
    return run.rows(*FILES[what])


def _fitting(run: Run, choice: Choice) -> Iterator[Any]:
    return (row for row in _rows(run, choice.what) if choice.fits(row))


def _check(choice: Choice) -> None:
    if choice.reason is not None and choice.what != "drops":
        raise UsageError(
            f"--reason goes with drops, not with {choice.what}", "sclite show drops --reason REASON"
        )
    if choice.kind is not None and choice.what not in KINDS:
        raise UsageError(f"--kind: {choice.what} are all of one kind", f"it goes with {', '.join(KINDS)}")


def _explain_nothing(run: Run, choice: Choice) -> None:
    """Raise UsageFault where no row is of the reason or kind that was asked for, and rows of others are there."""
    for option, asked, name in (
        ("--reason", choice.reason, lambda row: row.reason),
        ("--kind", choice.kind, KINDS.get(choice.what)),
    ):
        if asked is None:
            continue
        there = Counter(name(row) for row in _rows(run, choice.what))
        if asked not in there:
            counted = ", ".join(f"{other} ({count})" for other, count in there.most_common())
            raise UsageError(
                f"{option} {asked}: no such {choice.what}",
                f"there is: {counted}" if there else "there are none",
            )
