"""Evaluation of exported students, and the review thresholds that it fits: what `sclite eval` and `sclite chat` need."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any

from sclite.config import Eval
from sclite.context import Context
from sclite.errors import DataError, UsageError
from sclite.evaluate.threshold import MIN_PROBLEMS, Fitted, load_threshold
from sclite.export.model import ADAPTERS
from sclite.records import Drop, Problem, Template
from sclite.student.self_correction import NEVER


def held_out(
    context: Context, untrained: Sequence[Problem] = ()
) -> tuple[list[Problem], list[Problem], dict[str, int]]:
    """(test problems, problems for the threshold, skipped ones by reason) from eval.source.

    If the run has as many problems that nothing was trained on as `eval.fit_share` of these, the threshold is fitted on
    those `untrained` ones and all of these are tested. Unusable rows are skipped, and problems that overlap the training data: they would measure memorization. dropped.jsonl
    names both.
    """
    from sclite.data.contamination import find_contaminated
    from sclite.data.problems import load_problems, split_for_stages

    source = context.config.eval
    if not source.source:
        own = (
            f"; `sclite quickstart --run {context.run.folder}` takes its own"
            if context.config.teacher.embedded
            else ""
        )
        raise UsageError(
            "eval.source is not set",
            f"name held-out problems, a file or a Hub dataset, as in `sclite eval test.jsonl`{own}",
        )
    drops: list[Drop] = []
    found = load_problems(source, source.limit, drops, key="eval.source")
    known = find_contaminated(found, _training_questions(context))
    drops = [drop.model_copy(update={"stage": "eval"}) for drop in drops]
    drops += [_overlap_drop(p, known[p.id]) for p in found if p.id in known]
    context.run.replace_drops(["eval"], drops)
    fresh = [p for p in found if p.id not in known]
    tested, fitted = split_for_stages(fresh, source.fit_share, context.config.seed)
    if len(untrained) >= max(MIN_PROBLEMS, len(fitted)):
        tested, fitted = fresh, list(untrained)
    if len(tested) < 5 or len(fitted) < 5:
        enough = ceil(8 / max(0.05, min(source.fit_share, 1 - source.fit_share)))
        raise DataError(
            f"{source.source}: too few problems, {len(fresh)} of {len(found)} were not trained on",
            f"evaluate on {enough} or more",
        )
    return tested, fitted, dict(Counter(drop.reason for drop in drops))


def result_folder(context: Context) -> tuple[str, str]:
    """(folder of the results, dataset) for eval.source and eval.limit."""
    from sclite.data.sources import is_local_source
    from sclite.evaluate import results

    source = context.config.eval
    local, usual = is_local_source(source.source), Eval.model_fields["limit"].default
    dataset, name = results.dataset_of(source.source, local)
    names = (name,) if local else (name, source.subset, source.split)
    return results.result_folder(context.run, dataset, names, source.limit, usual), dataset


def _training_questions(context: Context) -> Iterator[tuple[str, str]]:
    """(id, question) of all that the run trains on: its problems and its templates."""
    drops = context.run.read("dropped.jsonl", Drop)
    spared = {(drop.id, drop.raw) for drop in drops if drop.reason == "overlaps_evaluation"}
    for problem in context.run.read("problems.jsonl", Problem):
        if (problem.id, problem.question) not in spared:
            yield problem.id, problem.question
    for template in context.run.read("templates.jsonl", Template):
        yield template.id, template.question


def _overlap_drop(problem: Problem, name: str) -> Drop:
    detail = f"shares 13 words in a row, or the whole question, with the training problem {name}"
    return Drop(stage="eval", id=problem.id, reason="overlaps_training", detail=detail, raw=problem.question)


def evaluate(
    context: Context,
    names: Sequence[str],
    problems: Sequence[Problem],
    fitting: Sequence[Problem],
    judge: Callable[..., int | None] | None = None,
    *,
    folder: str,
    dataset: str,
    source: str = "",
    dropped: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Evaluate the exported students; writes summary.json, report.html and the rows to `folder`, thresholds to export/.

    `dataset` is the path or Hub ID behind `folder`, `source` its name in the report, `dropped` its skipped rows by reason.
    """
    from sclite.evaluate.evaluate import evaluate_model
    from sclite.export.model import gguf_path, source_digest
    from sclite.grading.worker import Grader
    from sclite.student.llama_cpp.engine import Engine

    figures: dict[str, Any] = {}
    with (
        context.display.stage(
            "eval", f"eval: {len(problems)} held-out problems, solved and reviewed"
        ) as progress,
        Grader() as grader,
    ):
        for number, name in enumerate(names):
            progress(number, len(names))
            path = gguf_path(context.run, name, context.config)
            with Engine(path, context=context.config.eval.context) as student:
                figures[name] = evaluate_model(
                    context.config,
                    context.run,
                    name,
                    student,
                    gguf=path,
                    problems=problems,
                    fitting=fitting,
                    grader=grader,
                    judge=judge,
                    folder=folder,
                )
            figures[name] |= {
                "file": path.name,
                "bytes": path.stat().st_size,
                "made_from": source_digest(context.config, context.run, name),
            }
        progress(len(names), len(names))
    context.display.done("eval", f"eval: {', '.join(names)}")
    notes = [f"skipped {reason.replace('_', ' ')}: {count:,}" for reason, count in (dropped or {}).items()]
    notes += [f"review is off for {name}: {each['off']}" for name, each in figures.items() if each["off"]]
    notes += cut_note(figures, context.config.eval.max_tokens)
    notes += threshold_notes(figures, len(fitting))
    summary = {
        "models": figures,
        "n": len(problems),
        "dropped": dict(dropped or {}),
        "notes": notes,
        "source": source,
        "dataset": dataset,
        "folder": folder,
    }
    write_summary(context, summary)
    return summary


