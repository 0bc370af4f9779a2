"""An answer on the screen: numbered steps, each with the probability of an error, and the correction as it is written."""

import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import RLock
from typing import TYPE_CHECKING

from sclite import console
from sclite.chat.answer import Answer, probability
from sclite.student.self_correction import Corrected, Event, StepsScored, Writing
from sclite.trace import CAUSE, TAG, Step, parse

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.spinner import Spinner
    from rich.text import Text

INDENT = 12  # columns before the text of a step: mark, number, probability
DOING = {
    "start": "starting",
    "solution": "solving",
    "review": "reviewing",
    "scores": "reviewing",
    "correction": "correcting",
    "continuation": "continuing",
}
_PARTIAL_TAG = re.compile(r"<[^<>\n]{0,24}\Z")


@dataclass(frozen=True)
class Line:
    """A step, or its correction. `flagged` ones are wrong: `cause` says why, and a correction follows."""

    number: int
    text: str
    key: str | None = None
    odds: float | None = None
    flagged: bool = False
    cause: str | None = None
    corrects: bool = False


def step_lines(steps: Iterable[Step], start: int = 1) -> list[Line]:
    """The lines of steps; a step with a correction gives two."""
    lines = []
    for number, step in enumerate(steps, start):
        wrong = step.correction is not None
        lines.append(Line(number, step.text, step.key, None, wrong, step.cause))
        if wrong:
            lines.append(Line(number, step.correction or "", corrects=True))
    return lines


