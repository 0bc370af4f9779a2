"""The commands: parse, call one stage, show its report. Nothing heavy is imported above a command's body."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from sclite import console
from sclite.errors import UsageFault

app = typer.Typer(
    name="sclite",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Teach a small model to reason in steps and to correct itself, on one consumer GPU.",
)

RunOption = Annotated[Path | None, typer.Option("--run", help="The run folder.", show_default=False)]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="A TOML file instead of ./sclite.toml.", show_default=False)
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set a key of the configuration.", show_default=False),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else there.")]


def _load(run: Path | None, config: Path | None, settings: list[str] | None, defaults: Any = None):
    """The configuration; with `defaults` of its own a command does not read ./sclite.toml unasked."""
    from sclite import config as configuration  # pydantic takes longer than all of --help

    chosen = [*(settings or []), *([f"run={run}"] if run else [])]
    return configuration.load(config, chosen, defaults=defaults, own_file=defaults is None)


def _world(config):
    from sclite.run import Run
    from sclite.world import World

    world = World(config, Run(config.run), console.Screen())
    if config.teacher.model.startswith("embedded/"):
        from sclite.quickstart.provider import register

        world.prepare = register
    return world


@contextmanager
def _held(world) -> Iterator[None]:
    """Keep other processes off the run, and note what this command was told."""
    with world.run.hold():
        world.run.remember(world.config)
        yield


@app.command()
def quickstart(
    problems: Annotated[
        int | None,
        typer.Option("--problems", min=40, help="Training problems to make (800).", show_default=False),
    ] = None,
    run: RunOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    json: JsonOption = False,
) -> None:
    """The whole way on an embedded student and teacher: no GPU, no key, no download, minutes."""
    from sclite.quickstart import flow
    from sclite.run import Run

    chosen = [*(settings or []), *([f"problems.limit={problems}"] if problems else [])]
    loaded = _load(run, config, chosen, flow.DEFAULTS)
    with Run(loaded.run).hold():
        Run(loaded.run).remember(loaded)
        summary, example = flow.quickstart(loaded)
    if json:
        console.print_json(summary)
        return
    from sclite.evaluate import show

    show.table(summary)
    show.example(example)
    console.say(f"\nReport: {Path(loaded.run) / 'eval/report.html'}\n\nNext:")
    for command in flow.next_commands(Path(loaded.run)):
        console.say(f"  [bold cyan]{command}[/]")


@app.command()
def init(config: ConfigOption = None) -> None:
    """Write a commented sclite.toml that fits this machine."""
    from sclite import config as configuration
    from sclite import machine

    found = machine.cards()
    path = config or Path(configuration.FILE)
    machine.write_configuration(path, max(total for _, total, _ in found) if found else None)
    card = (
        f"{found[0][0]}, {found[0][1]:.0f} GB" if found else "no CUDA card: the embedded student, on the CPU"
    )
    console.say(f"{path} is written for this machine ({card}).")
    console.say("Set teacher.model and problems.source in it, then: [bold cyan]sclite build-data[/]")


@app.command()
def doctor(json: JsonOption = False) -> None:
    """What works here, what does not, and the command that mends each."""
    from sclite import machine

    checks = machine.check_all()
    if json:
        console.print_json({"checks": machine.as_dicts(checks)})
        return
    for check in checks:
        console.say(
            f"{'[green]✓[/]' if check.works else '[red]✗[/]'} {check.name}: {console.plain(check.found)}"
        )
        if not check.works:
            console.say(f"    [cyan]{console.plain(check.mend)}[/]")


@app.command("build-data")
def build_data(
    problems: Annotated[
        str | None,
        typer.Argument(
            help="A JSONL file or a hub data set; problems.source without it.", show_default=False
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Rows to use.", show_default=False)
    ] = None,
    only: Annotated[
        str | None, typer.Option("--only", help="templates or corrections", show_default=False)
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Ask anew what another teacher or prompt has answered.")
    ] = False,
    run: RunOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Templates by the teacher; and corrections once there is an SFT student."""
    from sclite import pipeline

    if only not in (None, "templates", "corrections"):
        raise UsageFault(f"--only {only}: no such part", "use --only templates or --only corrections")
    chosen = [*(settings or [])]
    chosen += [f"problems.source={problems}"] if problems else []
    chosen += [f"problems.limit={limit}"] if limit else []
    world = _world(_load(run, config, chosen))
    with _held(world):
        reports = []
        if only != "corrections":
            reports.append(pipeline.build_templates(world, fresh))
        trained = world.run.path("sft/adapter/adapter_model.safetensors").is_file()
        if only == "corrections" or (only is None and trained):
            reports.append(pipeline.build_corrections(world))
    figures = _data_figures(world.reports)
    if json:
        console.print_json(figures)
        return
    console.say(f"{figures['templates']} templates in {world.run.path('templates.jsonl')}")
    for reason, count in sorted(figures["dropped"].items()):
        console.say(f"  {count} left out: {reason.replace('_', ' ')} (see {world.run.path('dropped.jsonl')})")
    if not trained:
        console.say("Next: [bold cyan]sclite train --gpu 0[/]")


def _data_figures(reports: list[Any]) -> dict[str, Any]:
    dropped: dict[str, int] = {}
    for report in reports:
        for reason, count in report.dropped.items():
            dropped[reason] = dropped.get(reason, 0) + count
    counts = {name: value for report in reports for name, value in report.counts.items()}
    costs = [report.cost_usd for report in reports]
    return {
        "templates": counts.get("templates", 0),
        "pairs": counts.get("corrected", 0),
        "dropped": dropped,
        "cost_usd": None if None in costs else round(sum(costs), 6),
        "seconds": round(sum(report.seconds for report in reports), 3),
    }


