"""Runs the stages in order, each with the teacher, student and grader that it needs, and reports them.

On a CUDA GPU each stage that needs the GPU runs in its own process (`context.isolated`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from sclite import evaluation, exports
from sclite.config import Config
from sclite.context import Context
from sclite.data import attempts, corrections, feedback, pairs, templates
from sclite.data.imported import read_labelled
from sclite.data.problems import Split, gather_problems, split_problems
from sclite.doctor import llama_offloads
from sclite.errors import DataError, DeviceError, GpuMemoryError, UsageError
from sclite.evaluate import answers
from sclite.grading.grader import Grader
from sclite.inspect.plan import correction_cost_text
from sclite.progress import Progress, ProgressDisplay
from sclite.quickstart.tutor import first_wrong_step
from sclite.records import FEEDBACK, Problem, Review
from sclite.run import Report, Run
from sclite.signature import digest
from sclite.student.adapters import STUDENTS, adapter_weights
from sclite.student.cuda_memory import free_memory
from sclite.student.recorder import recorded
from sclite.train.dpo import train_dpo
from sclite.train.memory import choose_on_gpu, largest_divisor
from sclite.train.sft import read_templates, train_sft
from sclite.train.warmup import train_warmup

# -- problems ------------------------------------------------------------------------------------------------------


def divided_problems(context: Context, reread: bool = False, fresh: bool = False) -> Split:
    """The run's problems, split by use. Their source is read if the run has none of its rows yet, or with `reread`.

    With `reread` and `fresh`, problems that were trained on are dropped too if they now overlap eval.source.
    """
    if context.problems is None:
        report, settings = Report("problems"), context.config.problems
        with context.display.wait("reading the problems"):
            how = {"reread": reread, "fresh": fresh, "keep": not context.dry}
            found = gather_problems(context.config, context.run, report, **how)
        origin = f"(all rows of {settings.source})"
        if not settings.source or report.skipped:
            origin = "in the run"
        elif settings.limit == len(found):
            origin = f"(the first of {settings.source}, with --limit {settings.limit})"
        context.add(report, f"problems: {counted(report, problems=origin)}")
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
    """Raise if `attempts.source` or, for a `student`, `attempts.student` is missing, before anything is paid for."""
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


def counted(report: Report, **labels: str) -> str:
    """The counts with these labels, and the drops, for a stage's line: `9 right, 3 longer than max length`."""
    counts = [(report.counts.get(name, 0), label) for name, label in labels.items()]
    dropped = [(count, reason.replace("_", " ")) for reason, count in sorted(report.dropped.items())]
    return ", ".join(f"{count} {label}" for count, label in (*counts, *dropped))


@contextmanager
def paid_stage(context: Context, name: str, text: str) -> Iterator[dict[str, Any]]:
    """Show a stage that calls the teacher; yields its arguments: teacher, grader and progress."""
    with context.display.stage(name, text) as progress, Grader() as grader, context.teacher() as teacher:
        yield {"teacher": teacher, "grader": grader, "progress": progress}


# -- templates -----------------------------------------------------------------------------------------------------


def build_templates(context: Context, fresh: bool = False) -> Report:
    """Templates for all problems but those for the threshold: SFT trains on its share, stage 2 replays the others."""
    config, run = context.config, context.run
    imported = run.is_imported("templates", "templates.jsonl") and not has_problems(context)
    split = None if imported else divided_problems(context)
    problems = [] if split is None else [*split.sft, *split.stage2]
    text = f"templates: {config.teacher.model} writes thought templates"
    with paid_stage(context, "templates", text) as given:
        report = templates.write_templates(config, run, problems=problems, fresh=fresh, **given)
    return context.add(report, f"templates: {counted(report, templates='kept')}")


# -- attempts, corrections and pairs -------------------------------------------------------------------------------


def build_corrections(context: Context, fresh: bool = False, alone: bool = False) -> Report:
    """The student's attempts at the problems of stage 2, and the teacher's corrections of them.

    Imported attempts may be at any problem of the run, and need no student. With `alone` (not as part of `train`), also
    adds the answers judged in the chat since the last time, and builds the pairs if no warm-up comes first.
    """
    config, run = context.config, context.run
    kept, imported = problems_to_attempt(context)
    own_student = config.attempts.kind == "trained"
    judged = run.path(FEEDBACK).is_file() or run.manifest("feedback")
    if not run.is_imported("corrections", "reviews.jsonl"):
        text = "imported" if imported else f"the student tries {len(kept)} unseen problems"
        with context.display.stage("attempts", f"attempts: {text}") as progress:
            inputs = attempts.attempts_inputs(config, run, kept)
            ready = imported or run.done("attempts", inputs, "attempts.jsonl")
            if not ready and own_student:
                require_sft(context)
            held_out = untrained_problems(context)[: answers.FIRST_PASS_PROBLEMS] if own_student else []
            report = context.on_gpu(sample_student, "attempts", kept, held_out, not ready, progress=progress)
        text = counted(report, right="right", wrong="wrong", unknown="unknown")
        context.add(report, f"attempts: {text}{answers.first_pass_text(run, 'sft')}")
        if alone and judged:
            text = "feedback: the teacher solves questions without a gold answer"
            with paid_stage(context, "feedback", text) as given:
                report = feedback.write_feedback(config, run, fit=divided_problems(context).fit, **given)
            context.add(report, f"feedback: {counted(report, good='good', bad='bad')}")
        else:
            feedback.remove_orphans(run)
    text = "corrections: the teacher corrects the first wrong step"
    with paid_stage(context, "corrections", text) as given:
        report = corrections.write_corrections(config, run, fresh=fresh, **given)
    context.add(report, f"corrections: {counted(report, corrected='corrected', confirmed='confirmed')}")
    # imported attempts without a trained student give decision pairs only
    untrained = bool(config.attempts.source) and context.students() == ["base"]
    if alone and (not own_student or untrained):
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
    context = context or Context(config, run, ProgressDisplay(quiet=True))
    adapter = "sft/adapter" if stage == "attempts" else "warmup/adapter"
    made = context.student(adapter, stage, progress) if with_student else nullcontext()
    with Grader() as grader, made as student:
        if student is not None and held_out:
            progress(0, 0, note=f"solving {len(held_out)} held-out problems")
            answers.measure_first_pass(config, run, adapter.partition("/")[0], student, held_out, grader)
        tools: dict[str, Any] = {"grader": grader, "progress": progress}
        if stage == "attempts":
            return attempts.write_attempts(config, run, problems=problems, student=student, **tools)
        if student is None or config.attempts.kind == "endpoint":  # whose replies are in the ledger
            return pairs.write_pairs(config, run, student=student, **tools)
        identity = digest(pairs.pairs_inputs(config, run))
        with recorded(student, run.path("pairs.partial.jsonl"), identity) as recorder:
            return pairs.write_pairs(config, run, student=recorder, **tools)


