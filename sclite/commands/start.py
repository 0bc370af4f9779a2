"""The commands to start with: quickstart, init and doctor."""

import os
from itertools import groupby
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from sclite import console
from sclite.errors import FAILED, ScliteError, UsageError
from sclite.options import Common, ConfigOption, FreshOption, JsonOption, common_options, option


@common_options
def quickstart(
    problems: Annotated[
        int | None, option("N", "Training problems (default: the run's, or 640).", min=200)
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
    run = Run(loaded.run)
    with run.recording(loaded):
        summary = flow.quickstart(loaded, fresh=fresh)
    if common.json:
        console.print_json(summary)
        return
    from sclite.chat.answer import Answer
    from sclite.chat.view import AnswerView, showing
    from sclite.evaluate.metrics import Outcome
    from sclite.inspect import summaries
    from sclite.student.base import Reply
    from sclite.student.self_correction import Reviewed
    from sclite.trace import parse

    summaries.print_results(run, summary)
    # one corrected answer as chat shows it: the shortest, preferably with its true wrong step flagged
    outcomes = run.rows(summary["models"]["dpo"]["rows"], Outcome, whole=False)
    corrected = [o for o in outcomes if o.accused and o.correct1 is False and o.correct2 is True]
    located = [o for o in corrected if o.accused == o.true_step] or corrected
    shown = min(located, key=lambda o: len(o.question) + len(o.correction or ""), default=None)
    if shown is None:
        console.print("No answer was corrected in this evaluation.")
    else:
        review = Reviewed(shown.revised, shown.step_scores, shown.accused, shown.cause, shown.correction)
        reply = Reply(0, shown.first, 0, 0, "stop")
        heading = f"[bold]One self-corrected answer[/] (right: {console.escape(shown.gold)})"
        console.print(f"\n{heading}\n\n  {console.escape(shown.question)}\n")
        view = AnswerView()
        with showing(view):
            view.feed(Answer(shown.question, reply, parse(shown.first).trace, review))
    console.print("\nNext steps:")
    chat = console.escape(f"sclite chat --self-correct --run {quote(str(loaded.run))}")
    console.print(f"  [bold cyan]{chat}[/]  chat with the student", wrap=False)
    console.print("  [bold cyan]sclite init[/]  write a configuration for your own problems", wrap=False)


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
    gpus, student = doctor.probe_torch()["gpus"], "embedded"
    if gpus:
        large = max(gpu["total_gb"] for gpu in gpus) >= 15
        student = f"unsloth/{'Qwen2.5-Math-7B-Instruct' if large else 'Qwen3-4B-Instruct-2507'}-bnb-4bit"
    known = keys()

    def line(key: str) -> str:
        if key == "student.model":
            return f'{key} = "{student}"  # {known[key].description}'
        default = known[key].default
        value = tomlkit.item("" if default is None else default)  # an empty value is no value
        if isinstance(default, dict):
            value = tomlkit.inline_table()
            value.update(default)
        return f"# {key} = {value.as_string()}  # {known[key].description}"

    lines = ["## Settings that matter most. Uncomment a line to change it.", *map(line, FIRST)]
    others = (key for key in known if key not in FIRST)
    for section, group in groupby(others, key=lambda key: key.rpartition(".")[0]):
        lines += ["", f"## {section or 'All other settings, with their defaults'}", *map(line, group)]
    try:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        message = f"{path} cannot be written: {error.strerror}"
        raise UsageError(message, "use another file with --config") from error
    if json:
        console.print_json({"config": str(path), "gpus": [gpu["name"] for gpu in gpus]})
        return
    gpu = f"{gpus[0]['name']}, {gpus[0]['total_gb']:.0f} GB" if gpus else "no CUDA GPU"
    console.print(f"Created {console.escape(str(path))} for this machine ({console.escape(gpu)}).")
    option = "" if config is None else f" --config {console.escape(str(path))}"
    command = f"[bold cyan]sclite build-data{option}[/]"
    console.print(f"Next: set teacher.model and problems.source in it, then run {command}", wrap=False)
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
