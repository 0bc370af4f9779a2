"""Progress of a command's stages: a live line in a terminal, lines in a log, with cost and time left."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

from sclite import console
from sclite.console import escape, format_duration, visible

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

Progress = Callable[..., None]
"""`Pace.update`, or `no_progress`."""
LOG_SECONDS = 30.0  # between two progress lines without a terminal
MEASURED_SECONDS, MEASURED_ROWS = 2.0, 2  # the least that a rate is measured over


def no_progress(*_: object, **__: object) -> None:
    """A callback that shows nothing."""


class Pace:
    """Speed, cost and time left of a stage, measured from its first row: loading a library may come before it."""

    def __init__(self) -> None:
        self.begin: int | None = None  # rows done before this run
        self.start: tuple[float, int, float, float] | None = None
        """Seconds, rows, share of the work and US dollars from which the speed is measured."""
        self.end: float | None = None  # when the stage will end
        self.count, self.details = "", list[str]()
        self.bars: Bars | None = None  # the live line of a terminal

    def update(
        self,
        done: int,
        total: int,
        spent_usd: float | None = None,
        *,
        share: float | None = None,
        note: str = "",
        warning: str = "",
    ) -> None:
        """Call at the start and after each row.

        `share` is the share of the work done, if rows differ in length. `spent_usd` is the cost of the run. `note` holds
        current figures such as the loss. A `warning` is printed at once, on a line that stays.
        """
        if warning:
            console.note(f"[yellow]warning:[/] {escape(warning)}")
            return
        share = done / max(1, total) if share is None else share
        now = (time.monotonic(), done, share, spent_usd or 0.0)
        self.count, self.details = f"{done}/{total}" if total else "", [note]
        self.begin = done if self.begin is None else self.begin
        if self.start is None or self.start[1] == self.begin:
            self.start = now
        seconds, rows, part, dollars = (after - before for after, before in zip(now, self.start, strict=True))
        if seconds >= MEASURED_SECONDS and rows >= MEASURED_ROWS and part > 0:
            self.end = now[0] + (1 - share) * seconds / part
            cost = (spent_usd or 0.0) + dollars / rows * (total - done)
            slow = f"{format_duration(seconds / rows)} each"
            speed = f"{rows / seconds:.1f}/s" if rows > seconds / 2 else slow
            self.details = [f"${spent_usd:.4f} of about ${cost:.2f}" if spent_usd else "", speed, note]
        if self.bars is not None:
            self.bars.update(self.bars.task_ids[0], completed=done, total=total or None)

    def figures(self) -> str:
        """12/60, 58 s left, $0.12 of about $1.40, 3.2/s (or 29 s each), loss 0.412."""
        left = "estimating time left" if self.count else ""
        if self.end is not None:
            left = f"{format_duration(max(0.0, self.end - time.monotonic()))} left"
        return ", ".join(filter(None, (self.count, left, *self.details)))


class ProgressDisplay:
    """Shows the progress of a command's stages."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self.seconds: dict[str, float] = {}
        self._pace = Pace()

    @contextmanager
    def stage(self, name: str, text: str) -> Iterator[Progress]:
        """Show a stage while it runs. Yields the callback `Pace.update`."""
        began, self._pace = time.monotonic(), Pace()
        if self.quiet:
            yield no_progress
        else:
            with self._bar(text) if console.make_console(stderr=True).is_terminal else self._log(text):
                yield self._pace.update
        self.seconds[name] = time.monotonic() - began

    @contextmanager
    def _bar(self, text: str) -> Iterator[None]:
        """A live line in a terminal, whose clock and spinner keep moving. A narrow terminal cuts off its end."""
        from rich import progress as rich
        from rich.table import Column
        from rich.text import Text

        pace, terminal = self._pace, console.make_console(stderr=True)

        class Figures(rich.ProgressColumn):
            def render(self, task: rich.Task) -> Text:
                return Text(visible(pace.figures()), "dim")

        rest = Figures(Column(ratio=1, no_wrap=True, overflow="ellipsis"))
        name = rich.TextColumn("{task.description}", markup=False)
        columns = (rich.SpinnerColumn(), name, rich.BarColumn(10), rich.TimeElapsedColumn(), rest)
        with rich.Progress(*columns, console=terminal, transient=True, expand=True) as bars:
            bars.add_task(visible(text).partition(":")[0], total=None)
            self._pace.bars = bars
            yield

    @contextmanager
    def _log(self, text: str) -> Iterator[None]:
        """A line every LOG_SECONDS, even without progress."""
        ended, began = threading.Event(), time.monotonic()

        def write_lines() -> None:
            while not ended.wait(LOG_SECONDS):
                so_far = f"{format_duration(time.monotonic() - began)} so far"
                known = ", ".join(filter(None, (so_far, self._pace.figures())))
                console.note(escape(f"{text} ({known})"))

        thread = threading.Thread(target=write_lines, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def wait(self, text: str) -> AbstractContextManager[object]:
        """A spinner between two stages, while something is read or computed."""
        return nullcontext() if self.quiet else console.spinner(text)

    def print(self, text: str) -> None:
        """Print a line to stderr, between two stages."""
        if not self.quiet:
            console.note(escape(text))

    def confirm(self, question: str) -> bool:
        """Ask yes or no on the terminal while the bar pauses. True without a terminal."""
        if self.quiet or not console.is_interactive():
            return True
        if self._pace.bars is not None:
            self._pace.bars.stop()
        sys.stderr.write(f"{question} [y/N] ")
        sys.stderr.flush()
        reply = sys.stdin.readline().strip().lower()
        self._pace.start = self._pace.end = None  # the time spent on the question does not count
        if self._pace.bars is not None:
            self._pace.bars.start()
        return reply in ("y", "yes")

    def done(self, name: str, text: str, skipped: bool = False) -> None:
        """Print the closing line of a stage."""
        if not self.quiet:
            suffix = "· up to date, skipped" if skipped else format_duration(self.seconds.get(name, 0.0))
            console.note(f"[green]✓[/] {escape(text)} [dim]{suffix}[/]")
