"""`sclite eval`, which needs the data, export and evaluate packages at once."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from sclite.config import Eval
from sclite.context import Context
from sclite.errors import DataError, UsageError
from sclite.evaluate.baselines import measure_baselines
from sclite.evaluate.evaluate import (
    REPORT,
    SUMMARY,
    HeldOut,
    Judge,
    cutoff_of,
    evaluate_model,
    measure_labelled,
    result_folder,
    summaries,
    summary_notes,
)
from sclite.evaluate.metrics import Outcome, compare_outcomes
from sclite.evaluate.report import write_report
from sclite.evaluate.threshold import FITTED_ON, MIN_PROBLEMS, is_current, load_threshold
from sclite.grading.grader import Grader
from sclite.records import Drop, Problem, Template
from sclite.run import Run
from sclite.signature import digest
from sclite.student.adapters import STUDENTS
from sclite.student.base import Student
from sclite.student.ggufs import gguf_path, source_digest
from sclite.student.llama_cpp.engine import Engine
from sclite.student.recorder import WorkCounter, recorded
from sclite.trace import Trace
from sclite.train.metrics_logger import read_metrics


def held_out(context: Context, untrained: Sequence[Problem] = ()) -> HeldOut:
    """The problems of eval.source.

    `untrained` are problems of the run that nothing was trained on. If they are at least as many as the `eval.fit_share`
    of eval.source, the threshold is fitted on them, and all of eval.source is tested. Unusable rows are dropped, and so
    are problems that overlap the training data or that a threshold was fitted on, which would measure memorization.
    dropped.jsonl lists them.
    """
    from sclite.data.problems import (
        build_index,
        find_overlap,
        load_problems,
        split_for_stages,
        trainable_problems,
    )
    from sclite.data.sources import is_local_source

    settings, source = context.config.eval, context.config.eval.source
    if not source:
        hint = "pass held-out problems, a file or a Hub dataset: `sclite eval test.jsonl`"
        raise UsageError("eval.source is not set", hint)
    unusable: list[Drop] = []
    found = load_problems(settings, settings.limit, unusable, key="eval.source")
    drops = [drop.model_copy(update={"stage": "eval"}) for drop in unusable]
    # everything the run trains on: its problems, unless they were skipped for this dataset, and its templates
    trained = [(row.id, row.question) for row in trainable_problems(context.run)]
    trained += [(row.id, row.question) for row in context.run.read("templates.jsonl", Template)]
    index = build_index(trained)
    known = {problem.id: find_overlap(problem.question, index) for problem in found}
    for problem in found:
        if known[problem.id]:
            detail = f"shares 13 words in a row, or the whole question, with the training problem {known[problem.id]}"
            why = {"reason": "overlaps_training", "detail": detail, "raw": problem.question}
            drops.append(Drop(stage="eval", id=problem.id, **why))
    fresh = [problem for problem in found if not known[problem.id]]
    tested, fitting = split_for_stages(fresh, settings.fit_share, context.config.seed)
    if len(untrained) >= max(MIN_PROBLEMS, len(fitting)):
        tested, fitting = fresh, list(untrained)
    fitted_on = set(context.run.read_json(FITTED_ON, list[str]) or ())
    used = [problem for problem in tested if digest(problem.question) in fitted_on]
    tested = [problem for problem in tested if problem not in used]
    drops += [Drop(stage="eval", id=p.id, reason="used_for_threshold", raw=p.question) for p in used]
    context.run.replace_drops("eval", drops)
    if len(tested) < 5 or (context.config.review.needs_fit and len(fitting) < 5):
        hint = (
            "evaluate on 30 or more problems that were not trained on; eval.limit (--limit) sets the maximum"
        )
        raise DataError(f"{source}: too few problems, {len(fresh)} of {len(found)} were not trained on", hint)
    name, default = source.rstrip("/").rpartition("/")[2], Eval.model_fields["limit"].default
    if is_local_source(source):
        dataset, names = str(Path(source).resolve()), [name.partition(".")[0]]
    else:
        dataset, names = source, [name, settings.subset, settings.split]
    folder = result_folder(context.run, dataset, names, settings.limit, default)
    return HeldOut(tested, fitting, source, dataset, folder, Counter(drop.reason for drop in drops))


def evaluate(
    context: Context,
    names: Sequence[str],
    held_out: HeldOut,
    judge: Judge | None = None,
    works: Sequence[tuple[str, Trace, int]] = (),
) -> dict[str, Any]:
    """Evaluate the exported students: rows, summary.json and report.html in the folder, thresholds in export/.

    Any other name is a model behind an API, whose review is free. `works` are those of eval.labelled.
    """
    config, run, folder = context.config, context.run, held_out.folder
    figures: dict[str, Any] = {}
    baselines: dict[str, Any] = {}
    labelled: dict[str, Any] = {}
    number, students = len(held_out.problems), [name for name in names if name in STUDENTS]
    with_baselines = [name for name in names if config.eval.baselines and name in ("base", *students[-1:])]
    total, parts = len(names) * number, len(names) + len(with_baselines) + len(students if works else ())
    text = f"eval: {number} held-out problems, solved and reviewed"
    with context.display.stage("eval", text) as progress, Grader() as grader:

        def counted(student: Student, texts: int, scores: int, label: str, rows: int = 0) -> WorkCounter:
            """The student, whose work is reported: a part of the evaluation, which solves `rows` problems."""
            part, before = sum(map(len, (figures, baselines, labelled))), len(figures) * number

            def report(written: int, share: float, note: str) -> None:
                done = before + min(written, rows)
                progress(done, total, share=(part + share) / parts, note=f"{label}: {note}")

            progress(before, total, share=part / parts, note=label)
            return WorkCounter(student, texts, scores, report)

        for name in students:
            path = gguf_path(run, name, config)
            work, fitting = number, len(held_out.fitting)
            if config.review.needs_fit and not is_current(load_threshold(config, run, path), fitting):
                work += fitting if fitting >= MIN_PROBLEMS else 0
            texts, scores = (2 * number, 0) if config.review.mode == "free" else (work, work)
            kept = run.path(f"{folder}/{name}.partial.jsonl")
            identity = f"{run.file_digest(str(path.resolve()))} {config.eval.context}"
            with (
                Engine(path, context=config.eval.context) as engine,
                recorded(engine, kept, identity) as recorder,
            ):
                student = counted(recorder, texts, scores, name, number)
                given = (config, run, name, student, path, held_out, grader, judge)
                found = evaluate_model(*given, resumed=bool(recorder.known))
                made_from = source_digest(config, run, name)
                found |= {"file": path.name, "bytes": path.stat().st_size, "made_from": made_from}
                figures[name] = found
                if name in with_baselines:
                    samples = 0 if name == "base" else config.eval.votes * number
                    student = counted(recorder, number + samples, samples, f"baselines of {name}")
                    baselines[name] = measure_baselines(config, run, name, student, held_out, found, grader)
                if works:
                    student = counted(recorder, 0, len(works), f"labelled work, {name}")
                    labelled[name] = measure_labelled(config, student, works, cutoff_of(config, found))
        for name in [name for name in names if name not in STUDENTS]:
            free = config.model_copy(update={"review": config.review.model_copy(update={"mode": "free"})})
            settings = config.attempts.model_copy(update={"student": name})
            with context.endpoint(settings, "eval") as endpoint:
                student = counted(endpoint, 2 * number, 0, name, number)
                version = str(endpoint.version)
                found = evaluate_model(free, run, name, student, Path(), held_out, grader, judge, version)
            figures[name] = found | {"file": "", "bytes": 0, "made_from": ""}
        progress(total, total)
    context.display.done("eval", f"eval: {', '.join(names)}")
    summary = {
        "models": figures,
        "baselines": {label: each for found in baselines.values() for label, each in found.items()},
        "labelled": labelled,
        "n": number,
        "dropped": dict(held_out.dropped),
        "notes": summary_notes(figures, held_out, config.eval.max_tokens),
        "source": held_out.source,
        "dataset": held_out.dataset,
        "folder": folder,
    }
    run.write_json(f"{folder}/{SUMMARY}", summary)
    examples: list[tuple[str, Outcome]] = []
    for name in names:
        rows = run.rows(figures[name]["rows"], Outcome, whole=False)
        examples += [(name, row) for row in rows if row.second and row.accused][:3]
    curves = {stage: read_metrics(run.path(f"{stage}/metrics.jsonl")) for stage in ("sft", "warmup", "dpo")}
    write_report(run.path(f"{folder}/{REPORT}"), summary, examples, curves)
    return summary


def stored_results(run: Run, held_out: HeldOut, names: Sequence[str]) -> dict[str, list[Outcome]]:
    """The newest results of another `run` for these students on some of these problems; DataError if it has none."""
    questions = {problem.question for problem in held_out.problems}
    for summary in summaries(run):
        models = {name: figures for name, figures in summary["models"].items() if name in names}
        found = {name: run.read(figures["rows"], Outcome, whole=False) for name, figures in models.items()}
        if any(row.question in questions for rows in found.values() for row in rows):
            return found
    hint = f"evaluate it first: sclite eval {quote(held_out.source)} --run {quote(str(run.folder))}"
    raise DataError(f"{run.folder} has no results of {', '.join(names)} on {held_out.source}", hint)


def compare_results(
    run: Run, summary: Mapping[str, Any], theirs: Mapping[str, list[Outcome]]
) -> dict[str, Any]:
    """{label: figures} of `compare_outcomes`, for the first answers and the answers after review of each student in both."""
    compared: dict[str, Any] = {}
    for name in [name for name in summary["models"] if name in theirs]:
        ours = run.read(summary["models"][name]["rows"], Outcome, whole=False)
        compared[f"{name}, first answer"] = compare_outcomes(ours, theirs[name], "correct1")
        compared[f"{name}, after review"] = compare_outcomes(ours, theirs[name], "correct2")
    return compared
