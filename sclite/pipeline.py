"""The stages in order. Each function here is what one command does: it makes the teacher, student and grader that a stage
needs, runs the stage, and reports it.

On a CUDA GPU each stage that needs the GPU runs in a process of its own (`context.isolated`). A training stage that runs
out of GPU memory resumes from its last checkpoint with half the micro-batch size.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sclite import exports
from sclite.config import Config
from sclite.context import Context
from sclite.errors import DataError, DeviceError, GpuMemoryError, UsageError
from sclite.progress import Progress, ProgressDisplay
from sclite.records import FEEDBACK, Problem, Review
from sclite.run import Report, Run
from sclite.student.adapters import STUDENTS, adapter_weights

if TYPE_CHECKING:
    from sclite.data.problems import Split

TRAINING = {
    "sft": "sft: the student learns the templates",
    "warmup": "warm-up: the student learns what a review looks like",
    "dpo": "dpo: the student learns to prefer right reviews",
}
"""What the training stages do."""


# -- problems ------------------------------------------------------------------------------------------------------


def divided_problems(context: Context, reread: bool = False) -> "Split":
    """The run's problems by their use, gathered into problems.jsonl unless the caller has given them.

    The source is read if the run has no problems of it yet, or with `reread`, as `build-data` does.
    """
    if context.problems is None:
        from sclite.data.problems import gather_problems, split_problems

        report, settings = Report("problems"), context.config.problems
        with context.display.wait("reading the problems"):
            found = gather_problems(context.config, context.run, report, reread=reread, keep=not context.dry)
        if report.figures.get("gone"):
            origin = f" in the run ({settings.source} does not exist any more)"
        elif not settings.source or report.skipped:
            origin = " in the run"
        elif settings.limit is not None and report.counts["problems"] == settings.limit:
            origin = f" (the first of {settings.source}; problems.limit is {settings.limit})"
        else:
            origin = f" (all rows of {settings.source})"
        context.add(report, f"problems: {len(found)}{origin}{drops(report)}")
        context.problems = split_problems(context.config, found)
    return context.problems


def unseen(context: Context, stage: str = "dpo") -> frozenset[str]:
    """Ids of the problems that SFT does not learn: those of stage 2 and, for `stage` sft, those of the fit.

    Empty if templates were imported without problems.
    """
    if not has_problems(context):
        return frozenset()
    split = divided_problems(context)
    return frozenset(problem.id for problem in (*split.stage2, *(split.fit if stage == "sft" else ())))


def has_problems(context: Context) -> bool:
    """Whether the run has problems: imported templates need none."""
    given = context.config.problems.source or context.run.path("problems.jsonl").is_file()
    return context.problems is not None or bool(given)


def check_sources(context: Context) -> None:
    """Raise DataError for a missing `attempts.source`, before anything is paid for."""
    source = context.config.attempts.source
    if source and not Path(source).is_file() and context.run.manifest("attempts") is None:
        raise DataError(
            f"attempts.source: {source} does not exist", "check the path, or unset it: --set attempts.source="
        )


def drops(report: Report) -> str:
    """The dropped rows for a stage's line: `, 3 longer than max length`."""
    return "".join(f", {n} {reason.replace('_', ' ')}" for reason, n in sorted(report.dropped.items()))


# -- templates -----------------------------------------------------------------------------------------------------


