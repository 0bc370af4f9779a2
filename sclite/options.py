"""The four options of every command that works on a run, and what they lead to: configuration, run folder, world."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

RunOption = Annotated[Path | None, typer.Option("--run", help="The run folder.")]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="A TOML file instead of ./sclite.toml.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Set a key of the configuration; KEY= puts it back to its default."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else there.")]


@dataclass(frozen=True)
class Common:
    """What a command was told by --run, --config, --set and --json.

    The methods take configuration keys that the command's own options set; those that are None were not given.
    """

    run: Path | None = None
    config: Path | None = None
    settings: list[str] | None = None
    json: bool = False

    def load(self, chosen: Mapping[str, Any] | None = None, defaults: Mapping[str, Any] | None = None) -> Any:
        """The configuration; with `defaults` of its own a command does not read ./sclite.toml unasked."""
        from sclite.settings import load  # pydantic takes longer than all of --help

        own = {**(chosen or {}), "run": self.run}
        settings = [f"{key}={value}" for key, value in own.items() if value is not None]
        return load(
            self.config, [*(self.settings or []), *settings], defaults=defaults, own_file=defaults is None
        )

    def context(self, chosen: Mapping[str, Any] | None = None) -> Any:
        """What a command on a run works with."""
        from sclite.context import Context
        from sclite.doctor import has_nvidia_driver
        from sclite.progress import ProgressDisplay
        from sclite.run import Run

        config = self.load(chosen)
        context = Context(config, Run(config.run), ProgressDisplay(), isolated=has_nvidia_driver())
        if config.teacher.embedded:
            from sclite.quickstart.tutor_provider import register

            context.prepare = register
        return context


def common_options(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command have its four common options as one argument, `common`, its last.

    Typer reads the options off a function's signature: what it is shown has the four where the command has `common`.
    """
    own = list(inspect.signature(command).parameters.values())[:-1]
    shown = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=option)
        for name, option, default in (
            ("run", RunOption, None),
            ("config", ConfigOption, None),
            ("settings", SetOption, None),
            ("json", JsonOption, False),
        )
    ]

    @functools.wraps(command)
    def called(**given: Any) -> None:
        four = {parameter.name: given.pop(parameter.name) for parameter in shown}
        command(**given, common=Common(**four))

    called.__signature__ = inspect.Signature([*own, *shown])
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in [*own, *shown]}
    return called


@contextmanager
def held(run: Any, config: Any) -> Iterator[None]:
    """Keep other processes off the run, and note the settings of this command, which makes its data or models."""
    with run.lock(), run.recording(config):
        yield
