"""The rows of a run: counted by kind, or chosen by reason, kind and id; and a row as text."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from rich.text import Text

from sclite.console import visible
from sclite.errors import DataError, UsageError
from sclite.records import ROWS, Attempt, Drop, Pair, Problem, Review, Template
from sclite.run import Run
from sclite.trace import TAG

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
VALUES: dict[str, dict[str, Callable[[Any], str]]] = {
    "kinds": KINDS,
    "reasons": {"drops": lambda row: row.reason},
}
"""The kind and the reason of a row, which --kind and --reason filter by."""


def require_run(run: Run) -> None:
    """Raise DataError if the run folder does not exist."""
    if not run.folder.is_dir():
        hint = "start it with `sclite build-data` or `sclite quickstart`; `sclite runs` lists others"
        raise DataError(f"the run {run.folder} does not exist", hint)


def choose_rows(
    run: Run,
    what: str,
    reason: str | None = None,
    kind: str | None = None,
    id: str | None = None,
    limit: int | None = None,
) -> tuple[int, list[tuple[int, Any]]]:
    """(number of matching rows, the first `limit` of them as (number, row)). `id` is a prefix.

    Raises UsageError with the known values for an unknown `what`, reason or kind, and DataError for a damaged row.
    """
    require_run(run)
    if what not in FILES:
        raise UsageError(f"unknown kind of rows: {what}", f"use one of {', '.join(FILES)}")
    rows: list[Any] = run.read(*FILES[what])
    matching = [row for row in rows if id is None or row.id.startswith(id)]
    for option, value, values in (("--reason", reason, VALUES["reasons"]), ("--kind", kind, KINDS)):
        if value is None:
            continue
        known = Counter(map(values[what], rows)) if what in values else Counter[str]()
        if value not in known:
            counts = ", ".join(f"{other} ({count})" for other, count in known.most_common())
            hint = f"the known ones are: {counts or 'none'}"
            if what not in values:
                hint = f"{option} applies to {', '.join(values)}"
            raise UsageError(f"no {what} with {option} {value}", hint)
        matching = [row for row in matching if values[what](row) == value]
    return len(matching), list(enumerate(matching, 1))[:limit]


# -- a row in the terminal -----------------------------------------------------------------------------------------

COLORS = {"Key": "yellow", "Cause": "red", "Correction": "green", "Generalized": "magenta", "Answer": "bold"}
OUTCOMES = {True: ("right", "green"), False: ("wrong", "red"), None: ("outcome unknown", "yellow")}


def highlight(text: str, wrong: int | None = None) -> Text:
    """Any text with dimmed tags and colored notes; step `wrong`, from 1, is red. Control characters are replaced."""
    shown = Text(visible(text))
    if wrong is not None:
        shown.highlight_regex(rf"(?s)<Step{wrong}>.*?(?=</Step|\Z)", "red")
    for tag, color in COLORS.items():
        shown.highlight_regex(rf"(?s)(?<=<{tag}>).*?(?=</{tag}>|\Z)", color)
    shown.highlight_regex(TAG, "dim cyan")
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