def cut_note(figures: Mapping[str, Any], limit: int) -> list[str]:
    """A note if more than 1 % of a student's first answers were truncated."""
    many = [
        f"{name} {each['cut']} of {each['n']}"
        for name, each in figures.items()
        if each["cut"] > 0.01 * each["n"]
    ]
    if not many:
        return []
    return [f"truncated first answers: {', '.join(many)}; raise eval.max_tokens ({limit}) or eval.context"]


def threshold_notes(figures: Mapping[str, Any], count: int) -> list[str]:
    """A note for each threshold that an earlier command fitted on more problems, or that the bound on harm makes worse."""
    notes = []
    for name, each in figures.items():
        fitted = Fitted.model_validate(each["fitted"]) if each["fitted"] else None
        if fitted and fitted.threshold is not None and (fitted.problems > count or fitted.given_up):
            notes.append(f"review threshold of {name}: {fitted.summary}")
    return notes


def write_summary(context: Context, summary: dict[str, Any]) -> None:
    """Write summary.json and report.html to the folder that the summary names."""
    from sclite.evaluate.report import write_report
    from sclite.evaluate.results import REPORT, SUMMARY
    from sclite.train.metrics_logger import read_metrics

    folder, run = summary["folder"], context.run
    run.write_json(f"{folder}/{SUMMARY}", summary)
    examples = []
    for name in summary["models"]:
        shown = run.read_json(f"{folder}/{name}.reviews.json", list[dict[str, Any]]) or []
        examples += [{**example, "model": name} for example in shown[:3]]
    rows = [
        row for stage in ("sft", "warmup", "dpo") for row in read_metrics(run.path(f"{stage}/metrics.jsonl"))
    ]
    curves: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        curves.setdefault(row["phase"], []).append(row)
    write_report(run.path(f"{folder}/{REPORT}"), summary, examples, curves)


def stored_threshold(context: Context, gguf: Path) -> float | None:
    """The threshold stored for a GGUF, NEVER if review stays off for it; None if none was fitted."""
    fitted = load_threshold(context.config, context.run, gguf)
    return None if fitted is None else NEVER if fitted.threshold is None else fitted.threshold


def measured_gguf(context: Context, path: Path) -> Path | None:
    """The largest file of the same student in another quantization that has a threshold; None if there is none."""
    student = path.name.partition("-")[0]
    others = sorted(path.parent.glob(f"{student}-*.gguf"), key=lambda other: -other.stat().st_size)
    return next((other for other in others if stored_threshold(context, other) is not None), None)


def for_chat(context: Context, model: Path | None, self_correct: bool) -> tuple[Path, float | None]:
    """(GGUF, review threshold). If the newest file has no threshold, a file in another quantization that has one."""
    path, threshold = find_gguf(context, model), context.config.review.threshold
    if threshold is None:
        threshold = stored_threshold(context, path)
    wanted = self_correct and context.config.review.mode == "guided" and model is None
    if threshold is None and wanted and (other := measured_gguf(context, path)):
        context.display.print(f"{path.name} has not been evaluated: using {other.name}")
        return other, stored_threshold(context, other)
    return path, threshold


def find_gguf(context: Context, model: Path | None) -> Path:
    """The GGUF to chat with: the one given, or the run's last trained student. Raises DataError if there is none."""
    if model is not None:
        if not model.is_file():
            raise DataError(f"{model} does not exist", "give the path of a GGUF file")
        with open(model, "rb") as file:
            if file.read(4) != b"GGUF":
                raise DataError(f"{model} is not a GGUF file", "give a file that `sclite export` wrote")
        return model
    from sclite.export.model import gguf_path

    for name in reversed(ADAPTERS):
        chosen = gguf_path(context.run, name, context.config)
        others = chosen.parent.glob(f"{name}-*.gguf") if not chosen.is_file() else ()
        made = [path for path in others if not path.name.endswith(("-full.gguf", "-lora.gguf"))]
        path = max(made, key=lambda path: path.stat().st_mtime, default=chosen)
        if path.is_file():
            return path
    raise DataError(f"{context.run.path('export')} holds no GGUF", "run `sclite export` first")
