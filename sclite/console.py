"""The terminal: results go to stdout, errors and notes to stderr; progress is in `screen`. Nothing else prints.

Replies, problems and file names may hold anything: `visible` keeps their control characters from the terminal.
"""

import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

from sclite.errors import ScliteError

_CONTROLS = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Terminal controls (C0 except newline and tab, DEL, C1), bidirectional controls, and lone surrogates."""


def visible(text: str) -> str:
    """The text with a picture or a replacement character for each control character."""

    def picture(control: re.Match[str]) -> str:
        code = ord(control[0])
        return chr(0x2400 + code) if code < 0x20 else "\u2421" if code < 0xA0 else "\ufffd"

    return _CONTROLS.sub(picture, text.replace("\r\n", "\n"))


OUTPUT = "the output"


class _Output(io.TextIOWrapper):
    """stdout whose errors say that they are of stdout."""

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
    """Let every text be printed: to a closed stdout, and to a terminal that cannot show all characters."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
        pass  # a closed one, which else the next file that is opened would take
    os.close(descriptor)
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - as long as the process
    if sys.stdout is sys.__stdout__:
        encoding = sys.stdout.encoding if sys.stdout else "utf-8"
        binary = sys.stdout.detach() if sys.stdout else open(1, "wb", closefd=False)  # noqa: SIM115
        sys.stdout = _Output(binary, encoding, errors="replace", line_buffering=binary.isatty())


def discard_output() -> None:
    """Drop what is still to be written to stdout: Python would try once more at its end."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_json(value: Any) -> None:
    """One object on stdout, nothing else there."""
    sys.stdout.write(_json(value, indent=1) + "\n")


def _json(value: Any, indent: int | None = None) -> str:
    plain_text = "utf" not in (sys.stdout.encoding or "").lower()
    text = json.dumps(value, indent=indent, ensure_ascii=plain_text)
    return _CONTROLS.sub(lambda control: f"\\u{ord(control[0]):04x}", text)


def print_json_rows(head: Mapping[str, Any], rows: Iterable[Any]) -> None:
    """One object on stdout, `head` and then "rows"; nothing is written before the last row could be read."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
        file.write(_json(head)[:-1] + ', "rows": [')
        for number, row in enumerate(rows):
            file.write((",\n " if number else "\n ") + _json(row))
        file.write("\n]}\n")
        file.seek(0)
        _write(file, sys.stdout)


def plain(text: str) -> str:
    """Text whose brackets are no markup."""
    from rich.markup import escape

    return escape(text)


def say(text: str = "", whole: bool = False) -> None:
    """A line of the result, with rich markup; with `whole` it is never wrapped, for what is copied from there."""
    put(terminal(), text, whole)


def terminal(stderr: bool = False) -> Any:
    """A console of rich that colours what its caller says, and nothing of its own accord."""
    from rich.console import Console

    def fail() -> None:
        raise

    console = Console(stderr=stderr, highlight=False, emoji=False)
    console.on_broken_pipe = fail
    return console


def put(console: Any, text: str, whole: bool = False) -> None:
    """A text with markup; in a terminal its lines wrap between words, and no path or name is broken."""
    from rich.text import Text

    text = visible(text)
    if whole or not console.is_terminal:
        console.print(text, soft_wrap=True)
        return
    for line in Text.from_markup(text, emoji=False).split("\n", allow_blank=True):
        for part in line.divide(_wraps(line.plain, console.width)):
            part.rstrip()
            console.print(part, soft_wrap=True)


def _wraps(text: str, width: int) -> list[int]:
    """Where the words begin that go to a line of their own."""
    from rich.cells import cell_len

    begins, column = [], cell_len(text[: len(text) - len(text.lstrip())])
    for word in re.finditer(r"\S+\s*", text):
        if column and column + cell_len(word[0].rstrip()) > width:
            begins.append(word.start())
            column = 0
        column += cell_len(word[0])
    return begins


def page(pieces: Iterable[Any]) -> None:
    """Show a long result, in pieces of rich Text: through $PAGER (else `less`) in a terminal, plain where it is piped.

    A piece is made when the reader comes to it, so that the first stands there at once however many follow.
    """
    console = terminal()
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
        if file is sys.stdout:
            discard_output()


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

    command = shlex.split(os.environ.get("PAGER", "")) or ["less"]
    environment = {"LESS": "-RFX", **os.environ}  # one screenful ends by itself
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
    put(terminal(stderr=True), text)


def error(error: ScliteError, as_json: bool = False) -> None:
    """What is wrong and what to do, on stderr; with `as_json` also as the one object on stdout."""
    if as_json:
        print_json({"error": error.message, "hint": error.hint, "exit_code": error.code, **error.details})
    note(f"[bold red]error:[/] {plain(error.message)}")
    if error.hint:
        put(terminal(stderr=True), f"[cyan]try:[/] {plain(error.hint)}", whole="`" in error.hint)


def interactive() -> bool:
    """Whether somebody sits at a terminal to type and to read."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()


def inputs(invitation: str) -> Iterator[str]:
    """What the user types or pastes, until Ctrl-D or one of LEAVE; without a terminal each line of stdin.

    A paste is one input, however many lines and empty lines it has. Empty inputs are skipped. Ctrl-C clears the line.
    """
    if not interactive():
        while line := read_line():
            if line.strip():
                yield line.strip()
        return
    from prompt_toolkit import PromptSession
    from prompt_toolkit.output import create_output

    note(invitation)
    session: PromptSession[str] = PromptSession("> ", output=create_output(sys.stderr))
    while True:
        try:
            typed = session.prompt().strip()
        except KeyboardInterrupt:
            note("[dim]/bye or Ctrl-D leaves[/]")
            continue
        except EOFError:
            return
        if typed in LEAVE:
            return
        if typed:
            yield typed


LEAVE = ("/bye", "exit", "quit")


def read_line() -> str:
    """A line of stdin, "" at its end; bytes that are no UTF-8 become replacement characters, which any output can hold."""
    if sys.stdin is None:  # closed by who has started this process
        return ""
    return sys.stdin.readline().encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def duration(seconds: float) -> str:
    """3 s, 2 min 10 s, 1 h 5 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> None:
    """A table on stdout; the first `texts` columns are text, the others are numbers.

    Where it is wider than the terminal the last of several text columns wraps; else, where it would be narrower on its
    side, it lies on its side.
    """
    from rich import box
    from rich.table import Table

    console = terminal()
    rows = [[visible(cell) for cell in row] for row in rows]
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 120
    lying = [list(line) for line in zip(header, *rows, strict=True)]
    if texts == 1 and console.width < _width([header, *rows]) > _width(lying):
        header, rows = lying[0], lying[1:]
    made = Table(title=plain(visible(title)), box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for i, name in enumerate(header):
        made.add_column(
            name, justify="left" if i < texts else "right", no_wrap=not 0 < i == texts - 1, overflow="fold"
        )
    for row in rows:
        made.add_row(*row)
    if console.is_terminal:
        console.print(made)
        return
    with console.capture() as captured:
        console.print(made)
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))


def _width(lines: Sequence[Sequence[str]]) -> int:
    """Columns of the terminal that a table of these lines takes, with two blanks beside each cell."""
    return sum(2 + max(map(len, column)) for column in zip(*lines, strict=True)) + len(lines[0]) + 1


def percent(value: float | None, interval: Sequence[float] | None = None) -> str:
    """71.3 [66.2, 76.4]; a dash where it is unknown."""
    if value is None:
        return "–"
    bounds = f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else ""
    return f"{100 * value:.1f}{bounds}"