def build_pairs(context: Context) -> Report:
    """Pairs of chosen and rejected continuations, with the student's own corrections."""
    config, run = context.config, context.run
    own_student = config.attempts.kind == "trained"
    untrained = own_student and not run.path(adapter_weights("warmup")).is_file()
    imported = run.is_imported("pairs", "pairs.jsonl")
    ready = imported or run.done("pairs", pairs.pairs_inputs(config, run), "pairs.jsonl")
    text = "pairs: the student's own corrections against right ones"
    with context.display.stage("pairs", text) as progress:
        held_out = untrained_problems(context)[: answers.FIRST_PASS_PROBLEMS] if own_student else []
        sampled = not (untrained or ready)
        report = context.on_gpu(sample_student, "pairs", (), held_out, sampled, progress=progress)
    text = counted(report, decision="decisions", content="contents")
    context.add(report, f"pairs: {text}{answers.first_pass_text(run, 'warmup')}")
    if sampled:
        before, after = (answers.first_pass(run, stage) for stage in ("sft", "warmup"))
        if before and after and (warning := answers.harm_warning("the warm-up", before, after)):
            context.display.print(f"warning: {warning}")
    return report


# -- training ------------------------------------------------------------------------------------------------------


def train(context: Context, only: str | None = None, fresh: bool = False) -> list[Report]:
    """Run SFT, stage 2, export and the threshold fit; `only`: "sft" or "dpo"; `fresh` retrains if inputs changed."""
    config, run = context.config, context.run
    if only == "dpo":
        require_sft(context)
    if only != "sft" or not run.is_imported("sft", adapter_weights("sft")):
        read_templates(run)
    corrected = run.path("reviews.jsonl").is_file()
    corrects = corrected or not run.is_imported("pairs", "pairs.jsonl")
    if only != "sft" and not has_problems(context):
        why = f"{run.path('problems.jsonl')} is missing, and stage 2 needs problems"
        hint = "set problems.source, for example --set problems.source=train.jsonl, or use --only sft"
        raise DataError(why, hint)
    if only != "sft" and corrects:  # report what stage 2 lacks before hours of SFT, not after
        if not (config.teacher.model or corrected):
            why = "teacher.model is not set, and stage 2 needs a teacher for its corrections"
            hint = "set a model, for example --set teacher.model=openai/gpt-5.4-mini, or use --only sft"
            raise UsageError(why, hint)
        check_sources(context)
        problems, _ = problems_to_attempt(context)
        if not fresh:
            attempts.refuse_other_attempts(config, run, problems)
    elif only != "sft" and config.warmup.num_train_epochs:
        why = f"{run.path('reviews.jsonl')} is missing, and the warm-up trains on reviews"
        raise DataError(why, "add it, or skip the warm-up: --set warmup.num_train_epochs=0")
    if only != "sft" and context.isolated and llama_offloads() is False:
        slow = "sampling and fitting the review threshold take much longer; `sclite doctor` shows how to install a CUDA build"
        context.display.print(f"warning: this build of llama-cpp-python runs on the CPU: {slow}")
    exports.check_chat_template(context)
    if only is None:
        with context.display.wait("estimating the cost of corrections"):
            cost = correction_cost_text(config, run, unseen(context))
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
    rows = "pairs" if name == "dpo" else "rows"
    counts = counted(report, **{rows: rows, "steps": "steps"})
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


def evaluate_students(context: Context, names: Sequence[str], other: Run | None = None) -> dict[str, Any]:
    """Evaluate the named students (or ollama/NAME) on eval.source, before and after review; returns the summary.

    With another run, "compared" holds the differences to its newest results on some of these problems, for the first
    answers and the answers after review of each student in both; raises DataError if it has none.
    """
    config, held_out = context.config, evaluation.held_out(context, untrained_problems(context))
    if config.eval.labelled and config.review.mode != "guided":
        hint = "add --set review.mode=guided, or skip it with --set eval.labelled="
        raise UsageError("eval.labelled needs the guided review", hint)
    works = read_labelled(Path(config.eval.labelled)) if config.eval.labelled else []
    theirs = evaluation.stored_results(other, held_out, names) if other else {}
    if trained := [name for name in names if name in STUDENTS]:
        exports.export(context, trained)
    # the bundled teacher can check the steps of its own kind of problem
    judge = first_wrong_step if config.teacher.embedded else None
    summary = evaluation.evaluate(context, names, held_out, judge, works)
    if other:
        summary["compared"] = evaluation.compare_results(context.run, summary, theirs)
    return summary
