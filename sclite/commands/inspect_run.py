"""The commands that show what a run holds: status, show, report and runs."""

from pathlib import Path
from typing import Annotated

import typer

from sclite import console
from sclite.options import Common, JsonOption, common_options


@common_options
def status(*, common: Common) -> None:
    """Show the progress of a run, its cost and the next command."""
    from sclite.inspect import tables
    from sclite.inspect.status import read_status
    from sclite.run import Run

    config = common.of_existing_run().load()
    with console.spinner("checking what is done"):
        found = read_status(config, Run(config.run))
    tables.print_status(found, common.json)


@common_options
def show(
    what: Annotated[
        str | None,
        typer.Argument(metavar="WHAT", help="problems, templates, attempts, reviews, pairs or drops."),
    ] = None,
    reason: Annotated[
        str | None, typer.Option("--reason", metavar="REASON", help="Only drops with this reason.")
    ] = None,
    kind: Annotated[
        str | None, typer.Option("--kind", metavar="KIND", help="Only rows of this kind, such as wrong.")
    ] = None,
    id: Annotated[
        str | None, typer.Option("--id", metavar="PREFIX", help="Only rows whose id starts with this.")
    ] = None,
    first: Annotated[int, typer.Option("--from", metavar="N", min=1, help="Start at row N.")] = 1,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", min=1, help="Show at most N rows (default: all).")
    ] = None,
    labels: Annotated[bool, typer.Option("--labels", help="Show the tokens and their loss mask.")] = False,
    *,
    common: Common,
) -> None:
    """Show the rows of a run, and why rows were dropped.

    Without WHAT, an overview.
    """
    from sclite.inspect import tables
    from sclite.inspect.rows import Choice
    from sclite.run import Run

    config = common.of_existing_run().load()
    run = Run(config.run)
    if what is None and not labels:
        tables.print_overview(run, common.json)
        return
    choice = Choice(what or "templates", reason, kind, id, first, limit)
    tables.print_rows(config, run, choice, labels, common.json)


@common_options
def report(*, common: Common) -> None:
    """Open the HTML report of the newest evaluation."""
    from sclite.inspect.overview import show_report
    from sclite.run import Run

    show_report(Run(common.of_existing_run().load().run), common.json)


def runs(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder that holds the runs.")] = Path(
        "runs"
    ),
    json: JsonOption = False,
) -> None:
    """List the runs with student, stage, accuracy and size."""
    from sclite.inspect.overview import print_runs

    print_runs(folder, json)
