"""The command line: every command in its group, in the order of use. What is heavy is imported inside a command."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperGroup

from sclite import console
from sclite.commands import build, inspect_run, start, use

if TYPE_CHECKING:
    from typer._click import Context, HelpFormatter

COMMANDS: dict[str, dict[str, Callable[..., None]]] = {
    "Start": {"quickstart": start.quickstart, "init": start.init, "doctor": start.doctor},
    "Build data and train": {"build-data": build.build_data, "train": build.train, "run": build.run},
    "Evaluate and use": {"eval": use.evaluate, "export": use.export, "chat": use.chat, "serve": use.serve},
    "Inspect a run": {
        "status": inspect_run.status,
        "show": inspect_run.show,
        "report": inspect_run.report,
        "runs": inspect_run.runs,
    },
}


class CommandGroups(TyperGroup):
    """Lists the commands by their panels in plain text: importing rich takes longer than the rest of --help."""

    def format_commands(self, ctx: "Context", formatter: "HelpFormatter") -> None:
        panels: dict[str, list[tuple[str, str]]] = {}
        for name, command in self.commands.items():
            panel = panels.setdefault(getattr(command, "rich_help_panel", ""), [])
            panel.append((f"{name:10}", command.get_short_help_str(formatter.width)))
        for heading, rows in panels.items():
            with formatter.section(heading):
                formatter.write_dl(rows)


app = typer.Typer(
    name="sclite",
    cls=CommandGroups,
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


for panel, commands in COMMANDS.items():
    for name, command in commands.items():
        app.command(name, rich_help_panel=panel)(command)
