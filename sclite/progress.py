"""Progress over the stages of a command: bars in a terminal, lines in a log, what it costs and how long it still takes."""

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sclite.console import (
    escape,
    format_duration,
    is_interactive,
    make_console,
    note,
    print_to,
    read_line,
    visible,
)

Progress = Callable[..., None]
WIDE = 125  # columns that a line of progress takes with all its words
LOG_SECONDS = 30.0  # between two lines of progress where there is no terminal
HEADING_DELAY = 0.5  # seconds; a stage that ends within them has its closing line alone


class Rate:
    """Rows per second since the first one that this command has made, what they cost, and what the rest will."""

    def __init__(self):
        self.now: tuple[float, int, float] = (0.0, 0, 0.0)
        self.priced = False
        self.restart()

    def restart(self) -> None:
        """Count from the next row on: what has passed until then, such as a question to the user, is no work."""
        self.begin: int | None = None
        self.first: tuple[float, int, float] | None = None

    def update(self, done: int, spent_usd: float | None) -> None:
        """At the start and after each row: how many are done, and what the whole run has cost (None: it costs nothing)."""
        self.priced = self.priced or bool(spent_usd)
        self.now = (time.monotonic(), done, spent_usd or 0.0)
        self.begin = done if self.begin is None else self.begin
        if self.first is None or self.first[1] == self.begin:
            self.first = self.now

    def line(self, total: int) -> str:
        """3.2/s, $0.12 of about $1.40, 4 min 2 s left."""
        seconds, rows, dollars = (now - then for now, then in zip(self.now, self.first, strict=True))
        if rows <= 0 or seconds <= 0:
            return ""
        left = total - self.now[1]
        money = (
            f"${self.now[2]:.4f} of about ${self.now[2] + dollars / rows * left:.2f}, " if self.priced else ""
        )
        return f"{rows / seconds:.1f}/s, {money}{format_duration(left * seconds / rows)} left"


