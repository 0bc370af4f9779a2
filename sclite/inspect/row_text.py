"""A row as it is read in the terminal: a coloured heading, the question, and the text with its tags told apart."""

from collections.abc import Iterator
from typing import Any

from rich.text import Text

from sclite.console import visible
from sclite.inspect.rows import Problems
from sclite.records import Attempt, Drop, Pair, Problem, Review, Template
from sclite.trace import TAG, tag_name

COLOURS = {"key": "yellow", "cause": "red", "correction": "green", "generalized": "magenta", "answer": "bold"}
_OUTCOMES = {True: ("right", "green"), False: ("wrong", "red"), None: ("outcome unknown", "yellow")}


def painted(text: str, wrong: int | None = None) -> Text:
    """Any text with its tags dimmed and what they hold coloured; step number `wrong`, from 1, is red.

    Control characters show as pictures, so that no reply can steer the terminal.
    """
    shown = Text()
    colour, inside, position = "", "", 0
    for match in TAG.finditer(text):
        shown.append(visible(text[position : match.start()]), inside or colour)
        shown.append(match[0], "dim cyan")
        position = match.end()
        closes, name = bool(match[1]), tag_name(match[2])
        if name != "step":
            inside = "" if closes else COLOURS[name]
        else:
            accused = not closes and match[3] and int(match[3]) == wrong
            colour, inside = "red" if accused else "", ""
    shown.append(visible(text[position:]), inside or colour)
    return shown


def page(row: Any, number: int, total: int, problems: Problems) -> Text:
    """One row, an empty line after it. `number` of `total` heads it; its question comes from `problems`."""
    lines = Text().append(f"{number}/{total}  ", "dim").append(visible(row.id), "bold cyan")
    for part in (*_heading(row), *_body(row, problems)):
        lines.append_text(part)
    return lines.append("\n\n")


def _heading(row: Any) -> Iterator[Text]:
    """What stands behind the id."""
    match row:
        case Attempt():
            yield _also(f"sample {row.sample}")
            yield _also(*_OUTCOMES[row.correct])
        case Review():
            yield _also(f"sample {row.sample}")
            yield _also(f"wrong at step {row.step}", "red") if row.step else _also("all steps right", "green")
        case Pair():
            yield _also(f"sample {row.sample}, {row.kind} at step {row.step}")
            yield _also(f"chosen by {row.origin}", "green")
        case Drop():
            yield _also(row.stage if row.sample is None else f"{row.stage}, sample {row.sample}")
            yield _also(row.reason, "bold red")
    if getattr(row, "requests", 1) > 1:
        yield _also(f"{row.requests} requests", "yellow")


def _also(text: str, style: str = "") -> Text:
    return Text("  ").append(visible(text), style)


def _body(row: Any, problems: Problems) -> Iterator[Text]:
    yield from _question(row if isinstance(row, Problem | Template) else problems.get(row.id))
    match row:
        case Problem():
            yield from _part(painted(row.solution or ""))
        case Template():
            yield from _part(painted(row.trace))
        case Attempt():
            yield from _part(painted(row.trace, row.first_error))
        case Review():
            yield from _part(painted(row.trace, row.step))
        case Drop():
            yield from _part(Text(visible(row.detail), "yellow"))
            yield from _part(painted(row.raw))
        case Pair():
            yield from _pair(row)


def _question(problem: Problem | Template | None) -> Iterator[Text]:
    if problem is not None:
        yield Text("\n").append(visible(problem.question.strip()), "italic")
        yield Text("\n").append("gold answer ", "dim").append(visible(problem.answer), "bold")


def _part(text: Text) -> Iterator[Text]:
    text.rstrip()
    if text:
        yield Text("\n").append_text(text)


def _pair(row: Pair) -> Iterator[Text]:
    yield from _part(Text(visible("".join(row.prefix)), "dim"))
    for name, text, colour in (("chosen", row.chosen, "green"), ("rejected", row.rejected, "red")):
        yield Text("\n").append(f"{name:<9}", f"bold {colour}").append(visible(text.strip()), colour)
