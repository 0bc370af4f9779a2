"""The commands that inspect a run: status, show, report and runs."""

import os
import sys
import webbrowser
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from sclite import console
from sclite.console import escape, format_percent
from sclite.errors import DataError, ScliteError, UsageError
from sclite.options import Common, JsonOption, common_options

STATES = {
    "done": "[green]done[/]",
    "stale": "[yellow]stale[/]",
    "half_way": "[yellow]incomplete[/]",
    "not_begun": "[dim]not started[/]",
}


@common_options
def status(*, common: Common) -> None:
    """Show the progress of a run, its cost and the next command."""
    from sclite.inspect.status import read_status
    from sclite.run import Run

    config = common.of_existing_run().load()
    with console.spinner("checking the stages"):
        found = read_status(config, Run(config.run))
    if common.json:
        console.print_json(found)
        return
    lines = []
    for name, stage in found["stages"].items():
        total = f" of {stage['total']:,}" if stage["total"] else ""
        so_far = [f"{stage['rows']:,}{total} so far"] if stage["rows"] else []
        details = "; ".join(filter(None, [*stage["why"], *so_far, _format_counts(stage["counts"])]))
        dropped = f"{sum(stage['dropped'].values()):,}" if stage["dropped"] else ""
        seconds = "" if stage["seconds"] is None else f"{stage['seconds']:,.1f}"
        cost = "" if stage["cost_usd"] is None else f"{stage['cost_usd']:.4f}"
        lines.append((name, STATES[stage["state"]], escape(details), dropped, seconds, cost))
    title = f"{found['run']}{' (in use by another sclite process)' if found['busy'] else ''}"
    header = ("stage", "state", "details", "dropped", "seconds", "cost $")
    console.print_table(title, header, lines, texts=3)
    if found["dropped"]:
        console.print(escape(f"Dropped: {_format_counts(found['dropped'])} (`sclite show drops`)"))
    if paid := found["ledger"]:
        unknown = f", {paid['unpriced']:,} at an unknown price" if paid["unpriced"] else ""
        tokens = f"{paid['prompt_tokens']:,} tokens in, {paid['completion_tokens']:,} out"
        lost = f", at most ${paid['lost_usd']:.4f} for lost replies" if paid["lost_usd"] else ""
        console.print(f"Requests: {paid['requests']:,}, {tokens}, ${paid['cost_usd']:.4f}{lost}{unknown}")
    when = ", once that process has finished" if found["busy"] else ""
    console.print(f"Next{when}: [bold cyan]{escape(found['next'])}[/]", wrap=False)


@common_options
def show(
    what: Annotated[
        str | None,
        typer.Argument(metavar="WHAT", help="problems, templates, attempts, reviews, pairs or drops."),
    ] = None,
    reason: Annotated[str | None, typer.Option(metavar="REASON", help="Only drops with this reason.")] = None,
    kind: Annotated[
        str | None, typer.Option(metavar="KIND", help="Only rows of this kind, such as wrong.")
    ] = None,
    id: Annotated[
        str | None, typer.Option(metavar="PREFIX", help="Only rows whose ID starts with PREFIX.")
    ] = None,
    first: Annotated[int, typer.Option("--from", metavar="N", min=1, help="Start at row N.")] = 1,
    limit: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Show at most N rows (default: all; 1 with --labels)."),
    ] = None,
    labels: Annotated[bool, typer.Option("--labels", help="Show the tokens and their loss mask.")] = False,
    *,
    common: Common,
) -> None:
    """Show the rows of a run, and why rows were dropped.

    Without WHAT, an overview.
    """
    from sclite.inspect import rows
    from sclite.records import Problem
    from sclite.run import Run

    config = common.of_existing_run().load()
    run = Run(config.run)
    if what is None and not labels:
        counted = rows.count_rows(run)
        if common.json:
            console.print_json({"what": None, "total": len(counted), "rows": counted})
            return
        lines = []
        for each in counted:
            kinds = escape(_format_counts(each["reasons"] or each["kinds"]))
            lines.append((f"sclite show {each['what']}", kinds, f"{each['rows']:,}"))
        console.print_table(str(run.folder), ("command", "kinds", "rows"), lines, texts=2)
        return
    what = what or "templates"
    limit = 1 if labels and limit is None and id is None else limit  # the tokens of one row fill a page
    total, chosen = rows.choose_rows(run, what, reason, kind, id, first, limit)
    tokens = None
    if labels:
        from sclite.inspect.labels import Labels

        tokens = Labels(config, run, what)
    if common.json:
        values = [tokens.as_json(row) if tokens else row.model_dump(mode="json") for _, row in chosen]
        console.print_json({"what": what, "total": total, "rows": values})
    elif not total:
        console.print(f"No matching {what} in {escape(str(run.folder))}.")
    elif first > total:
        raise UsageError(f"--from {first}: only {total} {what} match", f"use --from 1 to {total}")
    elif tokens:
        console.page(tokens.format_row(row, number, total) for number, row in chosen)
    else:
        problems = {problem.id: problem for problem in run.read("problems.jsonl", Problem)}
        console.page(rows.format_row(row, number, total, problems) for number, row in chosen)


@common_options
def report(*, common: Common) -> None:
    """Open the HTML report of the newest evaluation.

    Without a display, prints its path.
    """
    from sclite.evaluate.results import REPORT
    from sclite.run import Run

    run = Run(common.of_existing_run().load().run)
    path = max(run.folder.glob(f"eval/*/{REPORT}"), key=lambda path: path.stat().st_mtime, default=None)
    if path is None:
        raise DataError(f"{run.folder} has no evaluation", "run `sclite eval PROBLEMS` first")
    display = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if common.json:
        console.print_json({"report": str(path)})
    elif (display or not sys.platform.startswith("linux")) and webbrowser.open(path.resolve().as_uri()):
        console.note(f"opened {escape(str(path))}")
    else:
        console.print(escape(str(path)), wrap=False)


def runs(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder with the runs.")] = Path(
        "runs"
    ),
    json: JsonOption = False,
) -> None:
    """List the runs with student, stage, accuracy and size.

    Shows the last stage that has started, and the accuracy of the last trained student.
    """
    from sclite.evaluate.results import summaries
    from sclite.inspect.status import DONE, NOT_BEGUN, read_status
    from sclite.run import Run
    from sclite.settings import RUN_FILE, load
    from sclite.student.adapters import STUDENTS

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
        except ScliteError as error:  # one damaged run must not hide the others
            row["error"] = error.message
        if evaluated := summaries(Run(path)):
            models = evaluated[0]["models"]
            last = max(models, key=lambda name: STUDENTS.index(name) if name in STUDENTS else -1, default="")
            row |= {name: models.get(last, {}).get(name) for name in ("acc_t1", "acc_t2", "n")}
        found.append(row)
    if not found:
        hint = "pass the folder that contains your runs: `sclite runs FOLDER`"
        raise DataError(f"{folder} contains no run", hint)
    if json:
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


def _format_counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items())
