"""The terminal: the only module that prints. Results go to stdout, progress and faults to stderr."""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

from sclite.errors import ScliteError

Progress = Callable[..., None]
WIDE = 125  # columns that a line of progress takes with all its words
LOG_SECONDS = 30.0  # between two lines of progress where there is no terminal
MOMENT = 0.5  # seconds; a stage that ends within them has its closing line alone


def print_json(value: Any) -> None:
    """One object on stdout, nothing else there."""
    sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def print_json_rows(head: Mapping[str, Any], rows: Iterable[Any]) -> None:
    """One object on stdout, `head` and then "rows", each written as it is read."""

    def texts() -> Iterator[str]:
        yield json.dumps(head, ensure_ascii=False)[:-1] + ', "rows": ['
        for number, row in enumerate(rows):
            yield (",\n " if number else "\n ") + json.dumps(row, ensure_ascii=False)
        yield "\n]}\n"

    _write(texts(), sys.stdout)


def plain(text: str) -> str:
    """Text whose brackets are no markup."""
    from rich.markup import escape

    return escape(text)


def say(text: str = "") -> None:
    """A line of the result, with rich markup."""
    from rich.console import Console

    _print(Console(highlight=False), text)


def _print(console: Any, text: str) -> None:
    """A line, in a terminal wrapped at words; with a command in it as it is, since that is copied from there."""
    console.print(text, soft_wrap=not console.is_terminal or "cyan]" in text)


def page(pieces: Iterable[Any]) -> None:
    """Show a long result, in pieces of rich Text: through $PAGER (else `less -R`) in a terminal, plain where it is piped.

    A piece is made when the reader comes to it, so that the first stands there at once however many follow.
    """
    from rich.console import Console

    console = Console(highlight=False)
    texts = (_drawn(console, piece) for piece in pieces)
    with _pager() if console.is_terminal else nullcontext() as pager:
        _write(texts, pager or sys.stdout)


def _write(texts: Iterable[str], file: Any) -> None:
    """Write texts until the last one, or until the reader has seen enough."""
    try:
        for text in texts:
            file.write(text)
        file.flush()
    except BrokenPipeError:
        if file is sys.stdout:  # Python flushes it once more at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def _drawn(console: Any, piece: Any) -> str:
    if not console.is_terminal:
        return piece.plain
    with console.capture() as captured:
        console.print(piece, end="")
    return captured.get()


@contextmanager
def _pager() -> Iterator[Any]:
    """The input of the reader's pager, None where there is none; left when the reader leaves it."""
    import shlex
    import signal
    import subprocess

    command = shlex.split(os.environ.get("PAGER", "")) or ["less", "-R"]
    environment = {"LESS": "-R", **os.environ}
    try:
        pager = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, text=True, encoding="utf-8")
    except OSError:
        yield None
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the pager
    try:
        yield pager.stdin
    finally:
        with suppress(BrokenPipeError):
            pager.stdin.close()
        pager.wait()
        signal.signal(signal.SIGINT, before)


def note(text: str) -> None:
    """A line beside the result."""
    from rich.console import Console

    _print(Console(stderr=True, highlight=False), text)


def fault(error: ScliteError) -> None:
    """What is wrong and what to do, each in a line on stderr."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(stderr=True, highlight=False)
    _print(console, f"[bold red]error:[/] {escape(error.message)}")
    if error.hint:
        _print(console, f"[cyan]try:[/] {escape(error.hint)}")


def lines(invitation: str) -> Iterator[str]:
    """What the user types, line by line, up to an empty one or the end of the input; empty lines of a pipe are skipped."""
    interactive = sys.stdin.isatty()
    if interactive:
        note(invitation)
    while True:
        if interactive:
            sys.stderr.write("\n> ")
            sys.stderr.flush()
        read = _read_line()
        if not read or (interactive and not read.strip()):
            return
        if read.strip():
            yield read.strip()


def _read_line() -> str:
    """A line of stdin; bytes that are no UTF-8 become replacement characters, which any output can hold."""
    return sys.stdin.readline().encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def duration(seconds: float) -> str:
    """3 s, 2 min 10 s, 1 h 5 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


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

    def tell(self, done: int, spent_usd: float | None) -> None:
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
        return f"{rows / seconds:.1f}/s, {money}{duration(left * seconds / rows)} left"


