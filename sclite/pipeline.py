"""Runs the stages in order, each with the teacher, student and grader that it needs, and reports them.

On a CUDA GPU each stage that needs the GPU runs in its own process (`context.isolated`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sclite import exports
from sclite.config import Config
from sclite.context import Context
from sclite.doctor import llama_offloads
from sclite.errors import DataError, DeviceError, GpuMemoryError, UsageError
from sclite.progress import Progress, ProgressDisplay
from sclite.records import FEEDBACK, Problem, Review
from sclite.run import Report, Run
from sclite.signature import digest
from sclite.student.adapters import STUDENTS, adapter_weights
from sclite.student.recorder import recorded

if TYPE_CHECKING:
    from sclite.data.problems import Split


# -- problems ------------------------------------------------------------------------------------------------------


def divided_problems(context: Context, reread: bool = False, fresh: bool = False) -> "Split":
    """The run's problems, split by use. Their source is read if the run has none of its rows yet, or with `reread`.

    With `reread` and `fresh`, problems that were trained on are dropped too if they now overlap eval.source.
    """
    if context.problems is None:
        from sclite.data.problems import gather_problems, split_problems

        report, settings = Report("problems"), context.config.problems
        with context.display.wait("reading the problems"):
            how = {"reread": reread, "fresh": fresh, "keep": not context.dry}
            found = gather_problems(context.config, context.run, report, **how)
        if report.figures.get("gone"):
            origin = f" in the run ({settings.source} no longer exists)"
        elif not settings.source or report.skipped:
            origin = " in the run"
        elif settings.limit is not None and report.counts["problems"] == settings.limit:
            origin = f" (the first of {settings.source}, with --limit {settings.limit})"
        else:
            origin = f" (all rows of {settings.source})"
        context.add(report, f"problems: {len(found)}{origin}{drops(report)}")
        context.problems = split_problems(context.config, found)
    return context.problems


def unseen(context: Context, stage: str = "dpo") -> frozenset[str]:
    """IDs of the problems that SFT does not train on: those of stage 2 and, for `stage` sft, those for the threshold."""
    if not has_problems(context):
        return frozenset()
    split = divided_problems(context)
    return frozenset(problem.id for problem in (*split.stage2, *(split.fit if stage == "sft" else ())))


def has_problems(context: Context) -> bool:
    """Whether the run has problems: imported templates need none."""
    source = context.config.problems.source or context.run.path("problems.jsonl").is_file()
    return context.problems is not None or bool(source)


def check_sources(context: Context, student: bool = True) -> None:
    """Raise if the problems are not the run's or `attempts.source` is missing, before anything is paid for.

    With `student`, also if `attempts.student` is an unusable GGUF.
    """
    if context.problems is None:  # else they are the quickstart's, or already checked
        context.run.check_problems(context.config.problems.source)
    settings = context.config.attempts
    if context.run.manifest("attempts") is not None:
        return
    if settings.source and not Path(settings.source).is_file():
        hint = "check the path, or unset it: --set attempts.source="
        raise DataError(f"attempts.source: {settings.source} does not exist", hint)
    if student and settings.kind == "gguf":
        with context.display.wait("checking attempts.student"):
            context.student_gguf()


def problems_to_attempt(context: Context) -> tuple[list[Problem], bool]:
    """(the problems of stage 2, False) or, for imported attempts, (all of the run, True). Raises DataError if none."""
    split = divided_problems(context)
    imported = bool(context.config.attempts.source) or context.run.is_imported("attempts", "attempts.jsonl")
    kept = [*split.sft, *split.stage2, *split.fit] if imported else split.stage2
    if not kept:
        hint = "raise problems.correction_share or problems.limit"
        raise DataError("no problems are kept for stage 2", hint)
    return kept, imported


def drops(report: Report) -> str:
    """The dropped rows for a stage's line: `, 3 longer than max length`."""
    return "".join(f", {n} {reason.replace('_', ' ')}" for reason, n in sorted(report.dropped.items()))


@contextmanager
def paid_stage(context: Context, name: str, text: str) -> Iterator[dict[str, Any]]:
    """Show a stage that calls the teacher; yields its arguments: teacher, grader and progress."""
    from sclite.grading.grader import Grader

    with context.display.stage(name, text) as progress, Grader() as grader, context.teacher() as teacher:
        yield {"teacher": teacher, "grader": grader, "progress": progress}


# -- templates -----------------------------------------------------------------------------------------------------


