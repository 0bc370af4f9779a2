"""The options that all commands share, and the configuration, run and context made from them."""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from sclite.config import Config
    from sclite.context import Context


def argument(metavar: str, help: str) -> Any:
    return typer.Argument(metavar=metavar, help=help)


def option(metavar: str, help: str, *names: str, **limits: Any) -> Any:
    """An option with a value; `names` only if it is not called like its parameter."""
    return typer.Option(*names, metavar=metavar, help=help, **limits)


def flag(name: str, help: str) -> Any:
    """An option without a value: --name, or --name/--no-name."""
    return typer.Option(name, help=help)


ConfigOption = Annotated[Path | None, option("FILE", "Use this file instead of ./sclite.toml.")]
JsonOption = Annotated[bool, flag("--json", "Print one JSON object to stdout.")]
FreshOption = Annotated[bool, flag("--fresh", "Redo stages whose inputs have changed, and pay again.")]


@dataclass(frozen=True)
class Common:
    """The values of --run, --config, --set and --json."""

    run: Annotated[Path | None, option("DIR", "Use this run folder.")] = None
    config: ConfigOption = None
    settings: Annotated[
        list[str] | None,
        option("KEY=VALUE", "Override a setting; an empty VALUE restores its default.", "--set"),
    ] = None
    json: JsonOption = False

    def load(
        self, chosen: Mapping[str, Any] | None = None, defaults: Mapping[str, Any] | None = None
    ) -> "Config":
        """Load the configuration. `chosen` maps keys to the values of the command's own options (None: not given).

        With `defaults`, ./sclite.toml is not read, only the file given by --config.
        """
        from sclite.settings import load  # pydantic takes longer to import than --help takes

        given = {**(chosen or {}), "run": self.run}.items()
        settings = [f"{key}={value}" for key, value in given if value is not None]
        settings += self.settings or []  # last, so that a hint to add one works with any command
        return load(self.config, settings, defaults=defaults, own_file=defaults is None)

    def of_existing_run(self) -> "Common":
        """These options, with the quickstart's run if the default run does not exist but the quickstart's does."""
        from sclite.run import Run

        if self.run is not None:
            return self
        config, quickstart = self.load(), Run("runs/quickstart")
        default = config.run == type(config).model_fields["run"].default
        hidden = default and not Run(config.run).is_begun() and quickstart.is_begun()
        return replace(self, run=quickstart.folder) if hidden else self

    def context(self, chosen: Mapping[str, Any] | None = None) -> "Context":
        """The context of a command that works on a run; `chosen` as in `load`."""
        from sclite.context import Context
        from sclite.progress import ProgressDisplay
        from sclite.run import Run
        from sclite.student.cuda_memory import has_driver

        config = self.load(chosen)
        context = Context(config, Run(config.run), ProgressDisplay(), isolated=has_driver())
        if config.teacher.embedded:
            from sclite.quickstart.tutor import register

            context.prepare = register
        return context


def common_options(command: Callable[..., None]) -> Callable[..., None]:
    """Pass the four common options to a command as its last argument, `common`."""
    # typer reads options from the signature: the wrapper's has the four in place of `common`
    specific = list(inspect.signature(command).parameters.values())[:-1]
    shared = [
        field.replace(kind=field.KEYWORD_ONLY) for field in inspect.signature(Common).parameters.values()
    ]
    signature = inspect.Signature([*specific, *shared])

    @functools.wraps(command)
    def wrapper(**values: Any) -> None:
        common = Common(**{field.name: values.pop(field.name) for field in shared})
        command(**values, common=common)

    setattr(wrapper, "__signature__", signature)  # noqa: B010 - unknown to type checkers
    wrapper.__annotations__ = {name: each.annotation for name, each in signature.parameters.items()}
    return wrapper
