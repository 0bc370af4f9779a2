"""Progress of a command's stages: a live line in a terminal, lines in a log, with cost and time left."""

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

from sclite import console
from sclite.console import escape, format_duration, visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars

Progress = Callable[..., None]
"""progress(done, total, cost or share=.., note=.., warning=..)."""
Shown = tuple[Callable[[str], None], Callable[[int, int], None]]
WIDE = 125  # columns of a progress line with its full text
LOG_SECONDS = 30.0  # between two progress lines without a terminal
HEADING_DELAY = 0.5  # seconds; a shorter stage only prints its closing line
MEASURED_SECONDS, MEASURED_ROWS = 2.0, 2  # the least that a rate is measured over
WINDOW_ROWS = 10  # before the oldest rows leave the window
MEASURED_SHARE = 0.02  # of a plan that must be measured before it is scaled
SHORT = 10.0  # seconds; a shorter stage mostly loads libraries, and says nothing about the speed of others
ESTIMATING = "estimating time left"


def no_progress(*_: object, **__: object) -> None:
    """A callback that shows nothing."""


class Rate:
    """The speed of a stage: rows, share of the work and cost over time, measured from its first row."""

    def __init__(self) -> None:
        # seconds, rows, share of the work, US dollars
        self.points: list[tuple[float, int, float, float]] = []
        self.begin: int | None = None  # rows done before this run
        self.window = 0  # the point from which the rate is measured
        self.advanced = 0.0  # when the last row was done
        self.total, self.note = 0, ""  # rows, and current figures such as the loss

    def update(self, done: int, share: float, spent_usd: float | None) -> None:
        """Call at the start and after each row with the rows and share done, and the cost of the run (None: free)."""
        if self.begin is None:
            self.begin = done
        elif self.points[0][1] == self.begin:  # loading a library may come before the first row
            self.points.clear()
        points = self.points
        if not points or done != points[-1][1]:
            self.advanced = time.monotonic()
        points.append((time.monotonic(), done, share, spent_usd or 0.0))
        seconds, rows = points[-1][:2]
        # the later half: a change of speed shows soon, one slow row has little effect
        wanted = max(MEASURED_SECONDS, (seconds - points[0][0]) / 2)
        while self.window + 1 < len(points):
            later = points[self.window + 1]
            if seconds - later[0] < wanted or rows - later[1] < WINDOW_ROWS:
                break
            self.window += 1

    def measured(self) -> tuple[float, int, float, float] | None:
        """Seconds, rows, share and US dollars since the window began; None while they are too few."""
        if not self.points:
            return None
        now, then = self.points[-1], self.points[self.window]
        seconds, rows, share = now[0] - then[0], now[1] - then[1], now[2] - then[2]
        enough = seconds >= MEASURED_SECONDS and rows >= MEASURED_ROWS and share > 0
        return (seconds, rows, share, now[3] - then[3]) if enough else None

    def seconds_left(self) -> float | None:
        """Seconds left in the stage; None until its rate is measured."""
        found = self.measured()
        return found and (1 - self.points[-1][2]) * found[0] / found[2]

    def line(self) -> str:
        """$0.12 of about $1.40, 3.2/s (or 29 s each); no rate while no rows are being done."""
        found = self.measured()
        if found is None:
            return ""
        seconds, rows, _, dollars = found
        _, done, _, spent = self.points[-1]
        speed = f"{rows / seconds:.1f}/s" if rows > seconds / 2 else f"{format_duration(seconds / rows)} each"
        idle = self.points[-1][0] - self.advanced
        if idle > max(MEASURED_SECONDS, 3 * (seconds - idle) / rows):
            speed = ""
        in_total = spent + dollars / rows * (self.total - done)
        cost = f"${spent:.4f} of about ${in_total:.2f}" if spent else ""
        return ", ".join(filter(None, (cost, speed)))


class Countdown:
    """The displayed time left: it runs down with the clock, and is reset when it is off by more than a fifth."""

    end: float | None = None

    def update(self, estimate: float | None) -> None:
        """Take a new estimate of the seconds left; None is ignored."""
        now = time.monotonic()
        if estimate is None:
            return
        shown = None if self.end is None else self.end - now
        if shown is None or not 0.8 * shown - 2 <= estimate <= 1.2 * shown + 2:
            self.end = now + estimate

    def __str__(self) -> str:
        if self.end is None:
            return ESTIMATING
        return f"{format_duration(max(0.0, self.end - time.monotonic()))} left"