def build_templates(context: Context, fresh: bool = False) -> Report:
    """Templates for all problems but those for the threshold: SFT trains on its share, stage 2 replays the others."""
    from sclite.data import templates

    config, run = context.config, context.run
    imported = run.is_imported("templates", "templates.jsonl") and not has_problems(context)
    split = None if imported else divided_problems(context)
    problems = [] if split is None else [*split.sft, *split.stage2]
    with paid_stage(
        context, "templates", f"templates: {config.teacher.model} writes thought templates"
    ) as given:
        report = templates.write_templates(config, run, problems=problems, fresh=fresh, **given)
    return context.add(report, f"templates: {report.counts.get('templates', 0)} kept{drops(report)}")


# -- attempts, corrections and pairs -------------------------------------------------------------------------------


def build_corrections(context: Context, fresh: bool = False, alone: bool = False) -> Report:
    """The student's attempts at the problems of stage 2, and the teacher's corrections of them.

    Imported attempts may be at any problem of the run, and need no student. With `alone` (not as part of `train`), also
    adds the answers judged in the chat since the last time, and builds the pairs if no warm-up comes first.
    """
    from sclite.data import attempts, corrections, feedback
    from sclite.evaluate.first_pass import first_pass_text

    config, run = context.config, context.run
    kept, imported = problems_to_attempt(context)
    judged = run.path(FEEDBACK).is_file() or run.manifest("feedback")
    if not run.is_imported("corrections", "reviews.jsonl"):
        text = "imported" if imported else f"the student tries {len(kept)} unseen problems"
        with context.display.stage("attempts", f"attempts: {text}") as progress:
            inputs = attempts.attempts_inputs(config, run, kept)
            ready = imported or run.done("attempts", inputs, "attempts.jsonl")
            if not ready and config.attempts.kind == "trained":
                require_sft(context)
            held_out = first_pass_problems(context)
            report = context.on_gpu(sample_student, "attempts", kept, held_out, not ready, progress=progress)
        right, wrong, unknown = (report.counts.get(name, 0) for name in ("right", "wrong", "unknown"))
        text = f"{right} right, {wrong} wrong{f', {unknown} unknown' if unknown else ''}{drops(report)}"
        context.add(report, f"attempts: {text}{first_pass_text(run, 'sft')}")
        if alone and judged:
            text = "feedback: the teacher solves questions without a gold answer"
            with paid_stage(context, "feedback", text) as given:
                report = feedback.write_feedback(config, run, fit=divided_problems(context).fit, **given)
            good, bad = report.counts["good"], report.counts["bad"]
            context.add(report, f"feedback: {good} good, {bad} bad{drops(report)}")
        else:
            feedback.remove_orphans(run)
    text = "corrections: the teacher corrects the first wrong step"
    with paid_stage(context, "corrections", text) as given:
        report = corrections.write_corrections(config, run, fresh=fresh, **given)
    corrected, confirmed = (report.counts.get(name, 0) for name in ("corrected", "confirmed"))
    context.add(report, f"corrections: {corrected} corrected, {confirmed} confirmed{drops(report)}")
    # imported attempts without a trained student give decision pairs only
    untrained = bool(config.attempts.source) and context.students() == ["base"]
    if alone and (config.attempts.kind != "trained" or untrained):
        build_pairs(context)
    return report


def sample_student(
    config: Config,
    run: Run,
    stage: str,
    problems: Sequence[Problem],
    held_out: Sequence[Problem],
    with_student: bool,
    progress: Progress,
    context: Context | None = None,
) -> Report:
    """The attempts or pairs stage, with its student if one is needed; it may run in another process.

    A student that was sampled also solves the `held_out` problems, to see whether the warm-up harms solving.
    """
    from sclite.data import attempts, pairs
    from sclite.evaluate.first_pass import measure_first_pass
    from sclite.grading.grader import Grader

    context = context or Context(config, run, ProgressDisplay(quiet=True))
    adapter = "sft/adapter" if stage == "attempts" else "warmup/adapter"
    made = context.student(adapter, stage, progress) if with_student else nullcontext()
    with Grader() as grader, made as student:
        if student is not None and held_out:
            progress(0, 0, note=f"solving {len(held_out)} held-out problems")
            measure_first_pass(config, run, adapter.partition("/")[0], student, held_out, grader)
        tools: dict[str, Any] = {"grader": grader, "progress": progress}
        if stage == "attempts":
            return attempts.write_attempts(config, run, problems=problems, student=student, **tools)
        if student is None or config.attempts.kind == "endpoint":  # whose replies are in the ledger
            return pairs.write_pairs(config, run, student=student, **tools)
        identity = digest(pairs.pairs_inputs(config, run))
        with recorded(student, run.path("pairs.partial.jsonl"), identity) as recorder:
            return pairs.write_pairs(config, run, student=recorder, **tools)


