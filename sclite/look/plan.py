"""`sclite train --plan` in the terminal: what each stage takes, whether it fits, and what the whole run will cost."""

from collections.abc import Mapping
from typing import Any

from sclite import console

PARTS = ("weights", "adapter", "gradients", "optimizer", "activations", "logits", "layer", "allowance")


def show_plan(plan: Mapping[str, Any]) -> None:
    """The plan that `sclite.train.plan.plan` makes, as tables on stdout."""
    size = plan["parameters"]
    told = f"{size / 1e9:.2f} billion" if size >= 5e8 else f"{size / 1e6:.1f} million"
    student = f"{plan['student']}: {told} parameters in {plan['bits']} bits, {plan['backend']}"
    console.say(console.plain(student))
    if plan["rough"]:
        console.say(f"[yellow]A rough estimate:[/] {console.plain(plan['rough'])}")
    _card(plan["card"])
    stages = plan["stages"]
    console.table(
        "Memory at the peak of a step, GB",
        ("stage", *PARTS, "in all", "of the host"),
        [(name, *_memory(stage)) for name, stage in stages.items()],
    )
    header = ("stage", "fits", "batch", "micro", "accumulate", "tokens a row", "at most", "rank")
    console.table("Settings", header, [_setting(name, stage) for name, stage in stages.items()], texts=2)
    for name, stage in stages.items():
        if stage["fits"] is False:
            console.say(f"[red]{name} does not fit:[/] {console.plain(stage['verdict'])}")
    header = ("stage", "rows", "too long", "epochs", "tokens", "steps", "tokens/s", "time")
    console.table("Forecast", header, [_forecast(name, stage) for name, stage in stages.items()])
    if plan["lengths"] == "characters":
        console.say("Tokens are estimated from characters: the student's tokenizer is not on this disk yet.")
    _rest(plan)


def _card(card: Mapping[str, Any] | None) -> None:
    if card is None:
        console.say("No CUDA card here: memory is the machine's own, roughly, and nothing is said to fit.")
        return
    name = console.plain(card["name"])
    console.say(f"{name}: {card['free_gb']:.1f} of {card['total_gb']:.1f} GB free")
    if card["processes"] is None:
        console.say("  who holds the rest is unknown: nvidia-smi does not answer")
    for process in card["processes"] or ():
        size = "an unknown amount" if process["gb"] is None else f"{process['gb']:.1f} GB"
        console.say(f"  {size} held by {console.plain(process['name'])} (process {process['pid']})")


def _memory(stage: Mapping[str, Any]) -> tuple[str, ...]:
    sizes = [stage["memory_gb"][part] for part in PARTS]
    return tuple(f"{size:.2f}" for size in (*sizes, stage["total_gb"], stage["host_gb"]))


def _setting(name: str, stage: Mapping[str, Any]) -> tuple[str, ...]:
    fits = {True: "[green]yes[/]", False: "[red]no[/]", None: "unknown"}[stage["fits"]]
    numbers = ("batch", "micro_batch", "accumulation", "length", "largest_length", "rank")
    return (name, fits, *(_known(stage[key]) for key in numbers))


def _forecast(name: str, stage: Mapping[str, Any]) -> tuple[str, ...]:
    keys = ("rows", "too_long", "epochs", "tokens", "steps", "tokens_per_second")
    hours = stage["hours"]
    return (
        name,
        *(_known(stage[key]) for key in keys),
        "–" if hours is None else console.duration(3600 * hours),
    )


def _known(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"


def _size(gigabytes: float) -> str:
    """56 GB, 5.7 GB, 40 MB."""
    if gigabytes < 0.1:
        return f"{1000 * gigabytes:.2g} MB"
    return f"{gigabytes:.0f} GB" if gigabytes >= 10 else f"{gigabytes:.1f} GB"


def _rest(plan: Mapping[str, Any]) -> None:
    hours = plan["hours"]
    told = (
        "unknown before a step was timed here" if hours is None else f"about {console.duration(3600 * hours)}"
    )
    console.say(f"Training takes: {told}")
    disk = plan["disk_gb"]
    parts = ", ".join(
        f"{name.replace('_', ' ')} {'?' if size is None else _size(size)}"
        for name, size in disk.items()
        if name != "total"
    )
    console.say(f"Disk: about {_size(disk['total'])} ({parts})")
    teacher = plan["teacher"]
    if teacher["requests"] is None:
        console.say("Corrections by the teacher: unknown before there are problems for stage 2")
        return
    if not teacher["requests"]:
        spent = f"; the run has cost ${teacher['spent_usd']:.2f}" if teacher["spent_usd"] else ""
        console.say(f"Corrections by the teacher: none are left to ask for{spent}")
        return
    most = "at most " if teacher["at_most"] else ""
    cost = "at an unknown price" if teacher["cost_usd"] is None else f"about ${teacher['cost_usd']:.2f}"
    console.say(f"Corrections by the teacher: {most}{teacher['requests']:,}, {cost}")