class ProgressDisplay:
    """Progress over the stages of a command.

    `plan` maps stages to their usual seconds on a common machine; what they take here scales the time that is left.
    """

    def __init__(self, plan: Mapping[str, float] | None = None, quiet: bool = False):
        self.plan, self.quiet = dict(plan or {}), quiet
        self.finished: dict[str, float] = {}
        self.skipped: set[str] = set()
        self._bars: Any = None
        self._rate = Rate()

    def seconds_left(self, stage: str, share: float) -> float | None:
        """Seconds left in all, when `share` of this stage is done; None without a plan."""
        if stage not in self.plan:
            return None
        worked = {name: seconds for name, seconds in self.finished.items() if name not in self.skipped}
        planned = sum(self.plan.get(name, 0) for name in worked)
        scale = sum(worked.values()) / planned if planned > 5 else 1.0
        later = list(self.plan)[list(self.plan).index(stage) + 1 :]
        return scale * (self.plan[stage] * (1 - share) + sum(self.plan[name] for name in later))

    @contextmanager
    def stage(self, name: str, text: str) -> Iterator[Progress]:
        """Show a stage while it runs; gives the callback `progress(done, total, spent_usd, note=, warning=)`.

        `note` holds the figures of the moment. A `warning` is said at once, in a line of its own that stays.
        """
        number = f"{list(self.plan).index(name) + 1}/{len(self.plan)} " if name in self.plan else ""
        began = time.monotonic()
        if self.quiet:
            yield lambda *_, **__: None
        else:
            with self._bar(name, f"{number}{text}") as progress:
                yield progress
        self.finished[name] = time.monotonic() - began

    @contextmanager
    def _bar(self, name: str, text: str) -> Iterator[Progress]:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bars

        text = visible(text)
        console = make_console(stderr=True)
        rate = self._rate = Rate()
        if not console.is_terminal:
            left = self.seconds_left(name, 0.0)
            told = f"{text}{f' (about {format_duration(left)} left in all)' if left else ''}"
            with _heading(lambda: note(escape(told))) as head:
                yield self._lines(rate, head, silent=left is not None)
            return
        wide = console.width >= WIDE
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(24 if wide else 10),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}", style="dim", markup=False),
        )
        shown = text if wide else text.partition(":")[0]
        with Bars(*columns, console=console, transient=True) as self._bars:
            task = self._bars.add_task(shown, total=None, left="")

            def progress(
                done: int, total: int, spent_usd: float | None = None, *, note: str = "", warning: str = ""
            ) -> None:
                if warning:
                    print_to(console, f"[yellow]warning:[/] {escape(warning)}")
                    return
                rate.update(done, spent_usd)
                seconds = self.seconds_left(name, done / max(1, total))
                told = rate.line(total) if seconds is None else f"{format_duration(seconds)} left"
                room = console.width - len(shown) - (24 if wide else 10) - 2 * len(str(total)) - 5
                self._bars.update(
                    task, completed=done, total=total, left=fit_to_width(visible(_joined(note, told)), room)
                )

            yield progress
        self._bars = None

    def _lines(self, rate: "Rate", head: Callable[[], None], silent: bool) -> Progress:
        """Progress for a log: a line now and then, unless `silent`, and each warning; `head` before any of them."""
        told = time.monotonic()
        write = note

        def progress(
            done: int, total: int, spent_usd: float | None = None, *, note: str = "", warning: str = ""
        ) -> None:
            nonlocal told
            if warning:
                head()
                write(f"[yellow]warning:[/] {escape(warning)}")
                return
            rate.update(done, spent_usd)
            if not silent and time.monotonic() - told >= LOG_SECONDS:
                told = time.monotonic()
                head()
                write(escape(f"  {done} of {total} {_joined(note, rate.line(total))}"))

        return progress

    def print(self, text: str) -> None:
        """A line beside the result, between two stages."""
        if not self.quiet:
            note(escape(text))

    def confirm(self, question: str) -> bool:
        """Ask yes or no on the terminal; the bar pauses. Yes where there is no terminal to ask on."""
        if self.quiet or not is_interactive():
            return True
        if self._bars is not None:
            self._bars.stop()
        sys.stderr.write(f"{question} [y/N] ")
        sys.stderr.flush()
        said = read_line().strip().lower()
        self._rate.restart()
        if self._bars is not None:
            self._bars.start()
        return said in ("y", "yes")

    def done(self, name: str, text: str, skipped: bool = False) -> None:
        """One line for a finished stage; one that was skipped tells nothing of how fast this machine is."""
        if skipped:
            self.skipped.add(name)
        if not self.quiet:
            seconds = "as it was" if skipped else format_duration(self.finished.get(name, 0.0))
            note(f"[green]✓[/] {escape(text)} [dim]{seconds}[/]")


@contextmanager
def _heading(say_it: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Say a stage's heading once: when the function that this gives is called, or after a moment, so that a stage with
    nothing to do has none."""
    said, lock = False, threading.Lock()

    def head() -> None:
        nonlocal said
        with lock:
            if not said:
                said = True
                say_it()

    timer = threading.Timer(HEADING_DELAY, head)
    timer.daemon = True
    timer.start()
    try:
        yield head
    finally:
        timer.cancel()
        with lock:  # a heading that is being said now comes before what follows the stage
            said = True


def fit_to_width(figures: str, room: int) -> str:
    """The figures of the moment in so many columns: those that matter least are left away whole, the time left never.

    First to go are the two rates and the memory, then what stands last; money only before the time.
    """
    pieces = figures.split(", ")

    def matters(place: int) -> tuple[bool, bool, int, int]:
        piece = pieces[place]
        minor = next((n for n, end in enumerate((" GB", " tokens/s", "/s"), 1) if piece.endswith(end)), 0)
        return (not piece.endswith(" left"), not piece.startswith("$"), minor, place)

    kept = sorted(range(len(pieces)), key=matters)
    while len(kept) > 1 and len(", ".join(pieces[i] for i in kept)) > room:
        kept.pop()
    return ", ".join(pieces[i] for i in sorted(kept))


def _joined(*texts: str) -> str:
    return ", ".join(filter(None, texts))