class AnswerView:
    """What is known of an answer so far; `feed` it the events of its script, then the answer itself."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.kept = 0  # lines before those that the current text replaces
        self.part, self.text, self.unread, self.tries = "start", "", False, 0
        self.first_answer: str | None = None
        self.final: str | None = None
        self.answer: Answer | None = None
        self.began = time.monotonic()
        self.lock = RLock()

    def feed(self, event: str | Event | Answer) -> None:
        """Take in the next event, piece of text, or the finished answer."""
        with self.lock:
            if isinstance(event, str):
                self.text, self.unread = self.text + event, True
                return
            self._read()
            if isinstance(event, Writing):
                if event.part == "solution":
                    # an earlier try did not fit in the context
                    self.lines.clear()
                    self.final = self.first_answer = self.answer = None
                    self.tries += 1
                self.part, self.text, self.kept = event.part, "", len(self.lines)
            elif isinstance(event, StepsScored):
                self.part = "scores"
                for place, odds in zip(self._live(), event.scores, strict=False):
                    self.lines[place] = replace(self.lines[place], odds=odds)
                if event.accused is not None:
                    self.first_answer, self.final = self.first_answer or self.final, None
                    place = self._live()[event.accused - 1]
                    del self.lines[place + 1 :]  # they depend on the wrong step
                    self.lines[place] = replace(self.lines[place], flagged=True)
            elif isinstance(event, Corrected):
                live = self._live()
                if self.part == "review":  # free: parsed only when complete
                    self.first_answer, place = self.final, live[min(event.step, len(live)) - 1]
                else:
                    place = max(i for i, line in enumerate(self.lines) if line.flagged)
                wrong = replace(self.lines[place], flagged=True, cause=event.cause)
                self.lines[place:] = [wrong, Line(event.step, event.correction, corrects=True)]
            else:
                self.answer, self.part, self.final = event, "", event.final.answer
                review, steps = event.review, event.trace.steps
                if review is not None and review.trace is not None:
                    fixed = [i for i, line in enumerate(self.lines) if line.corrects]
                    flagged = [i for i, line in enumerate(self.lines) if line.flagged]
                    # if a later round failed, keep what it flagged
                    count = max(flagged) if review.note else 1 + max(fixed)
                    done = sum(not line.flagged for line in self.lines[:count])
                    self.lines[count:] = step_lines(event.final.steps[done:], done + 1)
                else:  # nothing was corrected, or it could not be parsed: keep the first solution
                    self.first_answer = None
                    self.lines = step_lines(steps) if steps else [Line(0, event.first.text.strip())]
                    for place, odds in zip(self._live(), review.scores if review else (), strict=False):
                        self.lines[place] = replace(self.lines[place], odds=odds)

    def _live(self) -> list[int]:
        """Indices of the lines that show the steps of the current solution."""
        return [i for i, line in enumerate(self.lines) if not line.flagged]

    def _read(self) -> None:
        """Parse the text received since the last call: parsing it for each token would take longer than drawing."""
        if not self.unread:
            return
        self.unread, text = False, _PARTIAL_TAG.sub("", self.text)
        if self.part in ("solution", "continuation"):
            start = 1 + sum(not line.flagged for line in self.lines[: self.kept])
            trace = parse(text).trace
            steps = step_lines(trace.steps, start)
            self.lines[self.kept :] = steps if steps or TAG.search(text) else [Line(0, text.strip())]
            self.final = trace.answer
        elif self.part == "correction" and self.lines:
            found = parse(f"<Step1>x\n{CAUSE}{text}").trace.steps[0]
            flagged = self.lines[self.kept - 1]
            self.lines[self.kept - 1] = replace(flagged, cause=found.cause)
            correction = [Line(flagged.number, found.correction, corrects=True)] if found.correction else []
            self.lines[self.kept :] = correction

    # -- lines of text ---------------------------------------------------------------------------------------------

    def render(self, width: int, complete: bool = False) -> "list[Text]":
        """The lines, wrapped to a width. `complete` omits those that may still change: the last step, the answer."""
        from rich.text import Text

        with self.lock:
            self._read()
            rows: list[Text] = []
            last = self.lines[-1].number if complete and self.lines else None
            for line in self.lines:
                if line.number == last:
                    continue
                if not line.number:  # text without steps
                    rows += _hang(Text(), Text(readable(line.text)), width, 0)
                    continue
                mark = " " if line.odds is None else "·"
                mark = "✗" if line.flagged or line.cause else "→" if line.corrects else mark
                odds = f"{100 * probability(line.odds):3.0f}%" if line.odds is not None else ""
                style = "red" if line.flagged else "green" if line.corrects else ""
                shown = (f"{odds:4}", "bold red" if line.flagged else "dim")
                head = Text.assemble("  ", (mark, style or "dim"), (f"{line.number:3} ", "dim"), shown)
                text = Text(readable(line.text), f"{style} strike" if line.flagged else style)
                rows += _hang(head, text, width, INDENT)
                for name, note, colour in (("key", line.key, "cyan"), ("why", line.cause, "red")):
                    if note:
                        label = Text.assemble(" " * INDENT, (f"{name} ", colour))
                        rows += _hang(label, Text(readable(note)), width, INDENT + 4)
            if self.final is not None and not complete:
                answer = Text.assemble("  answer ", (readable(self.final), "bold"))
                if self.first_answer not in (None, self.final):
                    answer.append(f"  (was {readable(self.first_answer or '–')})", "dim")
                rows += [Text(), answer]
            return rows

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "Iterator[Text | Spinner]":
        """The lines with the current activity below; only the last ones if they are taller than the terminal."""
        from rich.spinner import Spinner

        rows = self.render(options.max_width)
        if not self.part:
            yield from rows
            return
        yield from rows[-max(1, console.height - 3) :]
        doing = f"{DOING[self.part]} · {time.monotonic() - self.began:.0f} s · Ctrl-C to stop"
        yield Spinner("dots", f"[dim]{doing}[/]")


def _hang(head: "Text", text: "Text", width: int, indent: int) -> "list[Text]":
    """`head` followed by a text whose other lines are indented."""
    from rich.text import Text

    head = head.copy()
    head.pad_right(max(0, indent - len(head.plain)))
    shown = Text(console.visible(text.plain), text.style)
    rows = shown.wrap(console.make_console(), max(20, width - indent)) if width else shown.split("\n")
    return [Text.assemble(head if i == 0 else " " * indent, row) for i, row in enumerate(rows or [Text()])]


# -- on the terminal -----------------------------------------------------------------------------------------------


@contextmanager
def showing(view: AnswerView) -> Iterator[Callable[[], None]]:
    """Show the view while it grows, and keep it on the screen; yields a function to call after each event."""
    out = console.make_console()
    if not out.is_terminal or out.is_dumb_terminal:
        # without cursor control, print complete steps; in a pipe, only the end
        printed = tries = 0

        def append() -> None:
            nonlocal printed, tries
            if view.tries != tries:
                printed, tries = 0, view.tries
            solving = view.part == "solution" and out.is_terminal
            for row in view.render(out.width, complete=True)[printed:] if solving else ():
                out.print(row, soft_wrap=True)
                printed += 1

        yield append
        rows = view.render(out.width if out.is_terminal else 0)
        changed = view.answer is not None and view.answer.review is not None
        for row in rows if changed or not printed else rows[printed:]:
            out.print(row, soft_wrap=True)
        return
    from rich.live import Live

    with Live(view, console=out, refresh_per_second=20):
        try:
            yield lambda: None  # it is drawn by a thread
        finally:
            with view.lock:
                view.part = ""


# -- LaTeX -------------------------------------------------------------------------------------------------------------

_COMMANDS = {
    "cdot": "·", "times": "×", "div": "÷", "pm": "±", "leq": "≤", "le": "≤", "geq": "≥", "ge": "≥", "neq": "≠",
    "ne": "≠", "approx": "≈", "equiv": "≡", "pi": "π", "alpha": "α", "beta": "β", "gamma": "γ", "theta": "θ",
    "lambda": "λ", "infty": "∞", "sum": "∑", "int": "∫", "angle": "∠", "circ": "°", "to": "→", "rightarrow": "→",
    "implies": "⇒", "Rightarrow": "⇒", "therefore": "∴", "in": "∈", "cup": "∪", "cap": "∩", "ldots": "…", "dots": "…",
    "left": "", "right": "", "displaystyle": "", "quad": " ", "qquad": " ",
}  # fmt: skip
_GROUP = r"\{((?:[^{}]|\{[^{}]*\})*)\}"
_WRAPPER = re.compile(rf"\\(?:boxed|text|textbf|mathrm|mathbf|operatorname){_GROUP}")
_FRACTION = re.compile(rf"\\[dt]?frac{_GROUP}{_GROUP}")
_ROOT = re.compile(rf"\\sqrt{_GROUP}")
_POWER = re.compile(r"\^(?:\{(-?\d+)\}|(\d+))")
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_MATH = re.compile(r"\$\$(.+?)\$\$|\$(?=\S)([^$\n]*[^$\s\\])\$(?!\d)|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.S)
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def readable(text: str) -> str:
    """LaTeX as plain text: \\frac{1}{2} is 1/2, $x^2$ is x²; other text is unchanged."""
    text = _MATH.sub(lambda found: next(group for group in found.groups() if group is not None), text)
    if "\\" in text:
        for _ in range(4):  # for nested ones
            text = _ROOT.sub(lambda found: f"√{_bracketed(found[1])}", text)
            text = _FRACTION.sub(lambda found: f"{_bracketed(found[1])}/{_bracketed(found[2])}", text)
            text = _WRAPPER.sub(r"\1", text)
        text = _COMMAND.sub(lambda found: _COMMANDS.get(found[1], found[0]), text)
        text = re.sub(r"\\([%$#&_{}])|\\[,;:! ]", lambda found: found[1] or " ", text)
    return _POWER.sub(lambda found: (found[1] or found[2]).translate(_SUPERSCRIPT), text)


def _bracketed(text: str) -> str:
    return text if re.fullmatch(r"\w+|[\d.,]+|√\w+", text) else f"({text})"
