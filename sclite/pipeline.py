"""The stages in their order: builds the world that each of them is given (teacher, student, grader) and calls it.

Commands and the quickstart are thin over this module; each function here is what one command does.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sclite.config import Config
from sclite.context import Context
from sclite.errors import DataError
from sclite.progress import ProgressDisplay
from sclite.records import Problem
from sclite.run import Report, Run

NAMES = ("base", "sft", "dpo")


def sides(context: Context, reread: bool = False) -> tuple[list[Problem], list[Problem]]:
    """(problems for SFT, problems kept for stage 2), gathered into problems.jsonl where no caller has given them.

    The source is read where the run has no problems of it yet, or is to be `reread`, as `build-data` does.
    """
    if context.problems is None:
        from sclite.data.problems import gather_problems, split_problems

        report = Report("problems")
        found = gather_problems(context.config, context.run, report, reread=reread, keep=not context.dry)
        context.add(report, f"problems: {len(found)}{_which(context.config, report)}{drops(report)}")
        context.problems = split_problems(context.config, found)
    return context.problems


def read_problems(context: Context, reread: bool) -> None:
    """Gather the run's problems where it has any; templates that were imported need none."""
    if _has_problems(context):
        sides(context, reread)


def _which(config: Config, report: Report) -> str:
    """In words where the problems are from: ` (the first 60 of gsm8k.jsonl)`."""
    source, limit = config.problems.source, config.problems.limit
    if report.figures.get("gone"):
        return f" in the run ({source} does not exist any more)"
    if not source or report.skipped:
        return " in the run"
    if limit is not None and report.counts["problems"] == limit:
        return f" (the first of {source}; problems.limit is {limit})"
    return f" (all rows of {source})"


def unseen(context: Context) -> frozenset[str]:
    """The ids of the problems that are kept for stage 2; none where templates were brought along without problems."""
    return frozenset(problem.id for problem in sides(context)[1]) if _has_problems(context) else frozenset()


def _has_problems(context: Context) -> bool:
    given = context.config.problems.source or context.run.path("problems.jsonl").is_file()
    return context.problems is not None or bool(given)


# -- build-data ----------------------------------------------------------------------------------------------------


def build_templates(context: Context, fresh: bool = False) -> Report:
    """Templates for all problems: SFT learns those of its side, stage 2 replays the others."""
    from sclite.data.templates import build_templates as stage
    from sclite.data.templates import is_imported
    from sclite.grading.worker import Grader

    brought = is_imported(context.run)
    problems = [] if brought and not _has_problems(context) else [p for side in sides(context) for p in side]
    with (
        context.display.stage("templates", "templates: the teacher writes thought traces") as progress,
        Grader() as grader,
        context.teacher() as teacher,
    ):
        report = stage(
            context.config,
            context.run,
            teacher=teacher,
            grader=grader,
            problems=problems,
            fresh=fresh,
            confirm=context.confirm if context.ask_before_paying else None,
            progress=progress,
        )
    return context.add(report, f"templates: {report.counts.get('templates', 0)} kept{drops(report)}")


def check_sources(context: Context) -> None:
    """Raises DataFault for an `attempts.source` that is not there, before anything is paid for."""
    source = context.config.attempts.source
    if source and not Path(source).is_file() and context.run.manifest("attempts") is None:
        raise DataError(
            f"attempts.source: {source} does not exist", "check the path; --set attempts.source= takes it out"
        )


def forecast_templates(context: Context) -> dict[str, Any]:
    """What build_templates would send first and what it would cost; the teacher is not asked."""
    from sclite.data.templates import forecast_templates as forecast
    from sclite.grading.worker import Grader

    problems = [problem for side in sides(context, reread=True) for problem in side]
    with Grader() as grader, context.teacher() as teacher:
        return forecast(context.config, context.run, teacher=teacher, grader=grader, problems=problems)


