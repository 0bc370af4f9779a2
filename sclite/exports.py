"""Writes the exported files of a run, fits their review threshold, and finds them for chat and server."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from sclite.context import Context
from sclite.errors import DataError
from sclite.evaluate.threshold import MIN_PROBLEMS, ensure_threshold, is_current, load_threshold
from sclite.records import Problem
from sclite.run import Report
from sclite.student.adapters import STUDENTS, adapter_weights
from sclite.student.ggufs import adapters_of, export_stage, find_ggufs, gguf_path, inputs_of
from sclite.student.recorder import recorded
from sclite.student.step_scores import Cutoff

PARTIAL = "export/threshold.partial.jsonl"
REVIEW_OFF = "review is off; turn it on with --self-correct"


def check_chat_template(context: Context) -> None:
    """Raise before hours of training if a type or the chat template cannot be exported. Loads only the tokenizer."""
    from sclite.export.chat_format import trained_format
    from sclite.export.quantize import quantization_type
    from sclite.student.loader import load_tokenizer, model_name

    for quant in context.config.export.types:
        quantization_type(quant)
    with context.display.wait("checking the chat template"):
        trained_format(context.config, load_tokenizer(model_name(context.config.student)))


def export(context: Context, names: Sequence[str] = ()) -> list[Report]:
    """Export GGUFs of the named students (default: the last one trained), with its Modelfile and model card."""
    from sclite.export.model import describe_sizes, export_model
    from sclite.export.ollama import write_modelfile
    from sclite.train.stage import quiet_libraries

    chosen = list(names) or context.students()[-1:]
    if missing := [name for name in chosen if name not in context.students()]:
        hint = "run `sclite train` first"
        raise DataError(f"{context.run.path(adapter_weights(missing[0]))} is missing", hint)
    quiet_libraries()
    if chosen == ["base"] and not names:
        context.display.print("no trained student yet: this exports the base model")
    made = []
    config, run, sizes = context.config, context.run, ""
    if any(run.done(export_stage(name, config), inputs_of(config, run, name)) is None for name in chosen):
        sizes = f" ({describe_sizes(config)})"  # known only if the base model is present
    text = f"export: merge, write GGUF, quantize{sizes}"
    with context.display.stage("export", text) as progress:
        for number, name in enumerate(chosen, 1):
            made.append(export_model(context.config, context.run, name))
            progress(number, len(chosen))
        if chosen[-1] == context.students()[-1]:
            path, warnings = write_modelfile(context.run, context.config, chosen[-1])
            made[-1].figures |= {"modelfile": str(path), "warnings": list(warnings)}
    written = [f"{file['megabytes']:g} MB" for report in made for file in report.figures["files"].values()]
    context.reports += made
    skipped = all(report.skipped for report in made)
    context.display.done("export", f"export: {len(written)} GGUF ({', '.join(written)})", skipped)
    return made


def fit_review_threshold(context: Context, problems: Sequence[Problem]) -> None:
    """Fit the review threshold of the last GGUF on problems kept out of training, unless none is needed or it is set."""
    from sclite.grading.grader import Grader
    from sclite.student.llama_cpp.engine import Engine
    from sclite.student.work_counter import WorkCounter

    config, run = context.config, context.run
    if not config.review.needs_fit:
        return
    path = gguf_path(run, context.students()[-1], config)
    fitted = load_threshold(config, run, path)
    skipped = is_current(config, fitted, len(problems))
    if fitted is None or not skipped:
        text = f"threshold: {len(problems)} problems kept out of training, solved and reviewed"
        enough = len(problems) >= MIN_PROBLEMS  # else the file need not be loaded
        with (
            context.display.stage("threshold", text) as progress,
            Grader() as grader,
            Engine(path, context=config.eval.context, unified=False) if enough else nullcontext() as engine,
        ):

            def count(solved: int, share: float, note: str) -> None:
                progress(solved, len(problems), share=share, note=note)

            if engine is None:
                fitted = ensure_threshold(config, run, path, None, problems, grader)
            else:
                with recorded(
                    engine, run.path(PARTIAL), f"{run.file_digest(str(path.resolve()))} {config.eval.context}"
                ) as recorder:
                    student = WorkCounter(recorder, len(problems), len(problems), count)
                    fitted = ensure_threshold(config, run, path, student, problems, grader)
    report = Report("threshold", {"problems": fitted.problems}, figures=fitted.model_dump(), skipped=skipped)
    remedy = "; `sclite eval PROBLEMS` fits it on others" if fitted.problems < MIN_PROBLEMS else ""
    context.add(report, f"threshold: {fitted.summary}{remedy}")


def for_chat(
    context: Context, model: Path | None, self_correct: bool | None
) -> tuple[Path, Cutoff | None, str]:
    """Choose the model for chat: (GGUF, when its steps are corrected, why review is off or "").

    Exports the last trained student if no GGUF was made from its adapter. If the chosen file has no threshold, uses the
    largest one in another quantization that has one. `self_correct`: True raises DataError if no threshold was fitted;
    None uses one if there is one.
    """
    last = context.students()[-1]
    later = STUDENTS[STUDENTS.index(last) :]
    if model is None and last != "base" and not any(find_ggufs(context.run, name) for name in later):
        with context.run.lock():
            export(context)
    path, review = find_gguf(context, model), context.config.review
    fitted = load_threshold(context.config, context.run, path) if review.needs_fit else None
    if self_correct is False:  # it can be switched on in the chat
        cutoff = fitted.cutoff if fitted else None if review.needs_fit else Cutoff.of(review)
        return path, cutoff, REVIEW_OFF
    if review.mode == "guided" and review.rounds == 0:
        return path, None, "review is off: review.rounds is 0"
    if not review.needs_fit:
        return path, Cutoff.of(review), ""
    student = path.name.partition("-")[0] if model is None else ""
    others = find_ggufs(context.run, student) if student and fitted is None else ()
    for other in sorted(others, key=lambda other: -other.stat().st_size):
        if fitted := load_threshold(context.config, context.run, other):
            context.display.print(f"{path.name} has no fitted review threshold: using {other.name}")
            path = other
            break
    if fitted is not None:
        if fitted.max_harm > review.max_harm:
            limit = f"review.max_harm {fitted.max_harm:g}, not {review.max_harm:g}"
            context.run.warn(f"the review threshold of {path.name} was fitted with {limit}")
        return path, fitted.cutoff, f"review is off: {fitted.off}" if fitted.off else ""
    reason = f"the review threshold of {path.name} has not been fitted"
    hint = "run `sclite train`" if student == "dpo" else "run `sclite eval PROBLEMS`"
    hint += " in its run" if model is not None else ""
    hint += ", or set it: --set review.threshold=0"
    if self_correct:
        raise DataError(reason, hint)
    return path, None, f"review is off: {reason}; {hint}"


def find_gguf(context: Context, model: Path | None) -> Path:
    """The GGUF to chat with: `model`, or the run's last trained student. Raises DataError if there is none."""
    if model is not None:
        if not model.is_file():
            hint = "pass the path of a GGUF file; a LiteLLM model is PROVIDER/NAME"
            raise DataError(f"{model} does not exist", hint)
        return model
    for name in reversed(STUDENTS):
        run, chosen = context.run, gguf_path(context.run, name, context.config)
        if found := find_ggufs(run, name):
            path = chosen if chosen in found else max(found, key=lambda path: path.stat().st_mtime)
            if run.path(adapter_weights(name)).is_file() and path.name not in adapters_of(run, name):
                run.warn(f"{path} may have been made from an earlier adapter: its export is not recorded")
            return path
    hint = "run `sclite train` first, or `sclite quickstart` for the bundled student"
    raise DataError(f"{context.run.path('export')} contains no GGUF", hint)
