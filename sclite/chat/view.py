"""An answer on the screen: numbered steps, each with the probability of an error, and the correction as it is written."""

import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sclite import console
from sclite.chat.answer import Answer, probability
from sclite.student.self_correction import Event, StepsScored, Writing
from sclite.trace import CAUSE, TAG, Step, parse

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.spinner import Spinner
    from rich.text import Text

INDENT = 12  # columns before the text of a step: mark, number, probability
DOING = {"start": "starting", "solution": "solving", "correction": "correcting", "continuation": "continuing"}
_PARTIAL_TAG = re.compile(r"<[^<>\n]{0,24}\Z")


@dataclass(frozen=True)
class Line:
    """A step, or its correction. `flagged` ones are wrong: `cause` says why, and a correction follows."""

    number: int  # 0: text without steps
    text: str
    key: str | None = None
    odds: float | None = None
    flagged: bool = False
    cause: str | None = None
    corrects: bool = False


def step_lines(steps: Iterable[Step], scores: Iterable[float] = (), start: int = 1) -> list[Line]:
    """The lines of steps. A step with a correction gives two; the score is that of the correction."""
    lines, odds = [], iter(scores)
    for number, step in enumerate(steps, start):
        wrong, score = step.correction is not None, next(odds, None)
        lines.append(Line(number, step.text, step.key, None if wrong else score, wrong, step.cause))
        if wrong:
            lines.append(Line(number, step.correction or "", None, score, corrects=True))
    return lines


class AnswerView:
    """What is known of an answer so far; `feed` it the events of its script, then the answer itself."""

    def __init__(self) -> None:
        # complete lines, what the student is doing, and the text of it; replaced at once, since a thread draws it
        self.state: tuple[list[Line], str, str] = [], "start", ""
        self.solution = ""
        self.answer: Answer | None = None
        self.running, self.began = True, time.monotonic()

    def feed(self, event: str | Event | Answer) -> None:
        """Take in the next event, piece of text, or the finished answer."""
        complete, part, text = self.state
        if isinstance(event, str):
            self.state = complete, part, text + event
            self.solution += event if part == "solution" else ""
        elif isinstance(event, Writing):
            self.state = self.current()[0], event.part, ""
        elif isinstance(event, StepsScored):
            lines, _ = self.current()
            unflagged = [place for place, line in enumerate(lines) if not line.flagged]
            for place, odds in zip(unflagged, event.scores, strict=False):
                lines[place] = replace(lines[place], odds=odds)
            if event.accused is not None:
                place = unflagged[event.accused - 1]
                lines[place:] = [replace(lines[place], flagged=True)]  # later steps depend on the wrong one
            self.state = lines, "scores", ""
        elif isinstance(event, Answer):
            self.answer, self.running = event, False

    def current(self) -> tuple[list[Line], str | None]:
        """The lines so far, and the final answer if there is one. A correction replaces the end of the first solution."""
        if self.answer is not None:
            review, steps, final = self.answer.review, self.answer.trace.steps, self.answer.final.answer
            if not steps:
                return [Line(0, self.answer.first.text.strip())], final
            lines = step_lines(steps, review.scores if review is not None else ())
            if review is not None and review.trace is not None and review.accused is not None:
                unflagged = [place for place, line in enumerate(lines) if not line.flagged]
                place = unflagged[min(review.accused, len(unflagged)) - 1]
                flagged = replace(lines[place], flagged=True, cause=review.cause)
                correction = Line(review.accused, review.correction or "", corrects=True)
                rest = step_lines(review.trace.steps[review.accused :], start=review.accused + 1)
                lines[place:] = [flagged, correction, *rest]
            return lines, final
        complete, part, text = self.state
        lines, final, text = list(complete), None, _PARTIAL_TAG.sub("", text)
        if part == "correction":
            found = parse(f"<Step1>x\n{CAUSE}{text}").trace.steps[0]
            lines[-1] = replace(lines[-1], cause=found.cause)
            if found.correction:
                lines.append(Line(lines[-1].number, found.correction, corrects=True))
        elif part in ("solution", "continuation"):
            trace = parse(text).trace
            start = 1 + sum(not line.flagged for line in lines)
            lines += step_lines(trace.steps, start=start)
            if text.strip() and not TAG.search(text):
                lines.append(Line(0, text.strip()))
            final = trace.answer
        return lines, final

    def render(self, width: int) -> "list[Text]":
        """The lines as text, wrapped to a width (0: not at all)."""
        from rich.text import Text

        lines, final = self.current()
        rows: list[Text] = []
        for line in lines:
            if not line.number:
                rows += _hang(Text(), Text(line.text), width, 0)
                continue
            mark = " " if line.odds is None else "·"
            mark = "✗" if line.flagged or line.cause else "→" if line.corrects else mark
            odds = f"{100 * probability(line.odds):3.0f}%" if line.odds is not None else ""
            style = "red" if line.flagged else "green" if line.corrects else ""
            shown = (f"{odds:4}", "bold red" if line.flagged else "dim")
            head = Text.assemble("  ", (mark, style or "dim"), (f"{line.number:3} ", "dim"), shown)
            text = Text(line.text, f"{style} strike" if line.flagged else style)
            rows += _hang(head, text, width, INDENT)
            for name, note, color in (("key", line.key, "cyan"), ("why", line.cause, "red")):
                if note:
                    label = Text.assemble(" " * INDENT, (f"{name} ", color))
                    rows += _hang(label, Text(note), width, INDENT + 4)
        if final is not None:
            first = self.answer.trace.answer if self.answer is not None else final
            was = "" if first == final else f"  (was {console.visible(first or '–')})"
            rows += [Text(), Text.assemble("  answer ", (console.visible(final), "bold"), (was, "dim"))]
        return rows

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "Iterator[Text | Spinner]":
        """The lines with the current activity below; only the last ones if they are taller than the terminal."""
        from rich.spinner import Spinner

        rows = self.render(options.max_width)
        if not self.running:
            yield from rows
            return
        yield from rows[-max(1, console.height - 3) :]
        doing = f"{DOING.get(self.state[1], 'reviewing')} · {time.monotonic() - self.began:.0f} s · Ctrl-C to stop"
        yield Spinner("dots", f"[dim]{doing}[/]")


def _hang(head: "Text", text: "Text", width: int, indent: int) -> "list[Text]":
    """`head` followed by a text whose other lines are indented."""
    from rich.text import Text

    head = head.copy()
    head.pad_right(max(0, indent - len(head.plain)))
    shown = Text(console.visible(text.plain), text.style)
    rows = shown.wrap(console.make_console(), max(20, width - indent)) if width else shown.split("\n")
    return [Text.assemble(head if i == 0 else " " * indent, row) for i, row in enumerate(rows or [Text()])]


@contextmanager
def showing(view: AnswerView) -> Iterator[None]:
    """Show the view while it grows, and keep it on the screen. Without cursor control, only show its end."""
    from rich.live import Live

    out = console.make_console()
    if out.is_terminal and not out.is_dumb_terminal:
        with Live(view, console=out, refresh_per_second=20):
            try:
                yield
            finally:
                view.running = False
        return
    yield
    for row in view.render(out.width if out.is_terminal else 0):
        out.print(row, soft_wrap=True)
