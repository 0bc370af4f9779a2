"""`sclite show` and `sclite status` in the terminal: tables, and pages of rows."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sclite import console
from sclite.config import Config
from sclite.console import escape
from sclite.errors import UsageError
from sclite.inspect import rows
from sclite.inspect.rows import Choice
from sclite.run import Run

STATES = {
    "done": "[green]done[/]",
    "stale": "[yellow]stale[/]",
    "half_way": "[yellow]incomplete[/]",
    "not_begun": "[dim]not started[/]",
}


def print_rows(config: Config, run: Run, choice: Choice, labels: bool, as_json: bool) -> None:
    """Print the chosen rows, in a terminal through a pager; as JSON one object {"what", "total", "rows"}.

    With `labels` their tokens and loss weights; without --id and --limit, those of the first row only.
    """
    from sclite.inspect.labels import Labels
    from sclite.inspect.row_text import format_row

    if labels and choice.limit is None and choice.id is None:
        choice = replace(choice, limit=1)
    total, chosen = rows.choose_rows(run, choice)
    found = Labels(config, run, choice.what) if labels else None
    if as_json:
        values = (found.as_json(row) if found else row.model_dump(mode="json") for _, row in chosen)
        console.print_json_rows({"what": choice.what, "total": total}, values)
    elif not total:
        console.print(f"No matching {choice.what} in {escape(str(run.folder))}.")
    elif choice.first > total:
        message = f"--from {choice.first}: only {total} {choice.what} match"
        raise UsageError(message, f"use --from 1 to {total}")
    elif found:
        console.page(found.format_row(row, number, total) for number, row in chosen)
    else:
        problems = rows.Problems(run)
        console.page(format_row(row, number, total, problems) for number, row in chosen)


def print_overview(run: Run, as_json: bool) -> None:
    """Print which rows the run has, with counts."""
    found = rows.count_rows(run)
    if as_json:
        console.print_json({"what": None, "total": len(found), "rows": found})
        return
    lines = [
        (
            f"sclite show {each['what']}",
            escape(_format_counts(each["reasons"] or each["kinds"])),
            f"{each['rows']:,}",
        )
        for each in found
    ]
    console.print_table(str(run.folder), ("command", "kinds", "rows"), lines, texts=2)


def print_status(figures: Mapping[str, Any], as_json: bool) -> None:
    """Print what `read_status` returns."""
    if as_json:
        console.print_json(figures)
        return
    lines = []
    for name, stage in figures["stages"].items():
        total = f" of {stage['total']:,}" if stage["total"] else ""
        so_far = [f"{stage['rows']:,}{total} so far"] if stage["rows"] else []
        details = "; ".join(filter(None, [*stage["why"], *so_far, _format_counts(stage["counts"])]))
        dropped = f"{sum(stage['dropped'].values()):,}" if stage["dropped"] else ""
        seconds = "" if stage["seconds"] is None else f"{stage['seconds']:,.1f}"
        cost = "" if stage["cost_usd"] is None else f"{stage['cost_usd']:.4f}"
        lines.append((name, STATES[stage["state"]], escape(details), dropped, seconds, cost))
    title = f"{figures['run']}{' (in use by another sclite process)' if figures['busy'] else ''}"
    header = ("stage", "state", "details", "dropped", "seconds", "cost $")
    console.print_table(title, header, lines, texts=3)
    if figures["dropped"]:
        console.print(escape(f"Dropped: {_format_counts(figures['dropped'])} (`sclite show drops`)"))
    if paid := figures["ledger"]:
        unknown = f", {paid['unpriced']:,} of unknown price" if paid["unpriced"] else ""
        tokens = f"{paid['prompt_tokens']:,} tokens in, {paid['completion_tokens']:,} out"
        console.print(f"Requests: {paid['requests']:,}, {tokens}, ${paid['cost_usd']:.4f}{unknown}")
    when = " when that process has finished" if figures["busy"] else ""
    console.print(f"Next{when}: [bold cyan]{escape(figures['next'])}[/]", wrap=False)


def _format_counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items())
