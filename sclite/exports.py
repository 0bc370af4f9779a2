"""Writes the exported files of a run, fits their review threshold, and finds them for chat and server."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from sclite.context import Context
from sclite.errors import DataError
from sclite.evaluate.threshold import MIN_PROBLEMS, ensure_threshold, is_current, load_threshold
from sclite.records import Problem
from sclite.run import Report
from sclite.student.adapters import STUDENTS, adapter_weights
from sclite.student.ggufs import find_ggufs, gguf_path
from sclite.student.recorder import WorkCounter, recorded
from sclite.student.step_scores import Cutoff

PARTIAL = "export/threshold.partial.jsonl"
REVIEW_OFF = "review is off; turn it on with --self-correct"


def check_chat_template(context: Context) -> None:
    """Raise before hours of training if a type or the chat template cannot be exported. Loads only the tokenizer."""
    from sclite.export.chat_format import trained_format
    from sclite.export.gguf import quantization_type
    from sclite.student.loader import load_tokenizer, model_name

    for quant in context.config.export.types:
        quantization_type(quant)
    with context.display.wait("checking the chat template"):
        trained_format(context.config, load_tokenizer(model_name(context.config.student)))


def export(context: Context, names: Sequence[str] = ()) -> list[Report]:
    """Export GGUFs of the named students (default: the last one trained), with its Modelfile and model card."""
    from sclite.export.gguf import estimate_bytes
    from sclite.export.model import export_model, finished_export
    from sclite.export.ollama import write_modelfile
    from sclite.export.reference import format_size
    from sclite.export.weights import BaseWeights
    from sclite.student.loader import fetch_model, model_name
    from sclite.train.stage import quiet_libraries

    config, run, students, sizes = context.config, context.run, context.students(), ""
    chosen = list(names) or students[-1:]
    if missing := [name for name in chosen if name not in students]:
        raise DataError(f"{run.path(adapter_weights(missing[0]))} is missing", "run `sclite train` first")
    quiet_libraries()
    if students == ["base"] and not names:
        context.display.print("no trained student yet: this exports the base model")
    if any(finished_export(config, run, name) is None for name in chosen):
        parameters = BaseWeights(fetch_model(model_name(config.student))).count_parameters()
        files = (f"{q} about {format_size(estimate_bytes(parameters, q))}" for q in config.export.types)
        sizes = f" ({', '.join(files)})"
    made = list[Report]()
    with context.display.stage("export", f"export: merge, write GGUF, quantize{sizes}") as progress:
        for number, name in enumerate(chosen, 1):
            made.append(export_model(config, run, name))
            progress(number, len(chosen))
        if chosen[-1] == students[-1]:
            path, warnings = write_modelfile(run, config, chosen[-1])
            made[-1].figures |= {"modelfile": str(path), "warnings": warnings}
    written = [f"{file['megabytes']:g} MB" for report in made for file in report.figures["files"].values()]
    context.reports += made
    skipped = all(report.skipped for report in made)
    context.display.done("export", f"export: {len(written)} GGUF ({', '.join(written)})", skipped)
    return made


def fit_review_threshold(context: Context, problems: Sequence[Problem]) -> None:
    """Fit the review threshold of the last GGUF on problems kept out of training, unless none is needed or it is set."""
    from sclite.grading.grader import Grader
    from sclite.student.llama_cpp.engine import Engine

    config, run = context.config, context.run
    if not config.review.needs_fit:
        return
    path = gguf_path(run, context.students()[-1], config)
    fitted = load_threshold(config, run, path)
    skipped = is_current(fitted, len(problems))
    if fitted is None or not skipped:
        text = f"threshold: {len(problems)} problems kept out of training, solved and reviewed"
        with context.display.stage("threshold", text) as progress, Grader() as grader, ExitStack() as stack:
            student = None
            if len(problems) >= MIN_PROBLEMS:  # else the file need not be loaded
                engine = stack.enter_context(Engine(path, context=config.eval.context))
                identity = f"{run.file_digest(str(path.resolve()))} {config.eval.context}"
                recorder = stack.enter_context(recorded(engine, run.path(PARTIAL), identity))
                n = len(problems)
                student = WorkCounter(
                    recorder, n, n, lambda solved, share, note: progress(solved, n, share=share, note=note)
                )
            fitted = ensure_threshold(config, run, path, student, problems, grader)
    report = Report("threshold", {"problems": fitted.problems}, figures=fitted.model_dump(), skipped=skipped)
    remedy = "; `sclite eval PROBLEMS` fits it on others" if fitted.problems < MIN_PROBLEMS else ""
    context.add(report, f"threshold: {fitted.summary}{remedy}")


def for_chat(
    context: Context, model: Path | None, self_correct: bool | None
) -> tuple[Path, Cutoff | None, str]:
    """Choose the model for chat: (GGUF, when its steps are corrected, why review is off or "").

    The GGUF is `model`, or the last trained student, which is exported if no GGUF was made from its adapter. Raises
    DataError if there is none. `self_correct`: True raises DataError if no threshold was fitted; None uses one if there
    is one.
    """
    run, review = context.run, context.config.review
    last = context.students()[-1]
    later = STUDENTS[STUDENTS.index(last) :]
    if model is None and last != "base" and not any(find_ggufs(run, name) for name in later):
        with run.lock():
            export(context)
    if model is None:
        made = ((name, find_ggufs(run, name)) for name in reversed(STUDENTS))
        newest, files = next((each for each in made if each[1]), ("", []))
        if not files:
            hint = "run `sclite train` first, or `sclite quickstart` for the bundled student"
            raise DataError(f"{run.path('export')} contains no GGUF", hint)
        chosen = gguf_path(run, newest, context.config)
        path = chosen if chosen in files else max(files, key=lambda path: path.stat().st_mtime)
    elif model.is_file():
        path = model
    else:
        hint = "pass the path of a GGUF file; a LiteLLM model is PROVIDER/NAME"
        raise DataError(f"{model} does not exist", hint)
    fitted = load_threshold(context.config, run, path) if review.needs_fit else None
    cutoff = fitted.cutoff if fitted else None if review.needs_fit else Cutoff.of(review)
    if self_correct is False:  # it can be switched on in the chat
        return path, cutoff, REVIEW_OFF
    if review.mode == "guided" and review.rounds == 0:
        return path, None, "review is off: review.rounds is 0"
    if fitted is not None or not review.needs_fit:
        return path, cutoff, f"review is off: {fitted.off}" if fitted and fitted.off else ""
    reason = f"the review threshold of {path.name} has not been fitted"
    fits_in_training = model is None and path.name.startswith("dpo-")
    hint = "run `sclite train`" if fits_in_training else "run `sclite eval PROBLEMS`"
    hint += " in its run" if model is not None else ""
    hint += ", or set it: --set review.threshold=0"
    if self_correct:
        raise DataError(reason, hint)
    return path, None, f"review is off: {reason}; {hint}"
