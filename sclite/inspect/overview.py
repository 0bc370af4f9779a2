"""`sclite runs` and `sclite report`: what a folder of runs holds, and the report of the newest evaluation."""

import os
import sys
import webbrowser
from pathlib import Path
from typing import Any

from sclite import console
from sclite.console import escape, format_percent
from sclite.errors import DataError, ScliteError
from sclite.evaluate.results import REPORT, SUMMARY, summaries
from sclite.inspect.status import DONE, read_status
from sclite.run import Run
from sclite.settings import RUN_FILE, load


def list_runs(folder: Path) -> list[dict[str, Any]]:
    """The runs in `folder` by name: {"run", "student", "stage", "acc_t1", "acc_t2", "n", "bytes", "error"}.

    "stage" is the last finished one. The accuracies are shares of the newest evaluation's n problems, of the student
    that was trained last. Raises DataError if there is no run.
    """
    found: list[dict[str, Any]] = []
    for path in sorted(each.parent for each in folder.glob(f"*/{RUN_FILE}")):
        row: dict[str, Any] = {"run": str(path), "student": "", "stage": None, "error": ""}
        row |= {"acc_t1": None, "acc_t2": None, "n": None}
        row["bytes"] = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        try:
            config = load(None, [f"run={path}"], {}, own_file=False)
            row["student"] = config.student.model
            stages = read_status(config, Run(path))["stages"]
            row["stage"] = next((name for name in reversed(stages) if stages[name]["state"] == DONE), None)
        except ScliteError as error:  # one damaged run does not hide the others
            row["error"] = error.message
        if evaluated := summaries(Run(path)):
            last = list(evaluated[0]["models"].values())[-1]
            row |= {name: last.get(name) for name in ("acc_t1", "acc_t2", "n")}
        found.append(row)
    if not found:
        raise DataError(
            f"{folder} holds no run", "name the folder that holds your runs, as in `sclite runs FOLDER`"
        )
    return found


def print_runs(folder: Path, found: list[dict[str, Any]], as_json: bool) -> None:
    """Print what `list_runs` returns."""
    if as_json:
        console.print_json({"runs": found})
        return
    lines = [
        (
            escape(Path(row["run"]).name),
            escape(row["student"]),
            escape(row["error"] or row["stage"] or "not started"),
            format_percent(row["acc_t1"]),
            format_percent(row["acc_t2"]),
            f"{row['bytes'] / 1e9:.2f}",
        )
        for row in found
    ]
    header = ("run", "student", "last stage", "first answer %", "after review %", "GB")
    console.print_table(str(folder), header, lines, texts=3)


def find_report(run: Run) -> Path:
    """The HTML report of the newest evaluation. Raises DataError if there is none."""
    paths = [path.with_name(REPORT) for path in run.folder.glob(f"eval/*/{SUMMARY}")]
    paths = [path for path in paths if path.is_file()]
    if not paths:
        raise DataError(f"{run.folder} has no evaluation", "run `sclite eval PROBLEMS` first")
    return max(paths, key=lambda path: path.stat().st_mtime)


def open_in_browser(path: Path) -> bool:
    """Open a file in a browser; False without a display or a browser."""
    if sys.platform.startswith("linux") and not (
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    ):
        return False
    return webbrowser.open(path.resolve().as_uri())