class ProgressDisplay:
    """Shows the progress of a command's stages; `plan` has their typical seconds, which are scaled to this machine."""

    def __init__(self, plan: Mapping[str, float] | None = None, quiet: bool = False):
        self.plan, self.quiet = dict(plan or {}), quiet
        self.finished: dict[str, float] = {}
        self.skipped: set[str] = set()
        self._bars: Bars | None = None
        self._rate, self.countdown = Rate(), Countdown()

    def seconds_left(self, stage: str, share: float) -> float | None:
        """Seconds left when `share` of a stage is done, with later stages if it is planned; None until the speed is known."""
        if stage not in self.plan:
            return self._rate.seconds_left()
        # this machine's speed comes from its finished stages, except SHORT ones, and from the rows of this one
        worked = [(self.plan.get(n, 0), took) for n, took in self.finished.items() if n not in self.skipped]
        worked = [(planned, took) for planned, took in worked if planned > SHORT]
        if (found := self._rate.measured()) is not None and self.plan[stage] > SHORT:
            worked.append((self.plan[stage] * found[2], found[0]))
        measured = sum(planned for planned, _ in worked)
        if measured < MEASURED_SHARE * sum(self.plan.values()):
            return None
        scale = sum(took for _, took in worked) / measured
        remaining = self._rate.seconds_left()
        later = list(self.plan)[list(self.plan).index(stage) + 1 :]
        left = scale * self.plan[stage] * (1 - share) if remaining is None else remaining
        return left + scale * sum(self.plan[name] for name in later if name not in self.finished)

    @contextmanager
    def stage(self, name: str, text: str) -> Iterator[Progress]:
        """Show a stage while it runs. Yields a callback `progress(done, total, spent_usd, share=, note=, warning=)`.

        `share` is the share of the work done, if rows differ in length. `note` holds current figures such as the
        loss. A `warning` is printed at once, on a line that stays.
        """
        planned, began = name in self.plan, time.monotonic()
        if planned and name not in self.finished:
            text = f"{list(self.plan).index(name) + 1}/{len(self.plan)} {text}"
        text, self._rate = visible(text), Rate()
        if not planned:
            self.countdown = Countdown()
        self.countdown.update(self.seconds_left(name, 0.0))

        def figures() -> str:
            """Most important first: a narrow terminal drops the last ones."""
            known = self._rate.total or self.countdown.end is not None
            speed, left = "" if planned else self._rate.line(), str(self.countdown) if known else ""
            return ", ".join(filter(None, (left, speed, self._rate.note)))

        if self.quiet:
            yield no_progress
        else:
            terminal = console.make_console(stderr=True)
            shown = self._bar(terminal, text, figures) if terminal.is_terminal else self._log(text, figures)
            with shown as (warn, show):

                def progress(
                    done: int,
                    total: int,
                    spent_usd: float | None = None,
                    *,
                    share: float | None = None,
                    note: str = "",
                    warning: str = "",
                ) -> None:
                    if warning:
                        warn(f"[yellow]warning:[/] {escape(warning)}")
                        return
                    share = done / max(1, total) if share is None else share
                    self._rate.update(done, share, spent_usd)
                    self._rate.total, self._rate.note = total, note
                    self.countdown.update(self.seconds_left(name, share))
                    if total:
                        show(done, total)

                yield progress
        self.finished[name] = time.monotonic() - began

    @contextmanager
    def _bar(self, terminal: "Console", text: str, figures: Callable[[], str]) -> Iterator[Shown]:
        """Yield (print a warning, show progress) for a live line of the terminal, whose clock and spinner keep moving."""
        from rich import progress as rich
        from rich.text import Text

        bar_width, text = (24, text) if terminal.width >= WIDE else (10, text.partition(":")[0])

        class Figures(rich.ProgressColumn):
            def render(self, task: rich.Task) -> Text:
                used = len(text) + bar_width + len(task.fields["count"]) + len("⠋     0:00:00 ")
                shown = visible(figures())
                while shown and len(shown) > terminal.width - used:
                    shown = shown.rpartition(", ")[0]
                return Text(shown, "dim", no_wrap=True)

        name = rich.TextColumn("{task.description}", markup=False)
        count, clock = rich.TextColumn("{task.fields[count]}"), rich.TimeElapsedColumn()
        columns = (rich.SpinnerColumn(), name, rich.BarColumn(bar_width), count, clock, Figures())
        with rich.Progress(*columns, console=terminal, transient=True) as bars:
            self._bars = bars
            task = bars.add_task(text, total=None, count="")

            def show(done: int, total: int) -> None:
                bars.update(task, completed=done, total=total, count=f"{done}/{total}")

            yield partial(console.print, console=terminal), show
        self._bars = None

    @contextmanager
    def _log(self, text: str, figures: Callable[[], str]) -> Iterator[Shown]:
        """Yield (print a warning, show progress) for a log: a heading, then a line every LOG_SECONDS, even without progress."""
        lock, ended, began = threading.Lock(), threading.Event(), time.monotonic()
        heading = text if self.countdown.end is None else f"{text} (about {self.countdown} in total)"
        counted = ""

        def note(line: str = "") -> None:
            nonlocal heading
            with lock:  # held until it is printed, so that it precedes the output of the next stage
                for each in (escape(heading), line):
                    if each and not ended.is_set():
                        console.note(each)
                heading = ""

        def show(done: int, total: int) -> None:
            nonlocal counted
            counted = f"{done} of {total} "

        def tick() -> None:
            if ended.wait(HEADING_DELAY):
                return
            note()
            while not ended.wait(LOG_SECONDS):
                so_far = f"{format_duration(time.monotonic() - began)} so far, "
                shown = figures() if self._rate.measured() else so_far + figures()
                note(escape(f"  {counted}{shown}".rstrip(", ")))

        threading.Thread(target=tick, daemon=True).start()
        try:
            yield note, show
        finally:
            with lock:
                ended.set()

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
        if self._bars is not None:
            self._bars.stop()
        sys.stderr.write(f"{question} [y/N] ")
        sys.stderr.flush()
        asked = time.monotonic()
        reply = console.read_line().strip().lower()
        self._rate = Rate()  # the time spent on the question does not count
        if self.countdown.end is not None:
            self.countdown.end += time.monotonic() - asked
        if self._bars is not None:
            self._bars.start()
        return reply in ("y", "yes")

    def done(self, name: str, text: str, skipped: bool = False) -> None:
        """Print the closing line of a stage. The time of a skipped one is not used for the time left."""
        if skipped:
            self.skipped.add(name)
        if not self.quiet:
            suffix = "· up to date, skipped" if skipped else format_duration(self.finished.get(name, 0.0))
            console.note(f"[green]✓[/] {escape(text)} [dim]{suffix}[/]")