class Screen:
    """Progress over the stages of a command.

    `plan` maps stages to their usual seconds on a common machine; what they take here scales the time that is left.
    """

    def __init__(self, plan: Mapping[str, float] | None = None, quiet: bool = False):
        self.plan, self.quiet = dict(plan or {}), quiet
        self.finished: dict[str, float] = {}
        self.skipped: set[str] = set()
        self._bars: Any = None
        self._rate = Rate()

    def left(self, stage: str, share: float) -> float | None:
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
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bars

        console = Console(stderr=True, highlight=False)
        rate = self._rate = Rate()
        if not console.is_terminal:
            left = self.left(name, 0.0)
            told = f"{text}{f' (about {duration(left)} left in all)' if left else ''}"
            with _heading(lambda: console.print(told, soft_wrap=True)) as head:
                yield self._lines(rate, head, silent=left is not None)
            return
        wide = console.width >= WIDE
        columns = (
            TextColumn("{task.description}"),
            BarColumn(24 if wide else 10),
            MofNCompleteColumn(),
            TextColumn("[dim]{task.fields[left]}"),
        )
        shown = text if wide else text.partition(":")[0]
        with Bars(*columns, console=console, transient=True) as self._bars:
            task = self._bars.add_task(shown, total=None, left="")

            def progress(
                done: int, total: int, spent_usd: float | None = None, *, note: str = "", warning: str = ""
            ) -> None:
                if warning:
                    _print(console, f"[yellow]warning:[/] {plain(warning)}")
                    return
                rate.tell(done, spent_usd)
                seconds = self.left(name, done / max(1, total))
                told = rate.line(total) if seconds is None else f"{duration(seconds)} left"
                room = console.width - len(shown) - (24 if wide else 10) - 2 * len(str(total)) - 5
                self._bars.update(task, completed=done, total=total, left=fitted(_joined(note, told), room))

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
                write(f"[yellow]warning:[/] {plain(warning)}")
                return
            rate.tell(done, spent_usd)
            if not silent and time.monotonic() - told >= LOG_SECONDS:
                told = time.monotonic()
                head()
                write(f"  {done} of {total} {_joined(note, rate.line(total))}")

        return progress

    def tell(self, text: str) -> None:
        """A line beside the result, between two stages."""
        if not self.quiet:
            note(plain(text))

    def confirm(self, question: str) -> bool:
        """Ask yes or no on the terminal; the bar pauses. Yes where there is no terminal to ask on."""
        if self.quiet or not (sys.stdin.isatty() and sys.stderr.isatty()):
            return True
        if self._bars is not None:
            self._bars.stop()
        sys.stderr.write(f"{question} [y/N] ")
        sys.stderr.flush()
        said = _read_line().strip().lower()
        self._rate.restart()
        if self._bars is not None:
            self._bars.start()
        return said in ("y", "yes")

    def done(self, name: str, text: str, skipped: bool = False) -> None:
        """One line for a finished stage; one that was skipped tells nothing of how fast this machine is."""
        if skipped:
            self.skipped.add(name)
        if not self.quiet:
            seconds = "as it was" if skipped else duration(self.finished.get(name, 0.0))
            note(f"[green]✓[/] {text} [dim]{seconds}[/]")


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

    timer = threading.Timer(MOMENT, head)
    timer.daemon = True
    timer.start()
    try:
        yield head
    finally:
        timer.cancel()


def fitted(figures: str, room: int) -> str:
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


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> None:
    """A table on stdout; the first `texts` columns are text, the others are numbers.

    Where it is wider than the terminal the last of several text columns wraps; else, where it would be narrower on its
    side, it lies on its side.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    lying = [list(line) for line in zip(header, *rows, strict=True)]
    if texts == 1 and console.width < _width([header, *rows]) > _width(lying):
        header, rows = lying[0], lying[1:]
    made = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for i, name in enumerate(header):
        made.add_column(name, justify="left" if i < texts else "right", no_wrap=not 0 < i == texts - 1)
    for row in rows:
        made.add_row(*row)
    console.print(made)


def _width(lines: Sequence[Sequence[str]]) -> int:
    """Columns of the terminal that a table of these lines takes, with two blanks beside each cell."""
    return sum(2 + max(map(len, column)) for column in zip(*lines, strict=True)) + len(lines[0]) + 1


def percent(value: float | None, interval: Sequence[float] | None = None) -> str:
    """71.3 [66.2, 76.4]; a dash where it is unknown."""
    if value is None:
        return "–"
    bounds = f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else ""
    return f"{100 * value:.1f}{bounds}"
