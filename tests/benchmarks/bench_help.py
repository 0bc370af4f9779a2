"""Start-up: the time of `sclite --help` and of each command's, against an empty Typer app with the same commands and options.

    python tests/benchmarks/bench_help.py [RUNS]

Prints both medians in milliseconds, over alternating runs, and their ratio; DESIGN asks for at most 1.25.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LISTING = """
import json, typer
from sclite.cli import app
commands = typer.main.get_command(app).commands.items()
print(json.dumps({name: [max(given.opts, key=len) for given in command.params] for name, command in commands}))
"""
EMPTY = """
from pathlib import Path
from typing import Annotated
import typer
app = typer.Typer(name="empty", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  rich_markup_mode=None, help="An empty app.")
for name, options in COMMANDS.items():
    given = ", ".join(
        f"value{number}: Annotated[str, typer.Option({option!r}, help='A value.')] = ''"
        if option.startswith("--") else f"value{number}: Annotated[str, typer.Argument(help='A value.')] = ''"
        for number, option in enumerate(options)
    )
    exec(f"def command({given}) -> None:\\n    'Do nothing.'")
    app.command(name)(command)
app()
"""


def seconds(command: list[str]) -> float:
    """Wall time of one process, with its output discarded."""
    began = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    """Measure and print."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # measured as installed, with its bytecode
    commands = json.loads(subprocess.check_output([sys.executable, "-c", LISTING], cwd=ROOT, text=True))
    empty = [sys.executable, "-c", EMPTY.replace("COMMANDS", repr(commands))]
    print(f"{'':22} sclite, ms   empty app, ms   ratio (at most 1.25)")
    for name in ("", *commands):
        given = [*filter(None, [name]), "--help"]
        ours, theirs = [sys.executable, "-m", "sclite", *given], [*empty, *given]
        seconds(ours), seconds(theirs)  # bytecode and file cache
        pairs = [(seconds(ours), seconds(theirs)) for _ in range(runs)]
        mine, other = (1000 * statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"{' '.join(given):22} {mine:10.1f}   {other:13.1f}   {mine / other:5.2f}", flush=True)


if __name__ == "__main__":
    main()
