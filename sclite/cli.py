"""The commands: each parses its options, calls one stage and prints its report.

Everything heavy is imported inside a command, so that --help stays fast.
"""

import re
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperGroup

from sclite import console
from sclite.errors import DATA, FAILED, ScliteError, UsageError
from sclite.options import Common, ConfigOption, JsonOption, common_options, hold_run

if TYPE_CHECKING:
    from typer._click import Context, HelpFormatter

FreshOption = Annotated[bool, typer.Option("--fresh", help="Retrain if the inputs of a model have changed.")]
GpuOption = Annotated[
    int | None,
    typer.Option(
        "--gpu", metavar="N", min=0, help="The CUDA GPU to use (default: the first, or the CPU if none)."
    ),
]
ProblemsArgument = Annotated[
    str | None, typer.Argument(metavar="PROBLEMS", help="A file or a Hub ID (default: problems.source).")
]
LimitOption = Annotated[
    int | None,
    typer.Option("--limit", metavar="N", min=1, help="Use only the first N problems (default: all)."),
]
MaxCostOption = Annotated[
    float | None,
    typer.Option("--max-cost", metavar="USD", min=0, help="Spending limit for the whole run."),
]
YesOption = Annotated[bool, typer.Option("--yes", help="Do not ask to confirm the cost.")]

START, BUILD, USE, INSPECT = "Start", "Build data and train", "Evaluate and use", "Inspect a run"


class CommandGroups(TyperGroup):
    """Lists the commands by their panels in plain text: importing rich takes longer than the rest of --help."""

    def format_commands(self, ctx: "Context", formatter: "HelpFormatter") -> None:
        panels: dict[str, list[tuple[str, str]]] = {}
        for name, command in self.commands.items():
            panel = panels.setdefault(getattr(command, "rich_help_panel", ""), [])
            panel.append((f"{name:10}", command.get_short_help_str(formatter.width)))
        for heading, rows in panels.items():
            with formatter.section(heading):
                formatter.write_dl(rows)


app = typer.Typer(
    name="sclite",
    cls=CommandGroups,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Train a small model to reason in steps and correct itself, on one consumer GPU.",
)