def first_pass_problems(context: Context) -> list[Problem]:
    """The problems that the student solves before and after the warm-up."""
    from sclite.evaluate.first_pass import PROBLEMS

    return untrained_problems(context)[:PROBLEMS] if context.config.attempts.kind == "trained" else []


def build_pairs(context: Context) -> Report:
    """Pairs of chosen and rejected continuations, with the student's own corrections."""
    from sclite.data import pairs
    from sclite.evaluate.first_pass import first_pass_text, first_pass_warning

    config, run = context.config, context.run
    untrained = config.attempts.kind == "trained" and not run.path(adapter_weights("warmup")).is_file()
    imported = run.is_imported("pairs", "pairs.jsonl")
    ready = imported or run.done("pairs", pairs.pairs_inputs(config, run), "pairs.jsonl")
    text = "pairs: the student's own corrections against right ones"
    with context.display.stage("pairs", text) as progress:
        held_out = first_pass_problems(context)
        sampled = not (untrained or ready)
        report = context.on_gpu(sample_student, "pairs", (), held_out, sampled, progress=progress)
    decisions, contents = (report.counts.get(name, 0) for name in ("decision", "content"))
    text = f"{decisions} decisions, {contents} contents{drops(report)}{first_pass_text(run, 'warmup')}"
    context.add(report, f"pairs: {text}")
    if sampled and (warning := first_pass_warning(run)):
        context.display.print(f"warning: {warning}")
    return report


# -- training ------------------------------------------------------------------------------------------------------


def train(context: Context, only: str | None = None, fresh: bool = False) -> list[Report]:
    """Run SFT, stage 2, export and the threshold fit; `only`: "sft" or "dpo"; `fresh` retrains if inputs changed."""
    from sclite.data.attempts import refuse_other_attempts
    from sclite.inspect.plan import correction_cost_text
    from sclite.train.sft import read_templates

    if only == "dpo":
        require_sft(context)
    if only != "sft" or not context.run.is_imported("sft", adapter_weights("sft")):
        read_templates(context.run)
    data = {name: context.run.path(f"{name}.jsonl").is_file() for name in ("templates", "reviews", "pairs")}
    corrects = data["reviews"] or not context.run.is_imported("pairs", "pairs.jsonl")
    if only != "sft":  # report what stage 2 lacks before hours of SFT, not after
        ready = data["templates"] and not (data["reviews"] or data["pairs"])
        if ready and not context.config.teacher.model:
            why = "teacher.model is not set, and stage 2 needs a teacher for its corrections"
            hint = "set a model, for example --set teacher.model=openai/gpt-5.4-mini, or use --only sft"
            raise UsageError(why, hint)
        if not has_problems(context):
            why = f"{context.run.path('problems.jsonl')} is missing, and stage 2 needs problems"
            hint = "set problems.source, for example --set problems.source=train.jsonl, or use --only sft"
            raise DataError(why, hint)
        if corrects:
            check_sources(context)
            problems, _ = problems_to_attempt(context)
            if not fresh:
                refuse_other_attempts(context.config, context.run, problems)
        elif context.config.warmup.num_train_epochs:
            why = f"{context.run.path('reviews.jsonl')} is missing, and the warm-up trains on reviews"
            raise DataError(why, "add it, or skip the warm-up: --set warmup.num_train_epochs=0")
    if context.config.student.model == "embedded" and not context.config.teacher.embedded:
        only_stories = "is a toy that can only learn the quickstart's word problems; set student.model"
        context.display.print(f"warning: the bundled student {only_stories}")
    if only != "sft" and context.isolated and llama_offloads() is False:
        slow = "sampling and fitting the review threshold take much longer; `sclite doctor` shows how to install a CUDA build"
        context.display.print(f"warning: this build of llama-cpp-python runs on the CPU: {slow}")
    exports.check_chat_template(context)
    if only is None:
        hidden = unseen(context)
        with context.display.wait("estimating the cost of corrections"):
            cost = correction_cost_text(context, hidden)
        if cost:
            context.display.print(cost)
    if only != "dpo":
        train_stage(context, "sft", fresh)
    if only != "sft":
        if corrects:
            build_corrections(context, fresh)
        train_stage(context, "warmup", fresh)
        build_pairs(context)
        train_stage(context, "dpo", fresh)
        exports.export(context)
        exports.fit_review_threshold(context, untrained_problems(context))
    return context.reports


