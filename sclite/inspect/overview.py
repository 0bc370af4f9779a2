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
from sclite.inspect.status import DONE, NOT_BEGUN, read_status
from sclite.inspect.tables import STATES
from sclite.run import Run
from sclite.settings import RUN_FILE, load
from sclite.student.adapters import STUDENTS


def print_runs(folder: Path, as_json: bool) -> None:
    """Print the runs in `folder`: student, last stage, accuracies of the newest evaluation, size.

    The stage is the last one that has begun; the accuracies are those of the student that was trained last. As JSON:
    {"runs": [{"run", "student", "stage", "state", "acc_t1", "acc_t2", "n", "bytes", "error"}]}. Raises DataError if there
    is no run.
    """
    found: list[dict[str, Any]] = []
    for path in sorted(each.parent for each in folder.glob(f"*/{RUN_FILE}")):
        unknown = dict.fromkeys(("stage", "state", "acc_t1", "acc_t2", "n"))
        row: dict[str, Any] = {"run": str(path), "student": "", **unknown, "error": ""}
        row["bytes"] = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        try:
            config = load(None, [f"run={path}"], {}, own_file=False)
            row["student"] = config.student.model
            stages = read_status(config, Run(path))["stages"]
            begun = [name for name in stages if stages[name]["state"] != NOT_BEGUN]
            row |= {"stage": begun[-1], "state": stages[begun[-1]]["state"]} if begun else {}
        except ScliteError as error:  # one damaged run does not hide the others
            row["error"] = error.message
        if evaluated := summaries(Run(path)):
            models = evaluated[0]["models"]
            last = models[max(models, key=lambda name: STUDENTS.index(name) if name in STUDENTS else -1)]
            row |= {name: last.get(name) for name in ("acc_t1", "acc_t2", "n")}
        found.append(row)
    if not found:
        hint = "name the folder that holds your runs, as in `sclite runs FOLDER`"
        raise DataError(f"{folder} holds no run", hint)
    if as_json:
        console.print_json({"runs": found})
        return
    lines = []
    for row in found:
        state = "" if row["state"] in (DONE, None) else f" {STATES[row['state']]}"
        stage = escape(row["error"]) or f"{row['stage'] or 'not started'}{state}"
        figures = (format_percent(row["acc_t1"]), format_percent(row["acc_t2"]), f"{row['bytes'] / 1e9:.2f}")
        lines.append((escape(Path(row["run"]).name), escape(row["student"]), stage, *figures))
    header = ("run", "student", "last stage", "first answer %", "after review %", "GB")
    console.print_table(str(folder), header, lines, texts=3)


def show_report(run: Run, as_json: bool) -> None:
    """Open the HTML report of the newest evaluation in a browser; print its path without a display, or as JSON.

    Raises DataError if there is none.
    """
    paths = [path.with_name(REPORT) for path in run.folder.glob(f"eval/*/{SUMMARY}")]
    paths = [path for path in paths if path.is_file()]
    if not paths:
        raise DataError(f"{run.folder} has no evaluation", "run `sclite eval PROBLEMS` first")
    path = max(paths, key=lambda path: path.stat().st_mtime)
    display = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if as_json:
        console.print_json({"report": str(path)})
    elif (display or not sys.platform.startswith("linux")) and webbrowser.open(path.resolve().as_uri()):
        console.note(f"opened {escape(str(path))}")
    else:
        console.print(escape(str(path)), wrap=False)
