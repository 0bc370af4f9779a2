"""The commands to start with: quickstart, init and doctor."""

from itertools import chain
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from sclite import console
from sclite.errors import FAILED, ScliteError
from sclite.options import Common, ConfigOption, FreshOption, JsonOption, common_options


@common_options
def quickstart(
    problems: Annotated[
        int | None,
        typer.Option(
            "--problems", metavar="N", min=200, help="Training problems (default: the run's, or 640)."
        ),
    ] = None,
    fresh: FreshOption = False,
    *,
    common: Common,
) -> None:
    """Run the full pipeline with a bundled toy student, on the CPU.

    Takes a few minutes. Needs no GPU, no API key and no download.
    """
    from sclite.quickstart import flow
    from sclite.run import Run

    loaded = common.load({"problems.limit": problems}, flow.DEFAULTS)
    run = Run(loaded.run)
    with run.recording(loaded):
        summary = flow.quickstart(loaded, fresh=fresh)
    if common.json:
        console.print_json(summary)
        return
    from sclite.evaluate.metrics import Outcome
    from sclite.inspect import summaries

    summaries.print_results(summary)
    summaries.print_example(run.rows(f"{summary['folder']}/dpo.jsonl", Outcome, whole=False))
    report = run.path(f"{summary['folder']}/report.html")
    console.print(f"\nReport: {console.escape(str(report))}\n\nNext steps:")
    chat = console.escape(f"sclite chat --self-correct --run {quote(str(loaded.run))}")
    console.print(f"  [bold cyan]{chat}[/]  talk to the student", wrap=False)
    console.print("  [bold cyan]sclite init[/]  a configuration for your own problems", wrap=False)


def init(config: ConfigOption = None, json: JsonOption = False) -> None:
    """Write a commented sclite.toml for this machine."""
    from sclite import doctor, settings

    gpus = doctor.probe_torch()["gpus"]
    path = config or Path(settings.FILE)
    settings.write_configuration(path, max((gpu["total_gb"] for gpu in gpus), default=None))
    if json:
        console.print_json({"config": str(path), "gpus": [gpu["name"] for gpu in gpus]})
        return
    gpu = "no CUDA GPU, bundled student on the CPU"
    if gpus:
        gpu = f"{gpus[0]['name']}, {gpus[0]['total_gb']:.0f} GB"
    console.print(f"Created {console.escape(str(path))} for this machine ({console.escape(gpu)}).")
    following = "set teacher.model and problems.source in it, then run [bold cyan]sclite build-data[/]"
    console.print(f"Next: {following}", wrap=False)
    if not gpus:
        limits = "learns the quickstart's word problems only; set student.model for others"
        console.note(f"[yellow]note:[/] the bundled student {limits}")


@common_options
def doctor(*, common: Common) -> None:
    """Check the environment and suggest fixes.

    Teacher and Hub are checked if the configuration names them. Exits with code 1 if something required is missing.
    """
    from sclite import config, doctor

    checks, broken = [], []
    try:
        settings = common.load()
    except ScliteError as error:
        settings = config.Config()
        broken = [doctor.Check("configuration", False, error.message, error.hint, required=True)]
    remaining = chain(broken, doctor.run_checks(settings))
    while True:
        with console.spinner("checking this machine"):
            check = next(remaining, None)
        if check is None:
            break
        checks.append(check)
        mark = "[green]✓[/]" if check.works else "[red]✗[/]" if check.required else "[yellow]![/]"
        if not common.json:
            console.print(f"{mark} {check.name}: {console.escape(check.found)}")
        if not (common.json or check.works):
            console.print(f"    [cyan]{console.escape(check.fix)}[/]", wrap=False)
    if common.json:
        console.print_json({"checks": [vars(check) for check in checks]})
    if any(check.required and not check.works for check in checks):
        raise typer.Exit(FAILED)
