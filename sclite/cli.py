"""The commands: parse, call one stage, show its report. Nothing heavy is imported above a command's body."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from sclite import console
from sclite.errors import DATA, FAILED, UsageError
from sclite.options import Common, ConfigOption, JsonOption, common_options, held

app = typer.Typer(
    name="sclite",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Teach a small model to reason in steps and to correct itself, on one consumer GPU.",
)


def _tell_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        console.print(f"sclite {version('sclite')}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
@common_options
def quickstart(
    problems: Annotated[
        int | None,
        typer.Option(
            "--problems", min=200, help="Training problems to make (default: those of the run, else 640)."
        ),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Train anew what was trained from other inputs.")
    ] = False,
    *,
    common: Common,
) -> None:
    """The full pipeline on a bundled student, on the CPU.

    No GPU, no API key, no download; it takes minutes.
    """
    from sclite.quickstart import flow
    from sclite.run import Run

    loaded = common.load({"problems.limit": problems}, flow.DEFAULTS)
    with held(Run(loaded.run), loaded):
        summary, example = flow.quickstart(loaded, fresh=fresh)
    if common.json:
        console.print_json(summary)
        return
    from sclite.evaluate import table

    table.print_results(summary)
    table.print_example(example)
    console.print(
        f"\nReport: {console.escape(str(Path(loaded.run) / summary['folder'] / 'report.html'))}\n\nNext:"
    )
    for command, purpose in flow.next_commands(Path(loaded.run)):
        console.print(f"  [bold cyan]{console.escape(command)}[/]  {purpose}", wrap=False)


@app.command()
def init(config: ConfigOption = None, json: JsonOption = False) -> None:
    """Write a commented sclite.toml for this machine."""
    from sclite import doctor, settings

    found = doctor.probe_gpus()
    path = config or Path(settings.FILE)
    doctor.write_configuration(path, max(total for _, total, _ in found) if found else None)
    if json:
        console.print_json({"config": str(path), "gpus": [name for name, _, _ in found]})
        return
    gpu = f"{found[0][0]}, {found[0][1]:.0f} GB" if found else "no CUDA GPU: the bundled student, on the CPU"
    console.print(f"Wrote {console.escape(str(path))} for this machine ({console.escape(gpu)}).")
    console.print(
        "Set teacher.model and problems.source in it, then: [bold cyan]sclite build-data[/]", wrap=False
    )


@app.command()
def doctor(json: JsonOption = False) -> None:
    """Check the environment and suggest fixes.

    Exits with 1 where something that is required is missing or broken.
    """
    from sclite import doctor

    checks = doctor.run_checks()
    broken = [check for check in checks if check.required and not check.works]
    if json:
        console.print_json({"checks": doctor.as_dicts(checks)})
    for check in () if json else checks:
        mark = "[green]✓[/]" if check.works else "[red]✗[/]" if check.required else "[yellow]![/]"
        console.print(f"{mark} {check.name}: {console.escape(check.found)}")
        if not check.works:
            console.print(f"    [cyan]{console.escape(check.fix)}[/]", wrap=False)
    if broken:
        raise typer.Exit(FAILED)


@app.command("build-data")
@common_options
def build_data(
    problems: Annotated[
        str | None, typer.Argument(help="A file or a dataset's Hub ID (default: problems.source).")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Rows of PROBLEMS to use (default: all).")
    ] = None,
    only: Annotated[str | None, typer.Option("--only", help="templates or corrections")] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Ask anew what another teacher or prompt has answered.")
    ] = False,
    max_cost: Annotated[
        float | None, typer.Option("--max-cost", min=0, help="US dollars that the whole run may cost.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask whether the forecast is all right.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the first request and the forecast; ask nothing.")
    ] = False,
    *,
    common: Common,
) -> None:
    """Thought templates; corrections once there is a student."""
    from sclite import pipeline
    from sclite.inspect import summaries

    if only not in (None, "templates", "corrections"):
        raise UsageError(f"--only {only}: no such part", "use --only templates or --only corrections")
    chosen = {"problems.source": problems, "problems.limit": limit, "teacher.max_cost": max_cost}
    context = common.context(chosen)
    pipeline.check_sources(context)
    if dry_run:
        context.dry = True
        forecast = pipeline.forecast_corrections if only == "corrections" else pipeline.forecast_templates
        summaries.print_dry_run(forecast(context), common.json)
        return
    context.ask_before_paying = not yes
    with held(context.run, context.config):
        pipeline.read_problems(
            context, reread=only != "corrections" or problems is not None or limit is not None
        )
        if only != "corrections":
            pipeline.build_templates(context, fresh)
        trained = context.run.path("sft/adapter/adapter_model.safetensors").is_file()
        if only == "corrections" or (only is None and (trained or context.config.attempts.student)):
            pipeline.build_corrections(context)
            if pipeline.can_build_pairs(context):
                pipeline.build_pairs(context)
    summaries.print_build_data(context, only, common.json)


@app.command()
@common_options
def train(
    gpu: Annotated[
        int | None,
        typer.Option(
            "--gpu",
            min=0,
            help="The CUDA card to use. Without it: the first card, or the CPU where there is none.",
        ),
    ] = None,
    only: Annotated[str | None, typer.Option("--only", help="sft or dpo")] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Train anew what was trained from other inputs.")
    ] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Show what fits and what it will take; train nothing.")
    ] = False,
    *,
    common: Common,
) -> None:
    """SFT, attempts, corrections and DPO."""
    from sclite import pipeline
    from sclite.inspect import summaries
    from sclite.student.loader import model_name, select_gpu

    context = common.context()
    model_name(context.config.student)
    select_gpu(gpu)
    if plan:
        summaries.print_plan(pipeline.plan_training(context), common.json)
        return
    with held(context.run, context.config):
        pipeline.train(context, only, fresh)
    summaries.print_train(context, only, common.json)


@app.command()
@common_options
def export(
    quant: Annotated[str | None, typer.Option("--quant", help="q4_k_m, q5_k_m, q6_k, q8_0, f16 ..")] = None,
    ollama: Annotated[
        str | None, typer.Option("--ollama", metavar="NAME", help="Also run `ollama create NAME`.")
    ] = None,
    form: Annotated[
        str, typer.Option("--format", help="gguf; lora for the adapter alone; data for other trainers.")
    ] = "gguf",
    *,
    common: Common,
) -> None:
    """Write a GGUF and a Modelfile for llama.cpp and Ollama."""
    from sclite import evaluation, pipeline
    from sclite.inspect import summaries

    if form not in ("gguf", "lora", "data"):
        raise UsageError(f"--format {form}: no such format", "use --format gguf, lora or data")
    context = common.context({"export.quant": quant, "export.ollama": ollama})
    with context.run.lock():
        if form == "lora":
            summaries.print_lora(pipeline.export_lora(context), common.json)
            return
        if form == "data":
            summaries.print_datasets(pipeline.export_data(context), common.json)
            return
        report = pipeline.export(context)[0]
        created = None
        if context.config.export.ollama:
            from sclite.export.ollama import create_model

            created = create_model(context.config.export.ollama, context.run.path("export/Modelfile"))
    fitted = context.config.review.threshold is not None
    if not fitted and created is None and not common.json:  # a large file is read as a whole for this
        fitted = evaluation.stored_threshold(context, Path(report.figures["gguf"])) is not None
    summaries.print_export(context, report, created, fitted, common.json)


@app.command("eval")
@common_options
def evaluate(
    problems: Annotated[
        str | None,
        typer.Argument(help="Held-out problems: a file or a dataset's Hub ID (default: eval.source)."),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=10, help="Rows to use.")] = None,
    models: Annotated[
        str | None,
        typer.Option("--models", help="base, sft, dpo, with commas between (default: all there are)."),
    ] = None,
    *,
    common: Common,
) -> None:
    """Accuracy before and after review, with intervals."""
    from sclite import evaluation, pipeline
    from sclite.evaluate import table

    context = common.context({"eval.source": problems, "eval.limit": limit})
    names = (
        [name.strip() for name in models.split(",") if name.strip()]
        if models
        else pipeline.available(context)
    )
    unknown = [name for name in names if name not in pipeline.STUDENTS]
    if unknown:
        raise UsageError(
            f"--models {','.join(unknown)}: no such student", f"use any of {', '.join(pipeline.STUDENTS)}"
        )
    with context.run.lock():
        held_out, fitting, dropped = evaluation.held_out(context)
        pipeline.export(context, names)
        folder, dataset = evaluation.result_folder(context)
        named = {"folder": folder, "dataset": dataset, "source": context.config.eval.source}
        summary = evaluation.evaluate(context, names, held_out, fitting, dropped=dropped, **named)
    if common.json:
        console.print_json(summary)
        return
    table.print_results(summary)
    console.print(f"Report: {console.escape(str(context.run.path(folder) / 'report.html'))}", wrap=False)


@app.command()
@common_options
def chat(
    question: Annotated[str | None, typer.Argument(help="Ask this one thing and leave.")] = None,
    self_correct: Annotated[
        bool, typer.Option("--self-correct", help="Let it review each answer and mend its wrong step.")
    ] = False,
    model: Annotated[
        Path | None, typer.Option("--model", help="A GGUF file; the run's own without it.")
    ] = None,
    *,
    common: Common,
) -> None:
    """Chat with the trained model; it corrects its own steps.

    Without a terminal: one question per line of stdin, one answer per line of stdout.
    """
    from sclite import evaluation
    from sclite.chat.repl import run_chat

    if question is not None and not question.strip():
        raise UsageError("the question is empty", "`sclite chat` alone lets you type several")
    if common.json and question is None:
        raise UsageError("--json needs a question", "sclite chat --json 'What is 17 + 25?'")
    context = common.context()
    unnamed = context.config.run == type(context.config)().run
    if unnamed and not context.run.folder.is_dir() and Path("runs/quickstart").is_dir():
        context = replace(common, run=Path("runs/quickstart")).context()
    path, threshold = evaluation.for_chat(context, model, self_correct)
    known = {}
    if context.config.teacher.embedded and model is None:
        from sclite.quickstart.problem_sets import test_problems
        from sclite.quickstart.stories import within

        known = {"example": test_problems(1)[0].question, "familiar": within}
    asked = {"self_correct": self_correct, "question": question, "as_json": common.json}
    if not run_chat(path, context.config, threshold, **asked, **known):
        raise typer.Exit(DATA)


@app.command()
@common_options
def show(
    what: Annotated[
        str | None,
        typer.Argument(
            help="problems, templates, attempts, reviews, pairs or drops; without it, what there is."
        ),
    ] = None,
    reason: Annotated[str | None, typer.Option("--reason", help="Drops of this reason alone.")] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            "--kind",
            help="right, wrong, unknown; correction, confirmation; decision, content; a drop's stage.",
        ),
    ] = None,
    id: Annotated[str | None, typer.Option("--id", help="Rows whose id begins so.")] = None,
    first: Annotated[int, typer.Option("--from", min=1, help="The first row to show, from 1.")] = 1,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Rows to show.")] = None,
    labels: Annotated[
        bool, typer.Option("--labels", help="Token by token, with what carries loss in training.")
    ] = False,
    *,
    common: Common,
) -> None:
    """Show the rows of a run, and what was dropped and why."""
    from sclite.inspect import tables
    from sclite.inspect.rows import Choice
    from sclite.run import Run

    config = common.load()
    run = Run(config.run)
    if labels:
        tables.print_labels(
            config, run, Choice(what or "templates", reason, kind, id, first, limit), common.json
        )
    elif what is None:
        tables.print_overview(run, common.json)
    else:
        tables.print_rows(run, Choice(what, reason, kind, id, first, limit), common.json)


@app.command()
@common_options
def status(*, common: Common) -> None:
    """Progress of a run, its costs, and the next command."""
    from sclite.inspect import tables
    from sclite.inspect.status import status as read_status
    from sclite.run import Run

    config = common.load()
    tables.print_status(read_status(config, Run(config.run)), common.json)
