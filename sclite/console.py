"""The terminal: results on stdout, errors and notes on stderr. Only this module and `progress` print."""

import io
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

from sclite.errors import ScliteError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

OUTPUT = "standard output"  # the file name of an OSError on stdout
_C0, _C1 = r"\x00-\x08\x0b-\x1f", r"\x7f-\x9f"  # all but newline and tab; C1 includes DEL here
_CONTROLS = re.compile(rf"[{_C0}{_C1}\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that could control the terminal, including bidirectional controls and lone surrogates."""


def visible(text: str) -> str:
    """The text with control characters replaced by their pictures (␛) or by U+FFFD: replies may contain any character."""
    text = re.sub(f"[{_C1}]", "\u2421", text.replace("\r\n", "\n"))
    text = re.sub(f"[{_C0}]", lambda control: chr(0x2400 + ord(control[0])), text)
    return _CONTROLS.sub("\ufffd", text)


# -- stdout and stderr ---------------------------------------------------------------------------------------------


class _Output(io.TextIOWrapper):
    """stdout whose errors carry the file name OUTPUT, to distinguish them from errors of other files."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            raise OSError(error.errno, error.strerror, OUTPUT) from error

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, OUTPUT) from error


def prepare_streams() -> None:
    """Make it safe to print characters that stdout cannot encode, and to read any bytes."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout is sys.__stdout__:
        encoding, terminal = sys.stdout.encoding, sys.stdout.isatty()
        sys.stdout = _Output(sys.stdout.detach(), encoding, errors="replace", line_buffering=terminal)


def make_console(stderr: bool = False) -> "Console":
    """A rich console without automatic highlighting or emoji codes; a closed pipe raises BrokenPipeError."""
    from rich.console import Console

    class Terminal(Console):
        def on_broken_pipe(self) -> None:
            raise

    return Terminal(stderr=stderr, highlight=False, emoji=False)


def escape(text: str) -> str:
    """Text with its brackets escaped, so that rich does not read them as markup."""
    from rich import markup

    return markup.escape(text)


def print(text: str = "", wrap: bool = True, stderr: bool = False) -> None:
    """Print rich markup. With `wrap` lines break between words that fit a terminal."""
    console, text = make_console(stderr), visible(text)
    fits = max(map(len, text.split()), default=0) <= console.width
    console.print(text, soft_wrap=not (wrap and fits and console.is_terminal))


def note(text: str, wrap: bool = True) -> None:
    print(text, wrap, stderr=True)


def error(error: ScliteError, as_json: bool = False) -> None:
    """Print an error (or that the user declined) and its hint to stderr; with `as_json` also one object to stdout."""
    word = "error" if error.code else "stopped"
    if as_json:
        print_json({word: error.message, "hint": error.hint, "exit_code": error.code, **error.details})
    note(f"[bold red]error:[/] {escape(error.message)}" if error.code else escape(error.message))
    if error.hint:
        note(f"[cyan]try:[/] {escape(error.hint)}", wrap="`" not in error.hint)


def spinner(text: str) -> AbstractContextManager[object]:
    """A spinner on stderr while something is loading; shows nothing without a terminal."""
    return make_console(stderr=True).status(escape(text))


# -- JSON and pages ------------------------------------------------------------------------------------------------


def print_json(value: Any, line: bool = False) -> None:
    """Print one JSON object to stdout; with `line` as one line, at once."""
    ascii_only = "utf" not in (sys.stdout.encoding or "").lower()
    text = json.dumps(value, indent=None if line else 1, ensure_ascii=ascii_only)
    sys.stdout.write(_CONTROLS.sub(lambda control: f"\\u{ord(control[0]):04x}", text) + "\n")
    if line:
        sys.stdout.flush()


def page(pieces: Iterable["Text"]) -> None:
    """Show a long result: through $PAGER (default: less) in a terminal, as plain text in a pipe."""
    console = make_console()
    terminal = console.is_terminal
    os.environ.pop("MANPAGER", None)  # rich would prefer it
    os.environ.setdefault("LESS", "-RFX")  # F: exit at once if it fits on one screen
    with console.pager(styles=True) if terminal else nullcontext():
        for piece in pieces:
            console.print(piece, end="", soft_wrap=not terminal)


def is_interactive() -> bool:
    """Whether a user can be asked: stdin and stderr are terminals."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()


# -- tables and numbers --------------------------------------------------------------------------------------------


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> None:
    """Print a table to stdout: first `texts` columns of text, then numbers. The last text column wraps unless it is the first.

    Cells are rich markup. A table with one text column that is wider than the terminal is transposed if that makes it
    narrower.
    """
    from rich import box
    from rich.table import Table

    def make_table(header: Sequence[str], *rows: Sequence[str]) -> Table:
        heading = escape(visible(title))
        table = Table(title=heading, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
        for i, name in enumerate(header):
            side: Literal["left", "right"] = "left" if i < texts else "right"
            table.add_column(name, justify=side, no_wrap=i == 0 or i != texts - 1, overflow="fold")
        for row in rows:
            table.add_row(*map(visible, row))
        return table

    console = make_console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 120
    table = make_table(header, *rows)
    if texts == 1:
        unlimited = console.options.update(width=10_000)
        both = (table, make_table(*zip(header, *rows, strict=True)))
        width, transposed = (console.measure(each, options=unlimited).maximum for each in both)
        table = both[console.width < width > transposed]
    console.print(table)


def format_duration(seconds: float) -> str:
    """3 s, 2 min 10 s, 1 h 5 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


def format_percent(value: float | None, interval: Sequence[float] | None = None) -> str:
    """71.3 [66.2, 76.4]; a dash if unknown."""
    if value is None:
        return "–"
    bounds = f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else ""
    return f"{100 * value:.1f}{bounds}"
