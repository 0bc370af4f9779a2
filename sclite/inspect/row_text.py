"""A row as text for the terminal: a colored heading, the question, and the row's text with highlighted tags."""

from rich.text import Text

from sclite.console import visible
from sclite.inspect.rows import AnyRow, Problems
from sclite.records import Attempt, Drop, Pair, Problem, Review, Template
from sclite.trace import TAG, tag_name

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


def format_row(row: AnyRow, number: int, total: int, problems: Problems) -> Text:
    """Row `number` of `total`, followed by an empty line. Its question is looked up in `problems`."""
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
            heading = [
                (f"sample {row.sample}, {row.kind} at step {row.step}", ""),
                (f"chosen by {row.origin}", "green"),
            ]
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
