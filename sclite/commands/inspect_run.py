"""The commands that inspect a run: status, show, report and runs."""

import os
import webbrowser
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from sclite import console
from sclite.console import escape, format_percent
from sclite.errors import DataError, ScliteError
from sclite.options import Common, JsonOption, argument, common_options, flag, option

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
    header = ("stage", "state", "details", "dropped", "seconds", "cost $")
    console.print_table(found["run"], header, lines, texts=3)
    if found["dropped"]:
        console.print(escape(f"Dropped: {_format_counts(found['dropped'])} (`sclite show drops`)"))
    if paid := found["ledger"]:
        unknown = f", {paid['unpriced']:,} at an unknown price" if paid["unpriced"] else ""
        tokens = f"{paid['prompt_tokens']:,} tokens in, {paid['completion_tokens']:,} out"
        lost = f", at most ${paid['lost_usd']:.4f} for lost replies" if paid["lost_usd"] else ""
        console.print(f"Requests: {paid['requests']:,}, {tokens}, ${paid['cost_usd']:.4f}{lost}{unknown}")
    console.print(f"Next: [bold cyan]{escape(found['next'])}[/]", wrap=False)


@common_options
def show(
    what: Annotated[
        str | None, argument("WHAT", "problems, templates, attempts, reviews, pairs or drops.")
    ] = None,
    reason: Annotated[str | None, option("REASON", "Only drops with this reason.")] = None,
    kind: Annotated[str | None, option("KIND", "Only rows of this kind, such as wrong.")] = None,
    id: Annotated[str | None, option("PREFIX", "Only rows whose ID starts with PREFIX.")] = None,
    limit: Annotated[
        int | None, option("N", "Show at most N rows (default: all; 1 with --labels).", min=1)
    ] = None,
    labels: Annotated[bool, flag("--labels", "Show the tokens and their loss mask.")] = False,
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
        rows.require_run(run)
        overview, lines = list[dict[str, Any]](), []
        for name, (file, row_type) in rows.FILES.items():
            found: list[Any] = run.read(file, row_type)
            counts: dict[str, dict[str, int]] = {"kinds": {}, "reasons": {}}
            for key, of in rows.VALUES.items():
                if name in of:
                    counts[key] = dict(Counter(map(of[name], found)).most_common())
            overview.append({"what": name, "rows": len(found), **counts})
            shown = escape(_format_counts(counts["reasons"] or counts["kinds"]))
            lines.append((f"sclite show {name}", shown, f"{len(found):,}"))
        if common.json:
            console.print_json({"what": None, "total": len(overview), "rows": overview})
        else:
            console.print_table(str(run.folder), ("command", "kinds", "rows"), lines, texts=2)
        return
    what = what or "templates"
    limit = 1 if labels and limit is None and id is None else limit  # the tokens of one row fill a page
    total, chosen = rows.choose_rows(run, what, reason, kind, id, limit=limit)
    tokens = None
    if labels:
        from sclite.inspect.labels import Labels

        tokens = Labels(config, run, what)
    if common.json:
        values = [tokens.as_json(row) if tokens else row.model_dump(mode="json") for _, row in chosen]
        console.print_json({"what": what, "total": total, "rows": values})
    elif not total:
        console.print(f"No matching {what} in {escape(str(run.folder))}.")
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
    from sclite.evaluate.evaluate import REPORT
    from sclite.run import Run

    run = Run(common.of_existing_run().load().run)
    path = max(run.folder.glob(f"eval/*/{REPORT}"), key=lambda path: path.stat().st_mtime, default=None)
    if path is None:
        raise DataError(f"{run.folder} has no evaluation", "run `sclite eval PROBLEMS` first")
    display = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if common.json:
        console.print_json({"report": str(path)})
    elif display and webbrowser.open(path.resolve().as_uri()):
        console.note(f"opened {escape(str(path))}")
    else:
        console.print(escape(str(path)), wrap=False)


def runs(
    folder: Annotated[Path, argument("FOLDER", "The folder with the runs.")] = Path("runs"),
    json: JsonOption = False,
) -> None:
    """List the runs with student, stage, accuracy and size.

    Shows the last stage that has started, and the accuracy of the last trained student.
    """
    from sclite.evaluate.evaluate import summaries
    from sclite.inspect.status import NOT_BEGUN, read_status
    from sclite.run import Run
    from sclite.settings import RUN_FILE, load
    from sclite.student.adapters import STUDENTS

    found, lines = list[dict[str, Any]](), []
    for path in sorted(each.parent for each in folder.glob(f"*/{RUN_FILE}")):
        run, size = Run(path), sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        row: dict[str, Any] = {"run": str(path), "student": "", "stage": None, "state": "", "error": ""}
        try:
            config = load(None, [f"run={path}"], {}, own_file=False)
            row["student"] = config.student.model
            for name, stage in read_status(config, run)["stages"].items():
                if stage["state"] != NOT_BEGUN:
                    row |= {"stage": name, "state": stage["state"]}
        except ScliteError as error:  # one damaged run must not hide the others
            row["error"] = error.message
        evaluated = summaries(run)
        models = evaluated[0]["models"] if evaluated else {}
        last = models.get(next((name for name in reversed(STUDENTS) if name in models), ""), {})
        row |= {name: last.get(name) for name in ("acc_t1", "acc_t2", "n")} | {"bytes": size}
        found.append(row)
        shown = escape(row["error"]) or f"{row['stage'] or 'not started'} {STATES.get(row['state'], '')}"
        figures = (format_percent(row["acc_t1"]), format_percent(row["acc_t2"]), f"{size / 1e9:.2f}")
        lines.append((escape(path.name), escape(row["student"]), shown, *figures))
    if not found:
        hint = "pass the folder that contains your runs: `sclite runs FOLDER`"
        raise DataError(f"{folder} contains no run", hint)
    if json:
        console.print_json({"runs": found})
        return
    header = ("run", "student", "last stage", "first answer %", "after review %", "GB")
    console.print_table(str(folder), header, lines, texts=3)


def _format_counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items())