def _print_version(requested: bool) -> None:
    if requested:
        from importlib.metadata import version

        console.print(f"sclite {version('sclite')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    pass


@app.command(rich_help_panel=START)
@common_options
def quickstart(
    problems: Annotated[
        int | None,
        typer.Option(
            "--problems", metavar="N", min=200, help="Training problems (default: those of the run, or 640)."
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
    with hold_run(Run(loaded.run), loaded):
        summary, example = flow.quickstart(loaded, fresh=fresh)
    if common.json:
        console.print_json(summary)
        return
    from sclite.evaluate import table

    table.print_results(summary)
    table.print_example(example)
    console.print(
        f"\nReport: {console.escape(str(Path(loaded.run) / summary['folder'] / 'report.html'))}\n\nNext steps:"
    )
    chat = console.escape(f"sclite chat --self-correct --run {quote(str(loaded.run))}")
    console.print(f"  [bold cyan]{chat}[/]  talk to the student", wrap=False)
    console.print("  [bold cyan]sclite init[/]  a configuration for your own problems", wrap=False)


@app.command(rich_help_panel=START)
def init(config: ConfigOption = None, json: JsonOption = False) -> None:
    """Write a commented sclite.toml for this machine."""
    from sclite import doctor, settings

    found = doctor.probe_gpus()
    path = config or Path(settings.FILE)
    settings.write_configuration(path, max(total for _, total, _ in found) if found else None)
    if json:
        console.print_json({"config": str(path), "gpus": [name for name, _, _ in found]})
        return
    gpu = f"{found[0][0]}, {found[0][1]:.0f} GB" if found else "no CUDA GPU, bundled student on the CPU"
    console.print(f"Created {console.escape(str(path))} for this machine ({console.escape(gpu)}).")
    console.print(
        "Next: set teacher.model and problems.source in it, then run [bold cyan]sclite build-data[/]",
        wrap=False,
    )
    if not found:
        console.note(
            "[yellow]note:[/] the bundled student can learn the quickstart's word problems only; set student.model for others"
        )


@app.command(rich_help_panel=START)
@common_options
def doctor(*, common: Common) -> None:
    """Check the environment and suggest fixes.

    Teacher and Hub are checked if the configuration names them. Exits with code 1 if something required is missing.
    """
    from sclite import config, doctor

    checks = []
    try:
        settings, broken = common.load(), []
    except ScliteError as error:
        settings = config.Config()
        broken = [doctor.Check("configuration", False, error.message, error.hint, required=True)]
    for check in console.spin(chain(broken, doctor.run_checks(settings)), "checking this machine"):
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


@app.command("build-data", rich_help_panel=BUILD)
@common_options
def build_data(
    problems: ProblemsArgument = None,
    limit: LimitOption = None,
    only: Annotated[
        str | None, typer.Option("--only", metavar="PART", help="Build only templates or corrections.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Discard replies to another teacher model or prompt.")
    ] = False,
    max_cost: MaxCostOption = None,
    yes: YesOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the first request and the cost; send nothing.")
    ] = False,
    *,
    common: Common,
) -> None:
    """Build thought templates and corrections with the teacher.

    Corrections need a student after SFT, or attempts.student.
    """
    from sclite import pipeline
    from sclite.inspect import summaries

    if only not in (None, "templates", "corrections"):
        raise UsageError(f"invalid value for --only: {only}", "use --only templates or --only corrections")
    context = common.context(
        {"problems.source": problems, "problems.limit": limit, "teacher.max_cost": max_cost}
    )
    pipeline.check_sources(context)
    if dry_run:
        context.dry = True
        forecast = pipeline.forecast_corrections if only == "corrections" else pipeline.forecast_templates
        with console.spinner("estimating"):
            found = forecast(context)
        summaries.print_dry_run(found, common.json)
        return
    context.ask_before_paying = not yes
    with hold_run(context.run, context.config):
        if pipeline.has_problems(context):
            chosen = problems is not None or limit is not None
            pipeline.divided_problems(context, reread=only != "corrections" or chosen)
        if only != "corrections":
            pipeline.build_templates(context, fresh)
        trained = "sft" in pipeline.available(context)
        if only == "corrections" or (only is None and (trained or context.config.attempts.student)):
            pipeline.build_corrections(context, with_feedback=True)
            if pipeline.can_build_pairs(context):
                pipeline.build_pairs(context)
    summaries.print_build_data(context, only, common.json)


@app.command(rich_help_panel=BUILD)
@common_options
def train(
    gpu: GpuOption = None,
    only: Annotated[str | None, typer.Option("--only", metavar="STAGE", help="Run only sft or dpo.")] = None,
    fresh: FreshOption = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Show memory, time, disk and cost; train nothing.")
    ] = False,
    *,
    common: Common,
) -> None:
    """Train the student, export it and fit its review threshold."""
    from sclite import pipeline
    from sclite.inspect import summaries
    from sclite.student.loader import model_name, select_gpu

    context = common.context()
    model_name(context.config.student)
    with console.spinner("loading torch"):
        select_gpu(gpu)
    if plan:
        from sclite.inspect.plan import plan_training

        with console.spinner("planning the training"):
            planned = plan_training(context)
        summaries.print_plan(planned, common.json)
        return
    with hold_run(context.run, context.config):
        pipeline.train(context, only, fresh)
    summaries.print_train(context, only, common.json)


@app.command(rich_help_panel=BUILD)
@common_options
def run(
    problems: ProblemsArgument = None,
    limit: LimitOption = None,
    gpu: GpuOption = None,
    fresh: FreshOption = False,
    max_cost: MaxCostOption = None,
    yes: YesOption = False,
    *,
    common: Common,
) -> None:
    """Build data, train, export and evaluate.

    Shows the plan first. Evaluates only if eval.source is set. Re-run to resume.
    """
    from sclite import pipeline
    from sclite.inspect import summaries
    from sclite.student.loader import model_name, select_gpu

    context = common.context(
        {"problems.source": problems, "problems.limit": limit, "teacher.max_cost": max_cost}
    )
    model_name(context.config.student)
    pipeline.check_sources(context)
    with console.spinner("loading torch"):
        select_gpu(gpu)
    pipeline.report_plan(context)
    context.ask_before_paying = not yes
    with hold_run(context.run, context.config):
        if pipeline.has_problems(context):
            pipeline.divided_problems(context, reread=True)
        pipeline.build_templates(context, fresh)
        pipeline.train(context, fresh=fresh)
        summary = None
        if context.config.eval.source:
            summary = pipeline.evaluate_students(context, pipeline.available(context))
    summaries.print_train(context, None, common.json, summary)


@app.command("eval", rich_help_panel=USE)
@common_options
def evaluate(
    problems: Annotated[
        str | None,
        typer.Argument(
            metavar="PROBLEMS", help="Held-out problems: a file or a Hub ID (default: eval.source)."
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", metavar="N", min=10, help="Use only the first N problems (default: 500)."),
    ] = None,
    models: Annotated[
        str | None,
        typer.Option(
            "--models",
            metavar="LIST",
            help="Comma-separated: base, sft, dpo, ollama/NAME (default: all trained).",
        ),
    ] = None,
    *,
    common: Common,
) -> None:
    """Measure accuracy before and after self-correction."""
    from sclite import pipeline
    from sclite.evaluate import table

    context = common.context({"eval.source": problems, "eval.limit": limit})
    names = (
        [name.strip() for name in models.split(",") if name.strip()]
        if models
        else pipeline.available(context)
    )
    unknown = [name for name in names if name not in pipeline.STUDENTS and not name.startswith("ollama/")]
    if unknown:
        known = ", ".join(pipeline.STUDENTS)
        raise UsageError(
            f"invalid value for --models: {','.join(unknown)}", f"use any of {known}, or ollama/NAME"
        )
    with context.run.lock():
        summary = pipeline.evaluate_students(context, names)
    if common.json:
        console.print_json(summary)
        return
    table.print_results(summary)
    console.print(
        f"Report: {console.escape(str(context.run.path(summary['folder']) / 'report.html'))}", wrap=False
    )


@app.command(rich_help_panel=USE)
@common_options
def export(
    quant: Annotated[
        str | None,
        typer.Option(
            "--quant",
            metavar="TYPES",
            help="q4_k_m, q8_0, f16 .., or several: q4_k_m,q8_0 (default: q4_k_m).",
        ),
    ] = None,
    ollama: Annotated[
        str | None, typer.Option("--ollama", metavar="NAME", help="Also create this model in Ollama.")
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(
            "--push", metavar="REPO", help="Upload the files and their card to the Hub: OWNER/NAME."
        ),
    ] = None,
    format: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="gguf, lora (adapter only), merged (a Hugging Face folder) or data (rows for other trainers).",
        ),
    ] = "gguf",
    imatrix: Annotated[
        bool | None,
        typer.Option(
            "--imatrix/--no-imatrix", help="Use an importance matrix (default: for types below 5 bits)."
        ),
    ] = None,
    keep_template: Annotated[
        bool | None,
        typer.Option("--keep-template", help="Export the model's own chat template as it is."),
    ] = None,
    *,
    common: Common,
) -> None:
    """Export a GGUF and a Modelfile for llama.cpp and Ollama."""
    from sclite import pipeline
    from sclite.evaluate.threshold import load_threshold
    from sclite.export import hub
    from sclite.inspect import summaries
    from sclite.run import Report

    if format not in ("gguf", "lora", "merged", "data"):
        raise UsageError(f"invalid value for --format: {format}", "use --format gguf, lora, merged or data")
    context = common.context(
        {
            "export.quant": quant,
            "export.ollama": ollama,
            "export.push": push,
            "export.imatrix": imatrix,
            "export.keep_template": keep_template,
        }
    )
    settings, kind = context.config.export, "dataset" if format == "data" else "model"
    created, url = None, ""
    with context.run.lock():
        if settings.push:
            url = hub.open_repository(settings, kind)
        if format == "gguf":
            report, folder = pipeline.export(context)[0], context.run.path("export")
            if settings.ollama:
                from sclite.export.ollama import create_model

                created = create_model(settings.ollama, folder / "Modelfile")
            files = hub.files_of(folder, [*report.figures["files"], "Modelfile", "README.md"])
        elif format == "lora":
            path, card = pipeline.export_lora(context)
            report, files = Report("lora", figures={"lora": str(path)}), {path.name: path, "README.md": card}
        elif format == "merged":
            from sclite.export.model import export_merged

            folder = export_merged(context.config, context.run, pipeline.available(context)[-1])
            report, files = Report("merged", figures={"merged": str(folder)}), hub.files_of(folder)
        else:
            from sclite.export.datasets import export_data

            report = export_data(context.config, context.run)
            files = hub.files_of(Path(report.figures["folder"]))
        if url:
            hub.upload(settings, files, kind)
    report.figures |= {"url": url} if url else {}
    if format == "data":
        summaries.print_datasets(report, settings.license, common.json)
    elif format != "gguf":
        summaries.print_path(format, report, common.json)
    else:
        gguf = Path(report.figures["gguf"])
        review = context.config.review
        fitted = review.mode == "free" or review.threshold is not None
        if not (fitted or common.json or created is not None):  # reads the whole GGUF
            fitted = load_threshold(context.config, context.run, gguf) is not None
        summaries.print_export(context, report, created, fitted, common.json)
    if url and not common.json:
        console.print(f"Uploaded to {console.escape(url)}", wrap=False)
        if not settings.license:
            console.note("[yellow]note:[/] the card names no license; set export.license")


@app.command(rich_help_panel=USE)
@common_options
def chat(
    question: Annotated[
        str | None,
        typer.Argument(
            metavar="QUESTION", help="Answer this question and exit; or a model, such as ollama/qwen3:8b."
        ),
    ] = None,
    self_correct: Annotated[
        bool | None,
        typer.Option(
            "--self-correct/--no-self-correct",
            help="Review each answer and correct its wrong step (default: where a threshold is known).",
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="A GGUF file, ollama/NAME, or another LiteLLM model (default: that of the run).",
        ),
    ] = None,
    *,
    common: Common,
) -> None:
    """Chat with the trained model.

    In a terminal, /help lists the commands. In a pipe, reads one question per line and writes one answer per line, or
    one object with --json.
    """
    from sclite import evaluation, pipeline
    from sclite.chat.repl import run_chat

    if model is None and question and re.fullmatch(r"[a-z][a-z0-9_]+/[A-Za-z][\w.:/-]*", question):
        model, question = Path(question), None  # ollama/qwen3:8b is no question
    if question is not None and not question.strip():
        raise UsageError("the question is empty", "run `sclite chat` without a question to type it")
    if common.json and question is None and console.is_interactive():
        raise UsageError("--json needs a question", "sclite chat --json 'What is 17 + 25?'")
    context = common.of_existing_run().context()
    # a model behind an API, such as ollama/qwen3:8b, and not a file
    remote = model is not None and not (model.parent.is_dir() or model.suffix == ".gguf")
    remote = remote and "/" in str(model) and not str(model).startswith(("/", ".", "~"))
    if model is None:
        pipeline.export_for_chat(context)
    if model is not None and remote:
        off = evaluation.REVIEW_OFF if self_correct is False else ""
        path, threshold = model, None
    else:
        path, threshold, off = evaluation.for_chat(context, model, self_correct)
    example, familiar = "", lambda _: True
    if context.config.teacher.embedded and model is None:
        from sclite.quickstart.problem_sets import test_problems
        from sclite.quickstart.stories import within

        example, familiar = test_problems(1)[0].question, within
    settings = context.config.attempts.model_copy(update={"student": str(model)})
    with context.endpoint(settings, "chat") if remote else nullcontext() as endpoint:
        answered = run_chat(
            path,
            context.config,
            threshold,
            context.run,
            off=off,
            endpoint=endpoint,
            question=question,
            example=example,
            familiar=familiar,
            as_json=common.json,
        )
    if not answered:
        raise typer.Exit(DATA)


@app.command(rich_help_panel=USE)
@common_options
def serve(
    model: Annotated[
        Path | None, typer.Option("--model", metavar="FILE", help="A GGUF file (default: that of the run).")
    ] = None,
    name: Annotated[
        str | None,
        typer.Option("--name", metavar="NAME", help="The model's name (default: that of the file)."),
    ] = None,
    host: Annotated[
        str, typer.Option("--host", metavar="HOST", help="The address to listen on.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", metavar="PORT", min=0, max=65535, help="0: any free port.")
    ] = 8000,
    parallel: Annotated[
        int | None,
        typer.Option(
            "--parallel", metavar="N", min=1, help="Answers written at once (default: 32, small models 4)."
        ),
    ] = None,
    *,
    common: Common,
) -> None:
    """Serve the trained model over an OpenAI-compatible API.

    It reviews and corrects its answers. The model NAME:raw replies without a review. Other machines need the key in
    SCLITE_API_KEY. With --json, prints the address as one object once it listens.
    """
    from sclite import evaluation, pipeline

    try:
        from sclite.chat.server import run_server
    except ImportError as error:
        raise UsageError(f"{error.name} is not installed", "pip install -e '.[serve]'") from None
    context = common.of_existing_run().context()
    if model is None:
        pipeline.export_for_chat(context)
    path, threshold, off = evaluation.for_chat(context, model, None)
    run_server(
        path,
        context.config,
        threshold,
        off=off,
        name=name or path.stem,
        host=host,
        port=port,
        parallel=parallel,
        as_json=common.json,
    )


@app.command(rich_help_panel=INSPECT)
@common_options
def status(*, common: Common) -> None:
    """Show the progress of a run, its cost and the next command."""
    from sclite.inspect import tables
    from sclite.inspect.status import read_status
    from sclite.run import Run

    config = common.of_existing_run().load()
    with console.spinner("checking what is done"):
        found = read_status(config, Run(config.run))
    tables.print_status(found, common.json)


@app.command(rich_help_panel=INSPECT)
@common_options
def show(
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="WHAT",
            help="problems, templates, attempts, reviews, pairs or drops (default: an overview).",
        ),
    ] = None,
    reason: Annotated[
        str | None, typer.Option("--reason", metavar="REASON", help="Only drops with this reason.")
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            "--kind",
            metavar="KIND",
            help="Only rows of this kind, such as wrong, correction or decision.",
        ),
    ] = None,
    id: Annotated[
        str | None, typer.Option("--id", metavar="PREFIX", help="Only rows whose id starts with this.")
    ] = None,
    first: Annotated[int, typer.Option("--from", metavar="N", min=1, help="Start at row N.")] = 1,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", min=1, help="Show at most N rows (default: all).")
    ] = None,
    labels: Annotated[
        bool, typer.Option("--labels", help="Show the tokens and which of them carry loss.")
    ] = False,
    *,
    common: Common,
) -> None:
    """Show the rows of a run, and why rows were dropped."""
    from sclite.inspect import tables
    from sclite.inspect.rows import Choice
    from sclite.run import Run

    config = common.of_existing_run().load()
    run = Run(config.run)
    if what is None and not labels:
        tables.print_overview(run, common.json)
        return
    choice = Choice(what or "templates", reason, kind, id, first, limit)
    tables.print_rows(config, run, choice, labels, common.json)


@app.command(rich_help_panel=INSPECT)
@common_options
def report(*, common: Common) -> None:
    """Open the HTML report of the newest evaluation."""
    from sclite.inspect.overview import show_report
    from sclite.run import Run

    show_report(Run(common.of_existing_run().load().run), common.json)


@app.command(rich_help_panel=INSPECT)
def runs(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder that holds the runs.")] = Path(
        "runs"
    ),
    json: JsonOption = False,
) -> None:
    """List the runs with student, stage, accuracy and size."""
    from sclite.inspect.overview import print_runs

    print_runs(folder, json)
