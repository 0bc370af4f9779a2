"""Start-up: the time of `sclite --help` against the help of an empty Typer app with as many commands.

    python tests/benchmarks/bench_help.py [RUNS]

Prints both medians in milliseconds, over alternating runs, and their ratio; DESIGN asks for at most 1.25.
"""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EMPTY = """
from pathlib import Path
from typing import Annotated
import typer
app = typer.Typer(name="empty", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  rich_markup_mode=None, help="An empty app.")
def make(number):
    def command(value: Annotated[str, typer.Option(help="A value.")] = "") -> None:
        "Do nothing."
    app.command(f"command-{number}")(command)
for number in range(COUNT):
    make(number)
app(["--help"])
"""


def seconds(command: list[str]) -> float:
    """Wall time of one process, its output thrown away."""
    began = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    """Measure and print."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # measured as installed, with its bytecode
    listing = "import typer; from sclite.cli import app; print(len(typer.main.get_command(app).commands))"
    count = int(subprocess.check_output([sys.executable, "-c", listing], cwd=ROOT, text=True))
    empty = [sys.executable, "-c", EMPTY.replace("COUNT", str(count))]
    ours = [sys.executable, "-m", "sclite", "--help"]
    seconds(ours), seconds(empty)  # bytecode and file cache
    pairs = [(seconds(ours), seconds(empty)) for _ in range(runs)]
    mine, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"sclite --help        {1000 * mine:7.1f} ms   median of {runs}")
    print(f"empty app, {count:2} commands {1000 * theirs:6.1f} ms")
    print(f"ratio                {mine / theirs:7.2f}      (at most 1.25)")


if __name__ == "__main__":
    main()
