"""Progress over the stages of a command: a bar in a terminal, lines in a log, with cost and time left."""

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from sclite import console
from sclite.console import escape, format_duration, visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars

Progress = Callable[..., None]
Shown = tuple[Callable[[str], None], Callable[[int, int, str], None]]
WIDE = 125  # columns of a progress line with its full text
LOG_SECONDS = 30.0  # between two progress lines without a terminal
HEADING_DELAY = 0.5  # seconds; a shorter stage only prints its closing line


class Rate:
    """Rows per second since the first row of this command, their cost and the expected total."""

    def __init__(self) -> None:
        self.begin: int | None = None  # rows done before
        self.first = self.now = (0.0, 0, 0.0)  # seconds, rows, US dollars

    def update(self, done: int, spent_usd: float | None) -> None:
        """Call at the start and after each row, with the rows done and the cost of the run (None: free)."""
        self.now = (time.monotonic(), done, spent_usd or 0.0)
        if self.begin is None:
            self.begin = done
            self.first = self.now
        elif self.first[1] == self.begin:  # loading a library may come before the first row
            self.first = self.now

    def line(self, total: int) -> str:
        """3.2/s (or 29 s each), $0.12 of about $1.40, 4 min 2 s left."""
        seconds, rows, dollars = (now - then for now, then in zip(self.now, self.first, strict=True))
        if rows <= 0 or seconds <= 0:
            return ""
        left, spent = total - self.now[1], self.now[2]
        cost = f"${spent:.4f} of about ${spent + dollars / rows * left:.2f}, " if spent else ""
        speed = f"{rows / seconds:.1f}/s" if rows > seconds / 2 else f"{format_duration(seconds / rows)} each"
        return f"{speed}, {cost}{format_duration(left * seconds / rows)} left"


