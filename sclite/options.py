"""The options that commands share, and the configuration, run and context that they lead to."""

import functools
import inspect
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from sclite.config import Config
    from sclite.context import Context

RunOption = Annotated[Path | None, typer.Option("--run", metavar="DIR", help="Use this run folder.")]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="Use this file instead of ./sclite.toml.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a setting; an empty VALUE restores its default."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")]
FreshOption = Annotated[
    bool, typer.Option("--fresh", help="Redo stages whose inputs have changed, and pay again.")
]
GpuOption = Annotated[
    int | None,
    typer.Option("--gpu", metavar="N", min=0, help="The CUDA GPU (default: the first, or the CPU)."),
]
ProblemsArgument = Annotated[
    str | None, typer.Argument(metavar="PROBLEMS", help="A file or a Hub ID (default: problems.source).")
]
LimitOption = Annotated[
    int | None, typer.Option("--limit", metavar="N", min=1, help="Only the first N problems (default: all).")
]
MaxCostOption = Annotated[
    float | None, typer.Option("--max-cost", metavar="USD", min=0, help="Spending limit for the whole run.")
]
YesOption = Annotated[bool, typer.Option("--yes", help="Do not ask to confirm the cost.")]


DRIVERS = ("/dev/nvidiactl", "/dev/dxg")  # Linux, and Linux under Windows


@dataclass(frozen=True)
class Common:
    """The values of --run, --config, --set and --json."""

    run: Path | None = None
    config: Path | None = None
    settings: list[str] | None = None
    json: bool = False

    def load(
        self, chosen: Mapping[str, Any] | None = None, defaults: Mapping[str, Any] | None = None
    ) -> "Config":
        """The configuration. `chosen` holds the keys that the command's own options set, None where it is not given.

        A command with `defaults` of its own does not read ./sclite.toml, only what --config names.
        """
        from sclite.settings import load  # pydantic takes longer to import than --help takes

        settings = [*(self.settings or [])]
        for key, value in {**(chosen or {}), "run": self.run}.items():
            if value is not None:
                settings.append(f"{key}={str(value).lower() if isinstance(value, bool) else value}")
        return load(self.config, settings, defaults=defaults, own_file=defaults is None)

    def of_existing_run(self) -> "Common":
        """These options, with the quickstart's run if the default run does not exist but the quickstart's does."""
        from sclite.run import Run

        config, quickstart = self.load(), Run("runs/quickstart")
        default = config.run == type(config).model_fields["run"].default
        hidden = default and not Run(config.run).is_begun() and quickstart.is_begun()
        return replace(self, run=quickstart.folder) if hidden else self

    def context(self, chosen: Mapping[str, Any] | None = None) -> "Context":
        """The context of a command that works on a run; `chosen` as in `load`."""
        from sclite.context import Context
        from sclite.progress import ProgressDisplay
        from sclite.run import Run

        config = self.load(chosen)
        # is there an NVIDIA driver? A container may lack nvidia-smi, and asking CUDA would initialize it
        driver = shutil.which("nvidia-smi") is not None or any(Path(path).exists() for path in DRIVERS)
        context = Context(config, Run(config.run), ProgressDisplay(), isolated=driver)
        if config.teacher.embedded:
            from sclite.quickstart.tutor_provider import register

            context.prepare = register
        return context


def common_options(command: Callable[..., None]) -> Callable[..., None]:
    """Pass the four common options to a command as its last argument, `common`."""
    # typer reads options from the signature: the wrapper's has the four in place of `common`
    own = list(inspect.signature(command).parameters.values())[:-1]
    options = {"run": RunOption, "config": ConfigOption, "settings": SetOption, "json": JsonOption}
    shared = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=getattr(Common, name), annotation=option
        )
        for name, option in options.items()
    ]

    @functools.wraps(command)
    def wrapper(**given: Any) -> None:
        common = Common(**{parameter.name: given.pop(parameter.name) for parameter in shared})
        command(**given, common=common)

    setattr(wrapper, "__signature__", inspect.Signature([*own, *shared]))  # noqa: B010 - unknown to type checkers
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in [*own, *shared]}
    return wrapper
