"""The commands that evaluate and use a student: eval, export, chat and serve."""

import re
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from sclite import console
from sclite.errors import UsageError
from sclite.options import Common, common_options


@common_options
def evaluate(
    problems: Annotated[
        str | None, typer.Argument(metavar="PROBLEMS", help="Held-out problems (default: eval.source).")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=10, help="Only the first N problems (default: 500).")
    ] = None,
    models: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Comma-separated: base, sft, dpo, ollama/NAME (default: all)."),
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Also compare with another run's results."),
    ] = None,
    *,
    common: Common,
) -> None:
    """Measure accuracy before and after self-correction."""
    from sclite import pipeline
    from sclite.inspect import summaries
    from sclite.run import Run
    from sclite.student.adapters import STUDENTS

    context = common.context({"eval.source": problems, "eval.limit": limit})
    names = context.students()
    if models is not None:
        requested = [name.strip() for name in models.split(",") if name.strip()]
        names = list(dict.fromkeys(name for name in (*STUDENTS, *requested) if name in requested))
    if not names or any(name not in STUDENTS and not name.startswith("ollama/") for name in names):
        hint = f"use any of {', '.join(STUDENTS)}, or ollama/NAME"
        raise UsageError(f"invalid value for --models: {models}", hint)
    with context.run.lock():
        summary = pipeline.evaluate_students(context, names, Run(compare) if compare else None)
    if common.json:
        console.print_json(summary)
        return
    summaries.print_results(context.run, summary)
    if compare:
        summaries.print_comparison(compare, summary["compared"])