class ProgressDisplay:
    """Progress over the stages of a command.

    `plan` maps stages to their typical seconds; the time left is scaled by how long the finished ones took.
    """

    def __init__(self, plan: Mapping[str, float] | None = None, quiet: bool = False):
        self.plan, self.quiet = dict(plan or {}), quiet
        self.finished: dict[str, float] = {}
        self.skipped: set[str] = set()
        self._bars: Bars | None = None
        self._rate = Rate()

    def seconds_left(self, stage: str, share: float) -> float | None:
        """Seconds left in all stages when `share` of this one is done; None without a plan."""
        if stage not in self.plan:
            return None
        worked = {name: seconds for name, seconds in self.finished.items() if name not in self.skipped}
        planned = sum(self.plan.get(name, 0) for name in worked)
        scale = sum(worked.values()) / planned if planned > 5 else 1.0
        later = list(self.plan)[list(self.plan).index(stage) + 1 :]
        return scale * (self.plan[stage] * (1 - share) + sum(self.plan[name] for name in later))

    @contextmanager
    def stage(self, name: str, text: str) -> Iterator[Progress]:
        """Show a stage while it runs. Yields a callback `progress(done, total, spent_usd, note=, warning=)`.

        `note` holds current figures such as the loss. A `warning` is printed at once, on a line that stays.
        """
        number = f"{list(self.plan).index(name) + 1}/{len(self.plan)} " if name in self.plan else ""
        text, began = visible(f"{number}{text}"), time.monotonic()
        self._rate = Rate()
        if self.quiet:
            yield lambda *_, **__: None
        else:
            terminal = console.make_console(stderr=True)
            with self._bar(terminal, text) if terminal.is_terminal else self._log(name, text) as (warn, show):

                def progress(
                    done: int,
                    total: int,
                    spent_usd: float | None = None,
                    *,
                    note: str = "",
                    warning: str = "",
                ) -> None:
                    if warning:
                        warn(f"[yellow]warning:[/] {escape(warning)}")
                        return
                    self._rate.update(done, spent_usd)
                    seconds = self.seconds_left(name, done / max(1, total))
                    timing = self._rate.line(total) if seconds is None else f"{format_duration(seconds)} left"
                    show(done, total, ", ".join(filter(None, (note, timing))))

                yield progress
        self.finished[name] = time.monotonic() - began

    @contextmanager
    def _bar(self, terminal: "Console", text: str) -> Iterator[Shown]:
        """(print a warning, show progress) on a line of the terminal."""
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bars

        bar_width, text = (24, text) if terminal.width >= WIDE else (10, text.partition(":")[0])
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}", style="dim", markup=False),
        )
        with Bars(*columns, console=terminal, transient=True) as bars:
            self._bars = bars
            task = bars.add_task(text, total=None, left="")

            def show(done: int, total: int, figures: str) -> None:
                room = terminal.width - len(text) - bar_width - 2 * len(str(total)) - 5
                bars.update(task, completed=done, total=total, left=fit_to_width(visible(figures), room))

            yield partial(console.print, console=terminal), show
        self._bars = None

    @contextmanager
    def _log(self, name: str, text: str) -> Iterator[Shown]:
        """(print a warning, show progress) below a heading, which is printed before them or after HEADING_DELAY.

        With a plan only warnings are shown, else also figures every LOG_SECONDS.
        """
        left, lock, printed = self.seconds_left(name, 0.0), threading.Lock(), time.monotonic()
        heading = f"{text} (about {format_duration(left)} left in total)" if left else text

        def print_heading() -> None:
            nonlocal heading
            with lock:
                if heading:
                    console.note(escape(heading))
                heading = ""

        def warn(text: str) -> None:
            print_heading()
            console.note(text)

        def show(done: int, total: int, figures: str) -> None:
            nonlocal printed
            if left is None and time.monotonic() - printed >= LOG_SECONDS:
                printed = time.monotonic()
                warn(escape(f"  {done} of {total} {figures}"))

        timer = threading.Timer(HEADING_DELAY, print_heading)
        timer.daemon = True
        timer.start()
        try:
            yield warn, show
        finally:
            timer.cancel()
            with lock:  # waits for a heading that is being printed, so that it precedes what follows
                heading = ""

    def print(self, text: str) -> None:
        """Print a line to stderr, between two stages."""
        if not self.quiet:
            console.note(escape(text))

    def confirm(self, question: str) -> bool:
        """Ask yes or no on the terminal while the bar pauses. True without a terminal."""
        if self.quiet or not console.is_interactive():
            return True
        if self._bars is not None:
            self._bars.stop()
        sys.stderr.write(f"{question} [y/N] ")
        sys.stderr.flush()
        reply = console.read_line().strip().lower()
        self._rate = Rate()  # the time spent on the question does not count
        if self._bars is not None:
            self._bars.start()
        return reply in ("y", "yes")

    def done(self, name: str, text: str, skipped: bool = False) -> None:
        """Print the closing line of a stage. The time of a skipped one is not used for the time left."""
        if skipped:
            self.skipped.add(name)
        if not self.quiet:
            suffix = "up to date, skipped" if skipped else format_duration(self.finished.get(name, 0.0))
            console.note(f"[green]✓[/] {escape(text)} [dim]{suffix}[/]")


def fit_to_width(figures: str, room: int) -> str:
    """Drop whole figures, the least important first, until they fit `room` columns. The time left always stays.

    First go rates and memory, then figures from the end, then the cost.
    """
    pieces = figures.split(", ")

    def importance(place: int) -> tuple[bool, bool, int, int]:
        piece = pieces[place]
        minor = next(
            (n for n, end in enumerate((" GB", " tokens/s", "/s", " each"), 1) if piece.endswith(end)), 0
        )
        return (not piece.endswith(" left"), not piece.startswith("$"), minor, place)

    kept = sorted(range(len(pieces)), key=importance)
    while len(kept) > 1 and len(", ".join(pieces[i] for i in kept)) > room:
        kept.pop()
    return ", ".join(pieces[i] for i in sorted(kept))