@app.command()
def train(
    gpu: Annotated[
        int | None,
        typer.Option(
            "--gpu",
            min=0,
            help="The CUDA card to use. Without it: the first card, or the CPU where there is none.",
            show_default=False,
        ),
    ] = None,
    only: Annotated[str | None, typer.Option("--only", help="sft or dpo", show_default=False)] = None,
    run: RunOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    json: JsonOption = False,
) -> None:
    """SFT, then the student's mistakes and their corrections, then DPO."""
    from sclite import pipeline
    from sclite.student.load import choose_card, model_name

    world = _world(_load(run, config, settings))
    model_name(world.config.student)
    choose_card(gpu)
    with _held(world):
        reports = pipeline.train(world, only)
    if json:
        console.print_json({report.stage: report.as_dict() for report in reports})
        return
    done = "dpo" if only != "sft" else "sft"
    console.say(f"The adapter is in {world.run.path(done + '/adapter')}")
    console.say(
        "Next: [bold cyan]sclite export[/]"
        if only != "sft"
        else "Next: [bold cyan]sclite train --only dpo[/]"
    )


@app.command()
def export(
    quant: Annotated[
        str | None, typer.Option("--quant", help="q4_k_m, q5_k_m, q6_k, q8_0, f16 ..", show_default=False)
    ] = None,
    ollama: Annotated[
        str | None,
        typer.Option("--ollama", metavar="NAME", help="Also run `ollama create NAME`.", show_default=False),
    ] = None,
    form: Annotated[str, typer.Option("--format", help="gguf, or lora for the adapter alone.")] = "gguf",
    run: RunOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    json: JsonOption = False,
) -> None:
    """A GGUF of the trained student, and a Modelfile for Ollama."""
    from sclite import pipeline

    if form not in ("gguf", "lora"):
        raise UsageFault(f"--format {form}: no such format", "use --format gguf or --format lora")
    chosen = [*(settings or [])]
    chosen += [f"export.quant={quant}"] if quant else []
    chosen += [f"export.ollama={ollama}"] if ollama else []
    world = _world(_load(run, config, chosen))
    with _held(world):
        if form == "lora":
            console.say(str(pipeline.export_lora(world)))
            return
        report = pipeline.export(world)[0]
        created = None
        if world.config.export.ollama:
            from sclite.export.ollama import create

            created = create(world.config.export.ollama, world.run.path("export/Modelfile"))
    if json:
        console.print_json(
            {**report.figures, "ollama": world.config.export.ollama if created is not None else None}
        )
        return
    console.say(f"{report.figures['gguf']}  {report.figures['megabytes']:g} MB")
    for warning in report.figures.get("warnings", []):
        console.note(f"[yellow]note:[/] {warning}")
    if created is not None:
        console.say(f"Next: [bold cyan]ollama run {world.config.export.ollama}[/]")
    else:
        console.say(f"Next: [bold cyan]sclite chat --self-correct --run {world.run.folder}[/]")


@app.command("eval")
def evaluate(
    problems: Annotated[
        str | None,
        typer.Argument(
            help="Held-out problems: a JSONL file or a hub data set; eval.source without it.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=10, help="Rows to use.", show_default=False)
    ] = None,
    models: Annotated[
        str, typer.Option("--models", help="Which students, with commas between.")
    ] = "base,sft,dpo",
    run: RunOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Measure base, SFT and DPO student: one pass, and self-corrected."""
    from sclite import measure, pipeline
    from sclite.evaluate import show

    chosen = [*(settings or [])]
    chosen += [f"eval.source={problems}"] if problems else []
    chosen += [f"eval.limit={limit}"] if limit else []
    world = _world(_load(run, config, chosen))
    names = (
        [name.strip() for name in models.split(",") if name.strip()] if models else pipeline.available(world)
    )
    unknown = [name for name in names if name not in pipeline.NAMES]
    if unknown:
        raise UsageFault(
            f"--models {','.join(unknown)}: no such student", f"use any of {', '.join(pipeline.NAMES)}"
        )
    with _held(world):
        held_out, fitting, left_out = measure.held_out(world)
        pipeline.export(world, names, compare=False)
        source = world.config.eval.source
        summary = measure.evaluate(world, names, held_out, fitting, source=source, left_out=left_out)
    if json:
        console.print_json(summary)
        return
    show.table(summary)
    console.say(f"Report: {world.run.path('eval/report.html')}")


@app.command()
def chat(
    question: Annotated[
        str | None, typer.Argument(help="Ask this one thing and leave.", show_default=False)
    ] = None,
    self_correct: Annotated[
        bool, typer.Option("--self-correct", help="Let it review each answer and mend its wrong step.")
    ] = False,
    model: Annotated[
        Path | None,
        typer.Option("--model", help="A GGUF file; the run's own without it.", show_default=False),
    ] = None,
    run: RunOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Talk to the student; watch it find and mend its own wrong step."""
    from sclite import measure
    from sclite.chat.repl import talk

    if json and question is None:
        raise UsageFault("--json needs a question", "sclite chat --json 'QUESTION'")
    loaded = _load(run, config, settings)
    if run is None and not Path(loaded.run).is_dir() and Path("runs/quickstart").is_dir():
        loaded = _load(Path("runs/quickstart"), config, settings)
    world = _world(loaded)
    path = measure.find_gguf(world, model)
    threshold = world.config.review.threshold
    if threshold is None:
        threshold = measure.stored_threshold(world, path)
    talk(path, world.config, threshold, self_correct=self_correct, question=question, as_json=json)