def forecast_corrections(context: Context) -> dict[str, Any]:
    """What build_corrections would send first and what it would cost; the teacher is not asked."""
    from sclite.data.corrections import forecast_corrections as forecast
    from sclite.grading.worker import Grader

    with Grader() as grader, context.teacher() as teacher:
        return forecast(context.config, context.run, teacher, grader)


def build_corrections(context: Context) -> Report:
    """Attempts of the student at the problems of stage 2, and the teacher's corrections of them.

    Attempts that are brought along may be at any problem of the run, and need no student.
    """
    from sclite.data.attempts import needs_no_student
    from sclite.data.corrections import FILE, STAGE
    from sclite.data.corrections import build_corrections as stage
    from sclite.grading.worker import Grader

    learned, kept = sides(context)
    if needs_no_student(context.config, context.run):
        kept = [*learned, *kept]
    if not kept:
        raise DataError(
            "no problems are kept for stage 2", "raise problems.correction_share or problems.limit"
        )
    if not context.run.is_imported(STAGE, FILE):
        _sample(context, kept)
    with (
        Grader() as grader,
        context.display.stage(
            "corrections", "corrections: the teacher finds the first wrong step and mends it"
        ) as progress,
        context.teacher() as teacher,
    ):
        confirm = context.confirm if context.ask_before_paying else None
        report = stage(
            context.config, context.run, teacher=teacher, grader=grader, confirm=confirm, progress=progress
        )
    counts = report.counts
    text = f"corrections: {counts.get('corrected', 0)} corrected, {counts.get('confirmed', 0)} confirmed{drops(report)}"
    return context.add(report, text)


def _sample(context: Context, problems: Sequence[Problem]) -> None:
    from sclite.data.attempts import inputs_of, needs_no_student

    brought = needs_no_student(context.config, context.run)
    doing = "they are brought along" if brought else f"the student tries {len(problems)} unseen problems"
    with context.display.stage("attempts", f"attempts: {doing}") as progress:
        nobody = brought or context.run.done("attempts", inputs_of(context.config, context.run, problems))
        if not nobody and context.config.attempts.kind == "trained":
            require_sft(context)
        report = context.on_card(attempts_stage, problems, not nobody, progress=progress)
    counts = report.counts
    unknown = f", {counts['unknown']} unknown" if counts.get("unknown") else ""
    told = f"{counts.get('right', 0)} right, {counts.get('wrong', 0)} wrong{unknown}{drops(report)}"
    context.add(report, f"attempts: {told}")


def attempts_stage(
    config: Config, run: Run, problems: Sequence[Problem], asks: bool, *, progress: Any
) -> Report:
    """The stage of attempts with its student where it `asks` one; can be done in another process."""
    from sclite.data.attempts import sample_attempts
    from sclite.grading.worker import Grader

    with Grader() as grader, _student(config, run, "sft/adapter", "attempts", asks) as student:
        return sample_attempts(
            config, run, problems=problems, student=student, grader=grader, progress=progress
        )


def pairs_stage(config: Config, run: Run, asks: bool, *, progress: Any) -> Report:
    """The stage of pairs with its student where it `asks` one; can be done in another process."""
    from sclite.data.pairs import build_pairs as stage
    from sclite.grading.worker import Grader

    with Grader() as grader, _student(config, run, "warmup/adapter", "pairs", asks) as student:
        return stage(config, run, student=student, grader=grader, progress=progress)


@contextmanager
def _student(config: Config, run: Run, adapter: str, stage: str, asked: bool) -> Iterator[Any]:
    if not asked:
        yield None
        return
    with Context(config, run, ProgressDisplay(quiet=True)).student(adapter, stage) as student:
        yield student


def can_build_pairs(context: Context) -> bool:
    """Whether pairs can follow the corrections at once: not where they wait for the trained student's warm-up.

    They need not where `attempts.student` names somebody else, nor where attempts were brought along and nobody has been
    trained (there are then decisions alone).
    """
    attempts = context.config.attempts
    return attempts.kind != "trained" or (bool(attempts.source) and available(context) == ["base"])


