"""Writes chat.svg, the picture in README.md, from a real chat: python docs/picture.py QUESTION [OPTION OF sclite chat ..]

The chat runs under a pseudo-terminal, so the picture shows what a user sees at the end of an answer.
"""

import fcntl
import os
import pty
import re
import shlex
import struct
import sys
import termios
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.text import Text

PICTURE = Path(__file__).with_name("chat.svg")
WIDTH, HEIGHT = 92, 50
CONTROL = re.compile(r"(\x1b\[[0-9;?]*[A-Za-z]|\n)")


def record(command: list[str]) -> str:
    """What a command sends to a terminal of WIDTH x HEIGHT."""
    pid, terminal = pty.fork()
    if pid == 0:
        kept = {
            name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "CI")
        }
        os.execvpe(command[0], command, {**kept, "TERM": "xterm-256color", "COLORTERM": "truecolor"})
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", HEIGHT, WIDTH, 0, 0))
    sent = b""
    with suppress(OSError):  # EIO when the command exits
        while piece := os.read(terminal, 4096):
            sent += piece
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        sys.exit(f"{shlex.join(command)} failed:\n{sent.decode()}")
    return sent.decode()


def last_screen(sent: str) -> list[str]:
    """The lines that are left at the end, with their colors.

    rich's Live moves up and erases each line before it writes it again; nothing else is understood here.
    """
    lines, row = [""], 0
    for piece in CONTROL.split(sent.replace("\r", "")):
        if piece == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif re.fullmatch(r"\x1b\[\d*A", piece):
            row -= int(piece[2:-1] or 1)
        elif re.fullmatch(r"\x1b\[\d*K", piece):
            lines[row] = ""
        elif not CONTROL.fullmatch(piece) or piece.endswith("m"):
            lines[row] += piece
    return lines


def main() -> None:
    question, *options = sys.argv[1:]
    command = ["sclite", "chat", "--self-correct", *options, question]
    screen = Console(record=True, width=WIDTH, file=open(os.devnull, "w"))  # noqa: SIM115
    screen.print(Text.assemble(("$ ", "bold green"), f'sclite chat --self-correct "{question}"'))
    for line in last_screen(record(command)):
        screen.print(Text.from_ansi(line))
    PICTURE.write_text(screen.export_svg(title="sclite chat"), encoding="utf-8")


if __name__ == "__main__":
    main()
