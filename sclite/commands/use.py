"""The commands that evaluate and use a student: eval, export, chat and serve."""

import re
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

import typer

from sclite import console
from sclite.errors import UsageError
from sclite.options import Common, argument, common_options, flag, option


@common_options
def evaluate(
    problems: Annotated[str | None, argument("PROBLEMS", "Held-out problems (default: eval.source).")] = None,
    limit: Annotated[int | None, option("N", "Only the first N problems (default: 500).", min=10)] = None,
    models: Annotated[
        str | None, option("LIST", "Some of base, sft, dpo and ollama/NAME, with commas (default: all).")
    ] = None,
    compare: Annotated[Path | None, option("RUN", "Also compare with another run's results.")] = None,
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
    summaries.print_results(context.run, summary, compare)


@common_options
def export(
    quant: Annotated[
        str | None, option("TYPES", "One or several: q8_0, or q4_k_m,q8_0 (default: q4_k_m).")
    ] = None,
    ollama: Annotated[str | None, option("NAME", "Also create this model in Ollama (gguf only).")] = None,
    push: Annotated[
        str | None, option("REPO", "Upload the files and a card to OWNER/NAME on the Hub.")
    ] = None,
    format: Annotated[
        Literal["gguf", "lora", "merged", "data"],
        option("FORMAT", "gguf, lora (adapter only), merged (a folder) or data."),
    ] = "gguf",
    imatrix: Annotated[
        bool | None, flag("--imatrix/--no-imatrix", "Use an importance matrix (default: below 5 bits).")
    ] = None,
    keep_template: Annotated[
        bool | None, flag("--keep-template", "Export the model's own chat template unchanged.")
    ] = None,
    *,
    common: Common,
) -> None:
    """Export a GGUF and a Modelfile for llama.cpp and Ollama."""
    from sclite import exports
    from sclite.export import hub
    from sclite.export import ollama as ollama_model
    from sclite.export.datasets import export_data
    from sclite.export.model import export_lora, export_merged
    from sclite.export.reference import QUESTION
    from sclite.inspect import summaries
    from sclite.run import Report

    if format != "gguf" and (quant or ollama or imatrix is not None):
        wrong = f"--format {format} takes no --quant, --imatrix or --ollama"
        raise UsageError(wrong, "omit them, or use --format gguf")
    chosen = dict(quant=quant, ollama=ollama, push=push, imatrix=imatrix, keep_template=keep_template)
    context = common.of_existing_run().context({f"export.{name}": value for name, value in chosen.items()})
    settings, kind = context.config.export, "dataset" if format == "data" else "model"
    compared, url = None, ""
    if settings.ollama and format == "gguf":
        ollama_model.check_ollama(settings.ollama)
    with context.run.lock():
        if settings.push:
            url = hub.open_repository(settings, kind)
        if format == "gguf":
            report, others = exports.export(context)[0], ("Modelfile", "README.md", "threshold.json")
            if settings.ollama:
                ollama_model.create_model(settings.ollama, context.run.path("export/Modelfile"))
                compared = ollama_model.compare_replies(
                    context.config, Path(report.figures["gguf"]), QUESTION
                )
            files = hub.files_of(context.run.path("export"), [*report.figures["files"], *others])
        elif format in ("lora", "merged"):
            write = export_lora if format == "lora" else export_merged
            with context.display.wait(f"exporting the {'adapter' if format == 'lora' else 'merged model'}"):
                figures = write(context.config, context.run, context.students()[-1])
            report, path = Report(format, figures=figures), Path(figures[format])
            files = {path.name: path, "README.md": path.with_suffix(".md")}
            files = hub.files_of(path) if path.is_dir() else files
        else:
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
        summaries.print_export(context, report, compared, common.json)


@common_options
def chat(
    question: Annotated[
        str | None, argument("QUESTION", "Answer this and exit; or a model such as ollama/NAME.")
    ] = None,
    self_correct: Annotated[
        bool | None,
        flag("--self-correct/--no-self-correct", "Review answers (default: if a threshold is known)."),
    ] = None,
    model: Annotated[
        Path | None, option("MODEL", "A GGUF, ollama/NAME or LiteLLM model (default: the run's).")
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
    # a model behind an API, such as ollama/qwen3:8b, and not a path
    local = (
        model is None or model.suffix == ".gguf" or model.exists() or str(model).startswith(("/", ".", "~"))
    )
    example, endpoint = "", None
    if context.config.teacher.embedded and model is None:
        from sclite.quickstart.stories import problem_set

        example = problem_set("test", 1)[0].question
    with ExitStack() as stack:
        if model is not None and not local:
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
    model: Annotated[Path | None, option("FILE", "A GGUF file (default: the run's).")] = None,
    name: Annotated[str | None, option("NAME", "The model's name (default: the file's).")] = None,
    host: Annotated[str, option("HOST", "The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, option("PORT", "0: any free port.", min=0, max=65535)] = 8000,
    parallel: Annotated[int | None, option("N", "Concurrent answers (default: up to 32).", min=1)] = None,
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
