"""What the commands say of what they did or would do: one JSON object, or words and the next command."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from sclite import console
from sclite.errors import DeviceError
from sclite.run import Report


def print_dry_run(found: Mapping[str, Any], json: bool) -> None:
    """The first request and the forecast."""
    if json:
        console.print_json(found)
        return
    request = found["first_request"]
    if request is None:
        console.print("Nothing is left to ask.")
        return
    settings = {name: value for name, value in request.items() if name != "messages"}
    console.print(console.escape(", ".join(f"{name} {value}" for name, value in settings.items())))
    for message in request["messages"]:
        console.print(f"\n[bold]{console.escape(message['role'])}[/]\n{console.escape(message['content'])}")
    cost = "at an unknown price" if found["cost_usd"] is None else f"about ${found['cost_usd']:.4f}"
    console.print(
        f"\n{found['requests']} requests and their repairs, about {found['prompt_tokens']} tokens sent and "
        f"{found['completion_tokens']} written, {cost}. Nothing was asked."
    )


def print_build_data(context: Any, only: str | None, json: bool) -> None:
    """What build-data has made, what it left out, and what to type next."""
    run, reports = context.run, context.reports
    figures = data_totals(reports)
    if json:
        console.print_json(figures)
        return
    if only != "corrections":
        console.print(
            f"{figures['templates']} templates in {console.escape(str(run.path('templates.jsonl')))}"
        )
    if any(report.stage == "pairs" for report in reports):
        console.print(f"{figures['pairs']} pairs in {console.escape(str(run.path('pairs.jsonl')))}")
    if figures["cost_usd"]:
        console.print(f"They cost ${figures['cost_usd']:.4f}.")
    for reason, count in sorted(figures["dropped"].items()):
        console.print(f"  {count} left out: {console.escape(reason.replace('_', ' '))}")
    if figures["dropped"]:
        console.print(
            f"Look at them: {_command(f'sclite show drops --run {quote(str(run.folder))}')}", wrap=False
        )
    _next(context)


def data_totals(reports: Sequence[Report]) -> dict[str, Any]:
    """What `build-data --json` prints."""
    dropped: dict[str, int] = {}
    for report in reports:
        for reason, count in report.dropped.items():
            dropped[reason] = dropped.get(reason, 0) + count
    counts = {name: value for report in reports for name, value in report.counts.items()}
    costs, kinds = [report.cost_usd for report in reports], ("decision", "content")
    paired = any(report.stage == "pairs" for report in reports)
    return {
        "templates": counts.get("templates", 0),
        "pairs": sum(counts.get(kind, 0) for kind in kinds) if paired else counts.get("corrected", 0),
        "dropped": dropped,
        "cost_usd": None if None in costs else round(sum(costs), 6),
        "seconds": round(sum(report.seconds for report in reports), 3),
    }


def print_train(context: Any, only: str | None, json: bool) -> None:
    """Where the adapter is, and what to type next."""
    if json:
        console.print_json({report.stage: report.as_dict() for report in context.reports})
        return
    adapter = context.run.path("sft/adapter" if only == "sft" else "dpo/adapter")
    console.print(f"The adapter is in {console.escape(str(adapter))}")
    _next(context)


def _next(context: Any) -> None:
    """The command that takes the run on, as `sclite status` has it."""
    from sclite.inspect.status import read_status

    console.print(f"Next: {_command(read_status(context.config, context.run)['next'])}", wrap=False)


def _command(text: str) -> str:
    return f"[bold cyan]{console.escape(text)}[/]"


def print_plan(found: Mapping[str, Any], json: bool) -> None:
    """What will fit. Raises DeviceFault where a stage does not."""
    from sclite.inspect.plan import print_plan_tables

    fits = all(stage["fits"] is not False for stage in found["stages"].values())
    if not json:
        print_plan_tables(found)
    elif fits:
        console.print_json(found)
    if not fits:
        error = DeviceError(
            "not every stage fits on this GPU", "use the settings that the plan says would fit"
        )
        error.details = found
        raise error


def print_export(context: Any, report: Report, created: Any, fitted: bool, json: bool) -> None:
    """The GGUF, and the next command.

    `created`: what `ollama create` gave, None where it was not asked for; `fitted`: there is a threshold for its reviews.
    """
    from sclite.export.parity import summarize

    ollama, figures = context.config.export.ollama, report.figures
    if json:
        console.print_json({**figures, "ollama": ollama if created is not None else None})
        return
    console.print(f"{console.escape(figures['gguf'])}  {figures['megabytes']:g} MB")
    line = console.escape(summarize(figures["parity"]))
    skipped = figures["parity"]["skipped"]
    (console.note if skipped else console.print)(f"[yellow]{line}[/]" if skipped else line)
    for warning in figures.get("warnings", []):
        console.note(f"[yellow]note:[/] {console.escape(warning)}")
    run = quote(str(context.run.folder))
    if created is not None:
        console.print(f"Next: {_command(f'ollama run {quote(ollama)}')}", wrap=False)
    elif fitted:
        console.print(f"Next: {_command(f'sclite chat --self-correct --run {run}')}", wrap=False)
    elif context.config.teacher.embedded or context.config.eval.source:
        command = "quickstart" if context.config.teacher.embedded else "eval"
        console.print(
            f"Next: {_command(f'sclite {command} --run {run}')}, which fits the review's threshold",
            wrap=False,
        )
    else:
        console.print(f"Next: {_command(f'sclite chat --run {run}')}", wrap=False)
        console.print("`sclite eval` with a file of held-out problems fits the threshold for --self-correct.")


def print_lora(path: Path, json: bool) -> None:
    """The adapter as a GGUF of its own."""
    if json:
        console.print_json({"lora": str(path), "megabytes": round(path.stat().st_size / 1e6, 1)})
        return
    console.print(console.escape(str(path)))


def print_datasets(report: Report, json: bool) -> None:
    """The data sets for other trainers."""
    if json:
        console.print_json({**report.counts, **report.figures})
        return
    folder = console.escape(str(report.figures["folder"]))
    for name, count in report.counts.items():
        console.print(f"{count} rows in {folder}/{name}.jsonl" if count else f"no {name}")
    console.print(f"Choose a licence in {folder}/README.md before you publish them.")
