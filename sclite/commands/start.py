"""The commands to start with: quickstart, init and doctor."""

import os
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer

from sclite import console
from sclite.errors import FAILED, ScliteError, UsageError
from sclite.options import Common, ConfigOption, FreshOption, JsonOption, common_options


@common_options
def quickstart(
    problems: Annotated[
        int | None, typer.Option(metavar="N", min=200, help="Training problems (default: the run's, or 640).")
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

    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same run on every machine
    loaded = common.load({"problems.limit": problems}, flow.DEFAULTS)
    if source := loaded.problems.source:
        raise UsageError(
            f"the run {loaded.run} has problems from {source}", "choose another folder with --run"
        )
    run = Run(loaded.run)
    with run.recording(loaded):
        summary = flow.quickstart(loaded, fresh=fresh)
    if common.json:
        console.print_json(summary)
        return
    from sclite.evaluate.metrics import Outcome
    from sclite.inspect import summaries

    summaries.print_results(run, summary)
    summaries.print_example(run.rows(summary["models"]["dpo"]["rows"], Outcome, whole=False))
    console.print("\nNext steps:")
    chat = console.escape(f"sclite chat --self-correct --run {quote(str(loaded.run))}")
    console.print(f"  [bold cyan]{chat}[/]  chat with the student", wrap=False)
    console.print("  [bold cyan]sclite init[/]  write a configuration for your own problems", wrap=False)


EXAMPLES: dict[str, Any] = {
    "problems.limit": 1000,
    "attempts.price": (0.5, 1.5),
    "teacher.inspector_price": (0.5, 1.5),
    "teacher.temperature": 0.7,
    "teacher.requests_per_minute": 500.0,
    "teacher.tokens_per_minute": 200_000.0,
    "teacher.max_cost": 5.0,
    "teacher.price": (0.5, 1.5),
    **{f"{stage}.per_device_train_batch_size": 4 for stage in ("sft", "warmup", "dpo")},
    **{f"{stage}.padding_free": True for stage in ("sft", "warmup", "dpo")},
    "export.imatrix": True,
    "review.threshold": 0.0,
    "review.confidence_weight": 0.5,
}
"""Example values for keys without a default: every line of sclite.toml is valid when uncommented."""
FIRST = (
    "problems.source", "teacher.model", "teacher.api_base", "teacher.max_cost", "student.model", "eval.source",
    "sft.num_train_epochs", "attempts.samples", "export.quant", "run",
)  # fmt: skip
"""The keys that most people set, at the top of a new sclite.toml."""


def init(config: ConfigOption = None, json: JsonOption = False) -> None:
    """Write a commented sclite.toml for this machine."""
    import tomlkit

    from sclite import doctor, settings
    from sclite.config import keys

    path = config or Path(settings.FILE)
    if path.exists():
        raise UsageError(f"{path} already exists", "edit it, or remove it first")
    # every key is commented out, except the student, which depends on the memory of the largest GPU
    gpus, chosen = doctor.probe_torch()["gpus"], {"student.model": "embedded"}
    if gpus:
        large = max(gpu["total_gb"] for gpu in gpus) >= 15
        name = "Qwen2.5-Math-7B-Instruct" if large else "Qwen3-4B-Instruct-2507"
        chosen = {"student.model": f"unsloth/{name}-bnb-4bit"}
    known = keys()
    lines, section = ["## Settings that matter most. Uncomment a line to change it."], "most"
    for key in (*FIRST, *(key for key in known if key not in FIRST)):
        field, named = known[key], key.rpartition(".")[0]
        if key not in FIRST and named != section:
            lines += ["", f"## {'All other settings, with their defaults' if section == 'most' else named}"]
            section = named
        value, comment = chosen.get(key, field.default), field.description
        if value is None:
            value, comment = EXAMPLES[key], f"{comment}; example, not set by default"
        if isinstance(value, dict):
            table = tomlkit.inline_table()
            table.update(value)
            value = table
        prefix = "" if key in chosen else "# "
        lines.append(f"{prefix}{key} = {tomlkit.item(value).as_string()}  # {comment}")
    try:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        message = f"{path} cannot be written: {error.strerror}"
        raise UsageError(message, "use another file with --config") from error
    if json:
        console.print_json({"config": str(path), "gpus": [gpu["name"] for gpu in gpus]})
        return
    gpu = "no CUDA GPU, bundled student on the CPU"
    if gpus:
        gpu = f"{gpus[0]['name']}, {gpus[0]['total_gb']:.0f} GB"
    console.print(f"Created {console.escape(str(path))} for this machine ({console.escape(gpu)}).")
    option = "" if config is None else f" --config {console.escape(str(path))}"
    following = (
        f"set teacher.model and problems.source in it, then run [bold cyan]sclite build-data{option}[/]"
    )
    console.print(f"Next: {following}", wrap=False)
    if not gpus:
        limits = "can only learn the quickstart's word problems; set student.model for others"
        console.note(f"[yellow]note:[/] the bundled student {limits}")


@common_options
def doctor(*, common: Common) -> None:
    """Check the environment and suggest fixes.

    The teacher and the Hub are checked only if they are configured. Exits with code 1 if something required is missing or broken.
    """
    from sclite import config, doctor

    broken = []
    try:
        settings = common.load()
    except ScliteError as error:
        settings = config.Config()
        message = error.message.removeprefix("configuration: ")
        broken = [doctor.Check("configuration", False, message, error.hint, required=True)]
    with console.spinner("checking this machine"):
        checks = [*broken, *doctor.run_checks(settings)]
    for check in checks:
        mark = "[green]✓[/]" if check.works else "[red]✗[/]" if check.required else "[yellow]![/]"
        if not common.json:
            console.print(f"{mark} {check.name}: {console.escape(check.found)}")
        if not (common.json or check.works):
            console.print(f"    [cyan]{console.escape(check.fix)}[/]", wrap=False)
    if common.json:
        console.print_json({"checks": [vars(check) for check in checks]})
    if any(check.required and not check.works for check in checks):
        raise typer.Exit(FAILED)