def require_sft(context: Context) -> None:
    """Raise DataFault where the run has no SFT adapter."""
    if not context.run.path("sft/adapter/adapter_model.safetensors").is_file():
        raise DataError(
            f"{context.run.path('sft/adapter')} is missing", "run `sclite train --only sft` first"
        )


def drops(report: Report) -> str:
    """In words for the line of a stage: `, 3 longer than max length`."""
    return "".join(
        f", {count} {reason.replace('_', ' ')}" for reason, count in sorted(report.dropped.items())
    )


# -- between the stages of training --------------------------------------------------------------------------------


def pairs_brought(context: Context) -> bool:
    """Whether a pairs.jsonl was put into the run."""
    from sclite.data.pairs import FILE, STAGE

    return context.run.is_imported(STAGE, FILE)


def build_pairs(context: Context) -> Report:
    from sclite.data.pairs import inputs_of

    nobody = (
        context.config.attempts.kind == "trained"
        and not context.run.path("warmup/adapter/adapter_model.safetensors").is_file()
    )
    ready = pairs_brought(context) or context.run.done("pairs", inputs_of(context.config, context.run))
    with context.display.stage(
        "pairs", "pairs: the student's own corrections against right ones"
    ) as progress:
        report = context.on_card(pairs_stage, not (nobody or ready), progress=progress)
    counts = report.counts
    return context.add(
        report,
        f"pairs: {counts.get('decision', 0)} decisions, {counts.get('content', 0)} contents{drops(report)}",
    )


# -- export and evaluation -----------------------------------------------------------------------------------------


def available(context: Context) -> list[str]:
    """The students that the run holds, the base model among them, in the order of training."""
    return [name for name in NAMES if name == "base" or _adapter(context, name).is_file()]


def _adapter(context: Context, name: str) -> Path:
    return context.run.path(f"{name}/adapter/adapter_model.safetensors")


def export(context: Context, names: Sequence[str] = ()) -> list[Report]:
    """GGUF files of the named students, of the furthest trained one without names; the Modelfile is the last one's."""
    from sclite.export.stage import export_model, write_modelfile
    from sclite.train.common import quiet

    chosen = list(names) or available(context)[-1:]
    missing = [name for name in chosen if name not in available(context)]
    if missing:
        raise DataError(f"{_adapter(context, missing[0])} is missing", "run `sclite train` first")
    quiet()
    made = []
    with context.display.stage("export", "export: merged, written as GGUF, quantised") as progress:
        for number, name in enumerate(chosen, 1):
            made.append(export_model(context.config, context.run, name))
            progress(number, len(chosen))
        path, warnings = write_modelfile(context.run, context.config, chosen[-1])
        made[-1].figures |= {"modelfile": str(path), "warnings": list(warnings)}
    sizes = ", ".join(f"{report.figures['megabytes']:g} MB" for report in made)
    context.display.done("export", f"export: {len(made)} GGUF ({sizes})", all(r.skipped for r in made))
    return made


def export_lora(context: Context) -> Path:
    """The furthest trained adapter alone as a GGUF, for llama.cpp's --lora."""
    from sclite.export.gguf import convert_lora
    from sclite.student.loader import fetch_base_model

    name = available(context)[-1]
    if name == "base":
        raise DataError(f"{_adapter(context, 'sft')} is missing", "run `sclite train` first")
    out = context.run.path(f"export/{name}-lora.gguf")
    out.parent.mkdir(parents=True, exist_ok=True)
    return convert_lora(_adapter(context, name).parent, fetch_base_model(context.config.student), out)


def export_data(context: Context) -> Report:
    """Templates, reviews and pairs in the forms that TRL, Axolotl and LLaMA-Factory read, with a data card."""
    from sclite.export.datasets import export_data as stage

    return stage(context.config, context.run)
