"""What the commands say of what they did or would do: one JSON object, or words and the next command."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from sclite import console
from sclite.errors import DeviceError
from sclite.run import Report


def dry_run(found: Mapping[str, Any], json: bool) -> None:
    """The first request and the forecast."""
    if json:
        console.print_json(found)
        return
    request = found["first_request"]
    if request is None:
        console.say("Nothing is left to ask.")
        return
    settings = {name: value for name, value in request.items() if name != "messages"}
    console.say(console.plain(", ".join(f"{name} {value}" for name, value in settings.items())))
    for message in request["messages"]:
        console.say(f"\n[bold]{console.plain(message['role'])}[/]\n{console.plain(message['content'])}")
    cost = "at an unknown price" if found["cost_usd"] is None else f"about ${found['cost_usd']:.4f}"
    console.say(
        f"\n{found['requests']} requests and their repairs, about {found['prompt_tokens']} tokens sent and "
        f"{found['completion_tokens']} written, {cost}. Nothing was asked."
    )


def built(context: Any, only: str | None, json: bool) -> None:
    """What build-data has made, what it left out, and what to type next."""
    run, reports = context.run, context.reports
    figures = data_figures(reports)
    if json:
        console.print_json(figures)
        return
    if only != "corrections":
        console.say(f"{figures['templates']} templates in {console.plain(str(run.path('templates.jsonl')))}")
    if any(report.stage == "pairs" for report in reports):
        console.say(f"{figures['pairs']} pairs in {console.plain(str(run.path('pairs.jsonl')))}")
    if figures["cost_usd"]:
        console.say(f"They cost ${figures['cost_usd']:.4f}.")
    for reason, count in sorted(figures["dropped"].items()):
        console.say(f"  {count} left out: {console.plain(reason.replace('_', ' '))}")
    if figures["dropped"]:
        console.say(
            f"Look at them: {_command(f'sclite show drops --run {quote(str(run.folder))}')}", whole=True
        )
    _next(context)


def data_figures(reports: Sequence[Report]) -> dict[str, Any]:
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


def trained(context: Any, only: str | None, json: bool) -> None:
    """Where the adapter is, and what to type next."""
    if json:
        console.print_json({report.stage: report.as_dict() for report in context.reports})
        return
    adapter = context.run.path("sft/adapter" if only == "sft" else "dpo/adapter")
    console.say(f"The adapter is in {console.plain(str(adapter))}")
    _next(context)


def _next(context: Any) -> None:
    """The command that takes the run on, as `sclite status` has it."""
    from sclite.inspect.status import status

    console.say(f"Next: {_command(status(context.config, context.run)['next'])}", whole=True)


def _command(text: str) -> str:
    return f"[bold cyan]{console.plain(text)}[/]"


def plan(found: Mapping[str, Any], json: bool) -> None:
    """What will fit. Raises DeviceFault where a stage does not."""
    from sclite.inspect.plan import show_plan

    fits = all(stage["fits"] is not False for stage in found["stages"].values())
    if not json:
        show_plan(found)
    elif fits:
        console.print_json(found)
    if not fits:
        error = DeviceError(
            "not every stage fits on this GPU", "use the settings that the plan says would fit"
        )
        error.details = found
        raise error


def exported(context: Any, report: Report, created: Any, fitted: bool, json: bool) -> None:
    """The GGUF, and the next command.

    `created`: what `ollama create` gave, None where it was not asked for; `fitted`: there is a threshold for its reviews.
    """
    from sclite.export.parity import summary

    ollama, figures = context.config.export.ollama, report.figures
    if json:
        console.print_json({**figures, "ollama": ollama if created is not None else None})
        return
    console.say(f"{console.plain(figures['gguf'])}  {figures['megabytes']:g} MB")
    line = console.plain(summary(figures["parity"]))
    skipped = figures["parity"]["skipped"]
    (console.note if skipped else console.say)(f"[yellow]{line}[/]" if skipped else line)
    for warning in figures.get("warnings", []):
        console.note(f"[yellow]note:[/] {console.plain(warning)}")
    run = quote(str(context.run.folder))
    if created is not None:
        console.say(f"Next: {_command(f'ollama run {quote(ollama)}')}", whole=True)
    elif fitted:
        console.say(f"Next: {_command(f'sclite chat --self-correct --run {run}')}", whole=True)
    elif context.config.teacher.embedded or context.config.eval.source:
        command = "quickstart" if context.config.teacher.embedded else "eval"
        console.say(
            f"Next: {_command(f'sclite {command} --run {run}')}, which fits the review's threshold",
            whole=True,
        )
    else:
        console.say(f"Next: {_command(f'sclite chat --run {run}')}", whole=True)
        console.say("`sclite eval` with a file of held-out problems fits the threshold for --self-correct.")


def exported_lora(path: Path, json: bool) -> None:
    """The adapter as a GGUF of its own."""
    if json:
        console.print_json({"lora": str(path), "megabytes": round(path.stat().st_size / 1e6, 1)})
        return
    console.say(console.plain(str(path)))


def datasets(report: Report, json: bool) -> None:
    """The data sets for other trainers."""
    if json:
        console.print_json({**report.counts, **report.figures})
        return
    folder = console.plain(str(report.figures["folder"]))
    for name, count in report.counts.items():
        console.say(f"{count} rows in {folder}/{name}.jsonl" if count else f"no {name}")
    console.say(f"Choose a licence in {folder}/README.md before you publish them.")
