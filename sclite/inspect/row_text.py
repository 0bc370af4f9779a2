"""A row as text for the terminal: a colored heading, the question, and the row's text with highlighted tags."""

from collections.abc import Iterator

from rich.text import Text

from sclite.console import visible
from sclite.inspect.rows import AnyRow, Problems
from sclite.records import Attempt, Drop, Pair, Problem, Review, Template
from sclite.trace import TAG, tag_name

COLORS = {"key": "yellow", "cause": "red", "correction": "green", "generalized": "magenta", "answer": "bold"}
_OUTCOMES = {True: ("right", "green"), False: ("wrong", "red"), None: ("outcome unknown", "yellow")}


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


def page(row: AnyRow, number: int, total: int, problems: Problems) -> Text:
    """Row `number` of `total`, followed by an empty line. Its question is looked up in `problems`."""
    lines = Text().append(f"{number}/{total}  ", "dim").append(visible(row.id), "bold cyan")
    for text, style in _heading(row):
        lines.append("  ").append(visible(text), style)
    problem = row if isinstance(row, Problem | Template) else problems.get(row.id)
    if problem is not None:
        lines.append("\n").append(visible(problem.question.strip()), "italic")
        lines.append("\ngold answer ", "dim").append(visible(problem.answer), "bold")
    for part in _body(row):
        part.rstrip()
        if part:
            lines.append("\n").append_text(part)
    return lines.append("\n\n")


def _heading(row: AnyRow) -> Iterator[tuple[str, str]]:
    """(text, style) of what follows the id."""
    match row:
        case Attempt():
            yield f"sample {row.sample}", ""
            yield _OUTCOMES[row.correct]
        case Review():
            yield f"sample {row.sample}", ""
            yield (f"wrong at step {row.step}", "red") if row.step else ("all steps right", "green")
        case Pair():
            yield f"sample {row.sample}, {row.kind} at step {row.step}", ""
            yield f"chosen by {row.origin}", "green"
        case Drop():
            yield row.stage if row.sample is None else f"{row.stage}, sample {row.sample}", ""
            yield row.reason, "bold red"
    if getattr(row, "requests", 1) > 1:
        yield f"{row.requests} requests", "yellow"


def _body(row: AnyRow) -> Iterator[Text]:
    match row:
        case Problem():
            yield highlight(row.solution or "")
        case Template():
            yield highlight(row.trace)
        case Attempt():
            yield highlight(row.trace, row.first_error)
        case Review():
            yield highlight(row.trace, row.step)
        case Drop():
            yield Text(visible(row.detail), "yellow")
            yield highlight(row.raw)
        case Pair():
            yield Text(visible("".join(row.prefix)), "dim")
            for name, text, color in (("chosen", row.chosen, "green"), ("rejected", row.rejected, "red")):
                yield Text().append(f"{name:<9}", f"bold {color}").append(visible(text.strip()), color)