@common_options
def export(
    quant: Annotated[
        str | None,
        typer.Option(metavar="TYPES", help="One or several types: q8_0, or q4_k_m,q8_0 (default: q4_k_m)."),
    ] = None,
    ollama: Annotated[
        str | None, typer.Option(metavar="NAME", help="Also create this model in Ollama (gguf only).")
    ] = None,
    push: Annotated[
        str | None, typer.Option(metavar="REPO", help="Upload the files and a card to OWNER/NAME on the Hub.")
    ] = None,
    format: Annotated[
        str,
        typer.Option(
            metavar="FORMAT",
            help="gguf, lora (adapter only), merged (a Hugging Face folder) or data (rows for other trainers).",
        ),
    ] = "gguf",
    imatrix: Annotated[
        bool | None,
        typer.Option("--imatrix/--no-imatrix", help="Use an importance matrix (default: below 5 bits)."),
    ] = None,
    keep_template: Annotated[
        bool | None, typer.Option("--keep-template", help="Export the model's own chat template unchanged.")
    ] = None,
    *,
    common: Common,
) -> None:
    """Export a GGUF and a Modelfile for llama.cpp and Ollama."""
    from sclite import exports, pipeline
    from sclite.evaluate.threshold import load_threshold
    from sclite.export import hub
    from sclite.export.ollama import find_ollama
    from sclite.inspect import summaries
    from sclite.run import Report

    if format not in ("gguf", "lora", "merged", "data"):
        raise UsageError(f"invalid value for --format: {format}", "use --format gguf, lora, merged or data")
    if format != "gguf" and (quant or ollama or imatrix is not None):
        raise UsageError(
            f"--format {format} takes no --quant, --imatrix or --ollama", "omit them, or use --format gguf"
        )
    chosen = dict(quant=quant, ollama=ollama, push=push, imatrix=imatrix, keep_template=keep_template)
    context = common.of_existing_run().context({f"export.{name}": value for name, value in chosen.items()})
    settings, kind = context.config.export, "dataset" if format == "data" else "model"
    compared, url = None, ""
    if settings.ollama and format == "gguf":
        find_ollama(settings.ollama)
    with context.run.lock():
        if settings.push:
            url = hub.open_repository(settings, kind)
        if format == "gguf":
            report, folder = exports.export(context)[0], context.run.path("export")
            if settings.ollama:
                compared = pipeline.create_in_ollama(context, Path(report.figures["gguf"]))
            files = hub.files_of(
                folder, [*report.figures["files"], "Modelfile", "README.md", "threshold.json"]
            )
        elif format == "lora":
            from sclite.export.model import export_lora

            with context.display.wait("converting the adapter"):
                figures = export_lora(context.config, context.run, context.students()[-1])
            report, path = Report("lora", figures=figures), Path(figures["lora"])
            files = {path.name: path, "README.md": path.with_suffix(".md")}
        elif format == "merged":
            from sclite.export.model import export_merged

            with context.display.wait("merging the adapter and comparing"):
                figures = export_merged(context.config, context.run, context.students()[-1])
            report, files = Report("merged", figures=figures), hub.files_of(Path(figures["merged"]))
        else:
            from sclite.export.datasets import export_data

            report = export_data(context.config, context.run)
            files = hub.files_of(Path(report.figures["folder"]))
        if url:
            hub.upload(settings, files, kind)
    report.figures |= {"url": url} if url else {}
    if url and not common.json:
        console.print(f"Uploaded to {console.escape(url)}", wrap=False)
        if not settings.license:
            console.note("[yellow]note:[/] this upload has no license; set export.license")
    if format != "gguf":
        summaries.print_files(format, report, settings.license, common.json)
    else:
        gguf = Path(report.figures["gguf"])
        fitted = common.json or bool(compared) or not context.config.review.needs_fit
        # reads the whole GGUF
        fitted = fitted or load_threshold(context.config, context.run, gguf) is not None
        same = [setting for setting in common.settings or [] if setting.startswith("export.")]
        options = [key for key in ("quant", "imatrix", "keep_template") if chosen[key] is not None]
        same += [f"export.{key}={str(chosen[key]).lower()}" for key in options]
        summaries.print_export(context, report, same, compared, fitted, common.json)


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
            help="Review each answer and correct its wrong step (default: on if a threshold is known).",
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="MODEL",
            help="A GGUF file, ollama/NAME, or another LiteLLM model (default: the run's).",
        ),
    ] = None,
    *,
    common: Common,
) -> None:
    """Chat with the trained model.

    In a terminal, /help lists the commands. In a pipe, reads one question per line and writes one answer per line, or
    one object with --json.
    """
    from sclite import exports
    from sclite.chat.repl import run_chat
    from sclite.run import Run

    if model is None and question and re.fullmatch(r"[a-z][a-z0-9_]+/[A-Za-z][\w.:/-]*|\S+\.gguf", question):
        model, question = Path(question), None  # ollama/qwen3:8b and dpo.gguf are not questions
    if question is not None and not question.strip():
        raise UsageError("the question is empty", "run `sclite chat` without a question to type it")
    if common.json and question is None and console.is_interactive():
        raise UsageError("--json needs a question", "sclite chat --json 'What is 17 + 25?'")
    context = common.of_existing_run().context()
    # a model behind an API, such as ollama/qwen3:8b, even if a folder is called ollama; not a path, existing or not
    remote = model is not None and not (
        str(model).startswith(("/", ".", "~"))
        or model.suffix == ".gguf"
        or model.exists()
        or (model.parent.is_dir() and not str(model.parent).startswith("ollama"))
    )
    example, endpoint = "", None
    if context.config.teacher.embedded and model is None:
        from sclite.quickstart.problem_sets import problem_set

        example = problem_set("test", 1)[0].question
    with ExitStack() as stack:
        if model is not None and remote:
            path, cutoff, off = model, None, exports.REVIEW_OFF if self_correct is False else ""
            payer = context
            if not context.run.is_begun():  # write nothing if there is no run
                payer = replace(context, run=Run(stack.enter_context(TemporaryDirectory())))
            stack.enter_context(payer.run.lock())  # only one process may use the ledger
            settings = context.config.attempts.model_copy(update={"student": str(model)})
            endpoint = stack.enter_context(payer.endpoint(settings, "chat"))
        else:
            path, cutoff, off = exports.for_chat(context, model, self_correct)
        arguments = (path, context.config, cutoff, context.run, off, endpoint, question, example)
        code = run_chat(*arguments, as_json=common.json)
    if code:
        raise typer.Exit(code)


@common_options
def serve(
    model: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A GGUF file (default: the run's).")
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="The model's name (default: the file's).")
    ] = None,
    host: Annotated[str, typer.Option(metavar="HOST", help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="PORT", min=0, max=65535, help="0: any free port.")] = 8000,
    parallel: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Concurrent answers (default: up to 32).")
    ] = None,
    *,
    common: Common,
) -> None:
    """Serve the trained model over an OpenAI-compatible API.

    Answers are reviewed and corrected if a threshold is known; the model NAME:raw skips the review. Other machines need the key in
    SCLITE_API_KEY. With --json, prints the address as one object once the server is listening.
    """
    from sclite import exports

    try:
        from sclite.chat.server import run_server
    except ImportError as error:
        raise UsageError(f"{error.name} is not installed", "pip install -e '.[serve]'") from None
    context = common.of_existing_run().context()
    path, cutoff, off = exports.for_chat(context, model, None)
    run_server(path, context.config, cutoff, off, name or path.stem, host, port, parallel, common.json)
