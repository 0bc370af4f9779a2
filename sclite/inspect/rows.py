"""The rows of a run: counted by kind, or chosen by reason, kind and id; and a row as text."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from rich.text import Text

from sclite.console import visible
from sclite.errors import DataError, UsageError
from sclite.records import ROWS, Attempt, Drop, Pair, Problem, Review, Template
from sclite.run import Run
from sclite.settings import RUN_FILE
from sclite.trace import TAG, tag_name

FILES = {name.removesuffix(".jsonl"): (name, row_type) for name, row_type in ROWS.items()}
FILES["drops"] = FILES.pop("dropped")
"""The file and row type of each argument of `sclite show`."""

AnyRow = Problem | Template | Attempt | Review | Pair | Drop
KINDS: dict[str, Callable[[Any], str]] = {
    "attempts": lambda row: {True: "right", False: "wrong", None: "unknown"}[row.correct],
    "reviews": lambda row: "confirmation" if row.step is None else "correction",
    "pairs": lambda row: row.kind,
    "drops": lambda row: row.stage,
}
"""The kind of a row, which --kind filters by."""


def require_run(run: Run) -> None:
    """Raise DataError if the run folder does not exist, with the runs next to it as a hint."""
    if run.folder.is_dir():
        return
    runs = sorted(str(path.parent) for path in run.folder.parent.glob(f"*/{RUN_FILE}"))
    hint = "start one with `sclite build-data` or `sclite quickstart`"
    if runs:
        hint = f"use --run with one of: {', '.join(runs[:8])}"
    raise DataError(f"the run {run.folder} does not exist", hint)


def choose_rows(
    run: Run,
    what: str,
    reason: str | None = None,
    kind: str | None = None,
    id: str | None = None,
    first: int = 1,
    limit: int | None = None,
) -> tuple[int, list[tuple[int, Any]]]:
    """(number of matching rows, (number, row) from `first` on). `id` is a prefix; `first` and `limit` count matches.

    Raises UsageError with the known values for an unknown `what`, reason or kind, and DataError for a damaged row.
    """
    require_run(run)
    if what not in FILES:
        raise UsageError(f"unknown kind of rows: {what}", f"use one of {', '.join(FILES)}")
    if reason is not None and what != "drops":
        raise UsageError(f"--reason applies to drops, not to {what}", "sclite show drops --reason REASON")
    if kind is not None and what not in KINDS:
        raise UsageError(f"--kind does not apply to {what}", f"use it with {', '.join(KINDS)}")
    rows: list[Any] = run.read(*FILES[what])
    matching = [row for row in rows if id is None or row.id.startswith(id)]
    filters = (("--reason", reason, lambda row: row.reason), ("--kind", kind, KINDS.get(what)))
    for option, value, value_of in filters:
        if value is None or value_of is None:
            continue
        known = Counter(map(value_of, rows))
        if value not in known:
            counts = ", ".join(f"{other} ({count})" for other, count in known.most_common())
            hint = f"use one of {counts}" if known else f"the run has no {what}"
            raise UsageError(f"no {what} with {option} {value}", hint)
        matching = [row for row in matching if value_of(row) == value]
    return len(matching), list(enumerate(matching, 1))[first - 1 :][:limit]


def count_rows(run: Run) -> list[dict[str, Any]]:
    """{"what", "rows", "kinds": {kind: rows}, "reasons": {reason: rows}} for each file of rows."""
    require_run(run)
    found = []
    for what, (name, row_type) in FILES.items():
        rows: list[Any] = run.read(name, row_type)
        kinds = Counter(map(KINDS[what], rows)) if what in KINDS else Counter[str]()
        reasons = Counter(row.reason for row in rows) if what == "drops" else Counter[str]()
        counts = {"kinds": dict(kinds.most_common()), "reasons": dict(reasons.most_common())}
        found.append({"what": what, "rows": len(rows), **counts})
    return found


# -- a row in the terminal -----------------------------------------------------------------------------------------

COLORS = {"key": "yellow", "cause": "red", "correction": "green", "generalized": "magenta", "answer": "bold"}
OUTCOMES = {True: ("right", "green"), False: ("wrong", "red"), None: ("outcome unknown", "yellow")}


def highlight(text: str, wrong: int | None = None) -> Text:
    """Any text with dimmed tags and colored contents; step `wrong`, from 1, is red. Control characters are replaced."""
    shown = Text()
    step_color, inside, position = "", "", 0
    for match in TAG.finditer(text):
        shown.append(visible(text[position : match.start()]), inside or step_color)
        shown.append(match[0], "dim cyan")
        position = match.end()
        closes, name = bool(match[1]), tag_name(match[2])
        if name != "step":
            inside = "" if closes else COLORS[name]
        else:
            is_wrong = not closes and match[3] and int(match[3]) == wrong
            step_color, inside = "red" if is_wrong else "", ""
    shown.append(visible(text[position:]), inside or step_color)
    return shown


def format_row(row: AnyRow, number: int, total: int, problems: Mapping[str, Problem]) -> Text:
    """Row `number` of `total`, followed by an empty line. Its question is looked up in `problems` by ID."""
    heading: list[tuple[str, str]] = []
    match row:
        case Problem():
            body = [highlight(row.solution or "")]
        case Template():
            body = [highlight(row.trace)]
        case Attempt():
            heading = [(f"sample {row.sample}", ""), OUTCOMES[row.correct]]
            body = [highlight(row.trace, row.first_error)]
        case Review():
            verdict = (f"wrong at step {row.step}", "red") if row.step else ("all steps right", "green")
            heading = [(f"sample {row.sample}", ""), verdict]
            body = [highlight(row.trace, row.step)]
        case Drop():
            sample = "" if row.sample is None else f", sample {row.sample}"
            heading = [(f"{row.stage}{sample}", ""), (row.reason, "bold red")]
            body = [Text(visible(row.detail), "yellow"), highlight(row.raw)]
        case Pair():
            place = f"sample {row.sample}, {row.kind} at step {row.step}"
            heading = [(place, ""), (f"chosen by {row.origin}", "green")]
            body = [Text(visible("".join(row.prefix)), "dim")]
            for name, text, color in (("chosen", row.chosen, "green"), ("rejected", row.rejected, "red")):
                body.append(Text().append(f"{name:<9}", f"bold {color}").append(visible(text.strip()), color))
    if isinstance(row, Template | Review) and row.requests > 1:
        heading.append((f"{row.requests} requests", "yellow"))

    lines = Text().append(f"{number}/{total}  ", "dim").append(visible(row.id), "bold cyan")
    for text, style in heading:
        lines.append("  ").append(visible(text), style)
    problem = row if isinstance(row, Problem | Template) else problems.get(row.id)
    if problem is not None:
        lines.append("\n").append(visible(problem.question.strip()), "italic")
        lines.append("\ngold answer ", "dim").append(visible(problem.answer), "bold")
    for part in body:
        part.rstrip()
        if part:
            lines.append("\n").append_text(part)
    return lines.append("\n\n")