def build_templates(context: Context, fresh: bool = False) -> Report:
    """Templates for all problems but those of the fit: SFT learns those of its side, stage 2 replays the others."""
    from sclite.data import templates
    from sclite.grading.worker import Grader

    imported = context.run.is_imported("templates", "templates.jsonl") and not has_problems(context)
    split = None if imported else divided_problems(context)
    problems = [] if split is None else [*split.sft, *split.stage2]
    with (
        context.display.stage("templates", "templates: the teacher writes thought traces") as progress,
        Grader() as grader,
        context.teacher() as teacher,
    ):
        report = templates.write_templates(
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


def forecast(context: Context, part: str = "templates") -> dict[str, Any]:
    """The first request of build_templates, or of build_corrections, and the cost of all; sends nothing."""
    from sclite.data import corrections, templates
    from sclite.grading.worker import Grader

    with Grader() as grader, context.teacher() as teacher:
        if part == "corrections":
            return corrections.preview_corrections(context.config, context.run, teacher, grader)
        split = divided_problems(context, reread=True)
        problems = [*split.sft, *split.stage2]
        return templates.preview_templates(
            context.config, context.run, teacher=teacher, grader=grader, problems=problems
        )


# -- attempts, corrections and pairs -------------------------------------------------------------------------------


def build_corrections(context: Context, with_feedback: bool = False) -> Report:
    """The student's attempts at the problems of stage 2, and the teacher's corrections of them.

    Imported attempts may be at any problem of the run, and need no student. `with_feedback` adds the answers that users
    have judged in the chat since the last time.
    """
    from sclite.data import attempts, corrections, feedback
    from sclite.grading.worker import Grader

    config, run, split = context.config, context.run, divided_problems(context)
    kept = split.stage2
    if attempts.needs_no_student(config, run):
        kept = [*split.sft, *split.stage2, *split.fit]
    if not kept:
        raise DataError(
            "no problems are kept for stage 2", "raise problems.correction_share or problems.limit"
        )
    confirm = context.confirm if context.ask_before_paying else None
    judged = run.path(FEEDBACK).is_file() or run.manifest("feedback")
    if not run.is_imported("corrections", "reviews.jsonl"):
        imported = attempts.needs_no_student(config, run)
        text = "imported" if imported else f"the student tries {len(kept)} unseen problems"
        with context.display.stage("attempts", f"attempts: {text}") as progress:
            inputs = attempts.attempts_inputs(config, run, kept)
            ready = imported or run.done("attempts", inputs, "attempts.jsonl")
            if not ready and config.attempts.kind == "trained":
                require_sft(context)
            report = context.on_gpu(sample_student, "attempts", kept, not ready, progress=progress)
        counts = report.counts
        unknown = f", {counts['unknown']} unknown" if counts.get("unknown") else ""
        text = f"{counts.get('right', 0)} right, {counts.get('wrong', 0)} wrong{unknown}{drops(report)}"
        context.add(report, f"attempts: {text}")
        if with_feedback and judged:
            text = "feedback: the teacher solves questions without a gold answer"
            stage = context.display.stage("feedback", text)
            with Grader() as grader, stage as progress, context.teacher() as teacher:
                given: dict[str, Any] = {
                    "teacher": teacher,
                    "grader": grader,
                    "confirm": confirm,
                    "progress": progress,
                }
                report = feedback.write_feedback(config, run, fit=split.fit, **given)
            good, bad = report.counts["good"], report.counts["bad"]
            context.add(report, f"feedback: {good} good, {bad} bad{drops(report)}")
    text = "corrections: the teacher corrects the first wrong step"
    stage = context.display.stage("corrections", text)
    with Grader() as grader, stage as progress, context.teacher() as teacher:
        report = corrections.write_corrections(
            config, run, teacher=teacher, grader=grader, confirm=confirm, progress=progress
        )
    corrected, confirmed = (report.counts.get(name, 0) for name in ("corrected", "confirmed"))
    text = f"corrections: {corrected} corrected, {confirmed} confirmed{drops(report)}"
    return context.add(report, text)


def sample_student(
    config: Config,
    run: Run,
    stage: str,
    problems: Sequence[Problem],
    with_student: bool,
    *,
    progress: Progress,
) -> Report:
    """The attempts or pairs stage, with its student if one is needed.

    A function of this module: it may run in another process.
    """
    from sclite.data import attempts, pairs
    from sclite.grading.worker import Grader

    context = Context(config, run, ProgressDisplay(quiet=True))
    adapter = "sft/adapter" if stage == "attempts" else "warmup/adapter"
    made = context.student(adapter, stage, progress) if with_student else nullcontext()
    with Grader() as grader, made as student:
        given: dict[str, Any] = {"student": student, "grader": grader, "progress": progress}
        if stage == "pairs":
            return pairs.write_pairs(config, run, **given)
        return attempts.write_attempts(config, run, problems=problems, **given)


def can_build_pairs(context: Context) -> bool:
    """Whether pairs can follow the corrections at once.

    Not if they need the trained student's warm-up: unless `attempts.student` names another student, or attempts were
    imported and nothing has been trained (then there are decisions alone).
    """
    attempts = context.config.attempts
    return attempts.kind != "trained" or (bool(attempts.source) and context.students() == ["base"])


def build_pairs(context: Context) -> Report:
    """Pairs of chosen and rejected continuations, with the student's own corrections."""
    from sclite.data import pairs

    config, run = context.config, context.run
    untrained = (
        config.attempts.kind == "trained" and not context.run.path(adapter_weights("warmup")).is_file()
    )
    imported = run.is_imported("pairs", "pairs.jsonl")
    ready = imported or run.done("pairs", pairs.pairs_inputs(config, run), "pairs.jsonl")
    text = "pairs: the student's own corrections against right ones"
    with context.display.stage("pairs", text) as progress:
        report = context.on_gpu(sample_student, "pairs", (), not (untrained or ready), progress=progress)
    decisions, contents = (report.counts.get(name, 0) for name in ("decision", "content"))
    return context.add(report, f"pairs: {decisions} decisions, {contents} contents{drops(report)}")


# -- training ------------------------------------------------------------------------------------------------------


def train(context: Context, only: str | None = None, fresh: bool = False) -> list[Report]:
    """SFT, stage 2, export and the fit of the review threshold; with `only` "sft" SFT alone, with "dpo" the others.

    `fresh` retrains stages that were trained from other inputs.
    """
    from sclite.inspect.plan import correction_cost_text

    if only not in (None, "sft", "dpo"):
        raise UsageError(f"--only {only}: no such stage", "use --only sft or --only dpo")
    data = {name: context.run.path(f"{name}.jsonl").is_file() for name in ("templates", "reviews", "pairs")}
    ready = data["templates"] and not (data["reviews"] or data["pairs"])
    if only != "sft" and ready and not context.config.teacher.model:
        raise UsageError(  # before hours of SFT, not after
            "teacher.model is not set, and stage 2 needs a teacher for its corrections",
            "set a LiteLLM model, for example --set teacher.model=openai/gpt-5.4-mini, or use --only sft",
        )
    if context.config.student.model == "embedded" and not context.config.teacher.embedded:
        context.display.print(
            "warning: the bundled student is a toy that can learn the quickstart's word problems only; set student.model"
        )
    if only is None:
        hidden = unseen(context)
        with context.display.wait("estimating the cost of corrections"):
            cost = correction_cost_text(context, hidden)
        if cost:
            context.display.print(cost)
    if only != "dpo":
        train_stage(context, "sft", fresh)
    if only != "sft":
        require_sft(context)
        if data["reviews"] or not context.run.is_imported("pairs", "pairs.jsonl"):
            build_corrections(context)
        train_stage(context, "warmup", fresh)
        build_pairs(context)
        train_stage(context, "dpo", fresh)
        exports.export(context)
        exports.fit_review_threshold(context, untrained_problems(context))
    return context.reports


def train_stage(context: Context, name: str, fresh: bool = False) -> Report:
    """Run a training stage ("sft", "warmup" or "dpo"), with half the micro-batch size each time memory runs out."""
    from sclite.student.cuda_memory import free_memory
    from sclite.train.dpo import train_dpo
    from sclite.train.micro_batch import largest_divisor, suggest_setting
    from sclite.train.sft import train_sft
    from sclite.train.warmup import train_warmup

    work = {"sft": train_sft, "warmup": train_warmup, "dpo": train_dpo}[name]
    config, text = context.config, TRAINING[name]
    report: Report | None = None
    train_one = partial(work, unseen=unseen(context, name), fresh=fresh)
    with context.display.stage(name, text) as progress:
        while report is None:
            try:
                report = context.isolate(train_one, config, progress=progress)
            except GpuMemoryError as error:
                if error.micro_batch == 1:
                    fits = suggest_setting(config, name)
                    hint = f"{error.hint}{f'. By the memory estimate {fits}' if fits else ''}"
                    raise DeviceError(error.message, hint) from error
                settings = config.stage(error.stage)  # accumulation follows the micro-batch size
                size = largest_divisor(settings.batch_size, error.micro_batch // 2)
                smaller = settings.model_copy(update={"per_device_train_batch_size": size})
                config = config.model_copy(update={error.stage: smaller})
                warning = f"out of memory at micro-batch size {error.micro_batch}: {name} resumes at {size}"
                progress(0, 0, warning=warning)
            if report is None and not context.isolated:
                free_memory()  # here, where no traceback holds the model any more
    if "imported" in report.counts:
        return context.add(report, f"{name}: imported adapter")
    rows, steps = "pairs" if name == "dpo" else "rows", report.counts.get("steps", 0)
    counts = f"{report.counts.get(rows, 0)} {rows}, {steps} steps{drops(report)}"
    layers = report.figures.get("lora")
    adapted = f"; LoRA on {', '.join(layers)}" if layers else ""
    return context.add(report, f"{text.partition(':')[0]}: {counts}{adapted}")


# -- evaluation and plan -------------------------------------------------------------------------------------------


def require_sft(context: Context) -> None:
    """Raise DataError if the run has no SFT adapter."""
    if not context.run.path(adapter_weights("sft")).is_file():
        raise DataError(
            f"{context.run.path('sft/adapter')} is missing", "run `sclite train --only sft` first"
        )


def untrained_problems(context: Context) -> list[Problem]:
    """The run's problems that nothing was trained on, for the review threshold."""
    if not has_problems(context):
        return []
    # imported attempts may be at any problem of the run
    corrected = {row.id for row in context.run.rows("reviews.jsonl", Review)}
    return [problem for problem in divided_problems(context).fit if problem.id not in corrected]


def create_in_ollama(context: Context, gguf: Path) -> dict[str, Any]:
    """Create the model `export.ollama`; what it says to a problem kept out of training, compared with the engine."""
    from sclite.export.ollama import compare_replies, create_model
    from sclite.export.samples import QUESTION

    create_model(context.config.export.ollama, context.run.path("export/Modelfile"))
    problems: list[Problem] = []
    if context.run.path("problems.jsonl").is_file():
        problems = untrained_problems(replace(context, dry=True, display=ProgressDisplay(quiet=True)))
    return compare_replies(context.config, gguf, problems[0].question if problems else QUESTION)


def evaluate_students(context: Context, names: Sequence[str]) -> dict[str, Any]:
    """Evaluate the named students (or ollama/NAME) on eval.source, before and after review; returns the summary."""
    from sclite import evaluation

    held_out = evaluation.held_out(context, untrained_problems(context))
    if trained := [name for name in names if name in STUDENTS]:
        exports.export(context, trained)
    return evaluation.evaluate(context, names, held_out)


def report_plan(context: Context) -> None:
    """Print what a whole run will cost, take and need. Writes and sends nothing.

    Raises DeviceError if a training stage does not fit in GPU memory.
    """
    from sclite.inspect.plan import plan_training

    with context.display.wait("planning the run"):
        plan = plan_training(context)
    if misfits := [name for name, stage in plan["stages"].items() if stage["fits"] is False]:
        raise DeviceError(
            f"{', '.join(misfits)} will not fit in GPU memory",
            "`sclite train --plan` shows settings that fit",
        )
    if not context.run.is_imported("templates", "templates.jsonl"):
        with context.display.wait("estimating the cost of templates"):
            found = forecast(replace(context, dry=True, display=ProgressDisplay(quiet=True)))
        cost = "unknown cost" if found["cost_usd"] is None else f"about ${found['cost_usd']:.2f}"
        context.display.print(
            f"plan: {found['requests']:,} templates by {context.config.teacher.model}, {cost}"
        )
    needs = ", ".join(f"{name} {stage['total_gb']:.1f} GB" for name, stage in plan["stages"].items())
    where = "host RAM" if plan["gpu"] is None else f"of {plan['gpu']['free_gb']:.0f} GB GPU memory"
    hours = "unknown until the first steps" if plan["hours"] is None else f"about {plan['hours']:.1f} h"
    context.display.print(f"plan: training needs {needs} ({where}); time {hours}")
