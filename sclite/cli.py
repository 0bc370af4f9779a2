"""The command line: every command, in the order of use. What is heavy is imported inside a command."""

from typing import Annotated

import typer

from sclite import console
from sclite.commands import build, inspect_run, start, use

COMMANDS = {
    **{"quickstart": start.quickstart, "init": start.init, "doctor": start.doctor},
    **{"build-data": build.build_data, "train": build.train, "run": build.run},
    **{"eval": use.evaluate, "export": use.export, "chat": use.chat, "serve": use.serve},
    **{"status": inspect_run.status, "show": inspect_run.show},
    **{"report": inspect_run.report, "runs": inspect_run.runs},
}

app = typer.Typer(
    name="sclite",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Train a small model to reason in steps and correct itself, on one consumer GPU.",
)


def _print_version(requested: bool) -> None:
    if requested:
        from importlib.metadata import version

        console.print(f"sclite {version('sclite')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    pass


for name, command in COMMANDS.items():
    app.command(name)(command)