def train_stage(context: Context, name: str, fresh: bool = False) -> Report:
    """Train "sft", "warmup" or "dpo"; if out of memory, resume from the checkpoint at half the micro-batch size."""
    from sclite.student.cuda_memory import free_memory
    from sclite.train.dpo import train_dpo
    from sclite.train.micro_batch import choose_on_gpu, largest_divisor
    from sclite.train.sft import train_sft
    from sclite.train.warmup import train_warmup

    work, text = {
        "sft": (train_sft, "sft: the student learns the templates"),
        "warmup": (train_warmup, "warm-up: the student learns what a review looks like"),
        "dpo": (train_dpo, "dpo: the student learns to prefer right reviews"),
    }[name]
    config = context.config
    report: Report | None = None
    train_one = partial(work, unseen=unseen(context, name), fresh=fresh)
    with context.display.stage(name, text) as progress:
        while report is None:
            try:
                report = context.isolate(train_one, config, progress=progress)
            except GpuMemoryError as error:
                settings, hint = config.stage(error.stage), error.hint
                if error.micro_batch == 1:
                    if choice := choose_on_gpu(config, name):
                        shorter = f"it should fit; try max_length {settings.max_length // 2}"
                        hint += f". By the memory estimate {shorter if choice.fits else choice.verdict}"
                    raise DeviceError(error.message, hint) from error
                # accumulation follows the micro-batch size
                size = largest_divisor(settings.batch_size, error.micro_batch // 2)
                smaller = settings.model_copy(update={"per_device_train_batch_size": size})
                config = config.model_copy(update={error.stage: smaller})
                warning = f"out of memory at micro-batch size {error.micro_batch}: {name} resumes at {size}"
                progress(0, 0, warning=warning)
            if report is None and not context.isolated:
                free_memory()  # here, because no traceback references the model any more
    if "imported" in report.counts:
        return context.add(report, f"{name}: imported adapter")
    rows, steps = "pairs" if name == "dpo" else "rows", report.counts.get("steps", 0)
    counts = f"{report.counts.get(rows, 0)} {rows}, {steps} steps{drops(report)}"
    layers = report.figures.get("lora")
    adapted = f"; LoRA on {', '.join(layers)}" if layers else ""
    return context.add(report, f"{text.partition(':')[0]}: {counts}{adapted}")


# -- evaluation ----------------------------------------------------------------------------------------------------


def require_sft(context: Context) -> None:
    """Raise DataError if the run has no SFT adapter."""
    if not context.run.path(adapter_weights("sft")).is_file():
        missing = context.run.path("sft/adapter")
        raise DataError(f"{missing} is missing", "run `sclite train --only sft` first")


def untrained_problems(context: Context) -> list[Problem]:
    """The run's problems that nothing was trained on, for the review threshold."""
    if not has_problems(context):
        return []
    # imported attempts may be at any problem of the run
    corrected = {row.id for row in context.run.rows("reviews.jsonl", Review)}
    return [problem for problem in divided_problems(context).fit if problem.id not in corrected]


def create_in_ollama(context: Context, gguf: Path) -> dict[str, Any]:
    """Create the model `export.ollama`, and compare its reply to an untrained problem with the engine's."""
    from sclite.export.ollama import compare_replies, create_model
    from sclite.export.samples import QUESTION

    create_model(context.config.export.ollama, context.run.path("export/Modelfile"))
    problems: list[Problem] = []
    if context.run.path("problems.jsonl").is_file():
        problems = untrained_problems(replace(context, dry=True, display=ProgressDisplay(quiet=True)))
    return compare_replies(context.config, gguf, problems[0].question if problems else QUESTION)


def evaluate_students(context: Context, names: Sequence[str], other: Run | None = None) -> dict[str, Any]:
    """Evaluate the named students (or ollama/NAME) on eval.source, before and after review; returns the summary.

    With another run, "compared" holds the difference to its results on the same problems.
    """
    from sclite import evaluation
    from sclite.quickstart.tutor import first_wrong_step

    held_out = evaluation.held_out(context, untrained_problems(context))
    works = evaluation.labelled_works(context.config)
    theirs = evaluation.stored_results(other, held_out, names) if other else {}
    if trained := [name for name in names if name in STUDENTS]:
        exports.export(context, trained)
    # the bundled teacher can check the steps of its own kind of problem
    judge = first_wrong_step if context.config.teacher.embedded else None
    summary = evaluation.evaluate(context, names, held_out, judge, works)
    if other:
        summary["compared"] = evaluation.compare_results(context.run, summary, other, theirs)
    return summary
