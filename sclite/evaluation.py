"""Measuring exported students, and the thresholds that are fitted on the way: between the commands and the eval stage."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from sclite import prompts
from sclite.config import Eval
from sclite.context import Context
from sclite.errors import DataError, UsageError
from sclite.export.stage import ADAPTERS
from sclite.records import Drop, Problem, Template

THRESHOLDS = "export/review.json"
"""By the digest of a GGUF: the threshold fitted on it, on how many problems and for what harm, and the prompts' digest."""


class Fitted(BaseModel):
    """A fitted threshold: on how many problems, for what harm, under which prompts."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=True)
    threshold: float
    n: int
    max_harm: float
    prompts: str


FEW_TO_FIT = 50
"""With fewer problems one answer more or less moves the threshold far."""


def held_out(context: Context) -> tuple[list[Problem], list[Problem], dict[str, int]]:
    """(test problems, problems for the threshold, skipped ones by reason) from eval.source.

    Skipped are rows that cannot be used, and problems that overlap what the run trains on, which would measure memory;
    dropped.jsonl names them.
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
    place = (source.source, source.subset, source.split, source.limit)
    drops: list[Drop] = []
    found = load_problems(*place, drops, columns=source.columns(), key="eval.source")
    known = find_contaminated(found, _training_questions(context))
    drops = [drop.model_copy(update={"stage": "eval"}) for drop in drops]
    drops += [_overlap_drop(p, known[p.id]) for p in found if p.id in known]
    context.run.replace_drops(["eval"], drops)
    fresh = [p for p in found if p.id not in known]
    tested, fitted = split_for_stages(fresh, source.fit_share, context.config.seed)
    if len(tested) < 5 or len(fitted) < 5:
        enough = ceil(8 / max(0.05, min(source.fit_share, 1 - source.fit_share)))
        raise DataError(
            f"{source.source}: {len(fresh)} of {len(found)} problems were not trained on, which are too few",
            f"evaluate on {enough} or more",
        )
    return tested, fitted, dict(Counter(drop.reason for drop in drops))


def result_folder(context: Context) -> tuple[str, str]:
    """(folder of the results, dataset) for eval.source and eval.limit."""
    from sclite.data.sources import is_local
    from sclite.evaluate import results

    source = context.config.eval
    local, usual = is_local(source.source), Eval.model_fields["limit"].default
    dataset, name = results.dataset_of(source.source, local)
    names = (name,) if local else (name, source.subset, source.split)
    return results.result_folder(context.run, dataset, names, source.limit, usual), dataset


def _training_questions(context: Context) -> Iterator[tuple[str, str]]:
    """(id, question) of all that the run trains on: its problems, and templates that were brought along."""
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
    """Measure the exported students; writes summary.json, report.html and the rows into `folder`, and the thresholds
    beside the GGUFs.

    `dataset` is the path or Hub ID behind `folder`, `source` how the report names it; `dropped` are its skipped rows.
    """
    from sclite.evaluate.evaluate import evaluate_model
    from sclite.export.stage import gguf_path, made_from
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
                digest = context.run.file_digest(str(path.resolve()))
                figures[name] = evaluate_model(
                    context.config,
                    context.run,
                    name,
                    student,
                    problems=problems,
                    fitting=fitting,
                    grader=grader,
                    judge=judge,
                    identity=digest,
                    folder=folder,
                )
            figures[name] |= {
                "file": path.name,
                "bytes": path.stat().st_size,
                "made_from": made_from(context.config, context.run, name),
            }
        progress(len(names), len(names))
    context.display.done("eval", f"eval: {', '.join(names)}")
    notes = [f"skipped {reason.replace('_', ' ')}: {count:,}" for reason, count in (dropped or {}).items()]
    notes += [f"review is off for {name}: {each['off']}" for name, each in figures.items() if each["off"]]
    notes += cut_note(figures, context.config.eval.max_tokens)
    notes += fit_note(figures, len(fitting))
    notes += keep_thresholds(context, figures)
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


def keep_thresholds(context: Context, figures: Mapping[str, Any]) -> list[str]:
    """Store the fitted thresholds for chat; a sentence where one stays that more problems have fitted.

    One that was fitted under other prompts or for another harm is replaced all the same.
    """
    if context.config.review.threshold is not None:  # the user's own, which no evaluation has fitted
        return []
    kept, stays = context.run.read_json(THRESHOLDS, dict[str, Fitted]) or {}, {}
    kept = {digest: fitted.model_dump() for digest, fitted in kept.items()}
    for each in figures.values():
        if each["threshold"] is None:
            continue
        made = {
            "threshold": each["threshold"],
            "n": (each["fitted"] or {}).get("n", 0),
            "max_harm": context.config.review.max_harm,
            "prompts": _review_digest(context),
        }
        before = kept.get(each["gguf"], {})
        same = all(before.get(name) == made[name] for name in ("max_harm", "prompts"))
        if same and before.get("n", 0) > made["n"]:
            stays = {"n": before["n"], "instead": made["threshold"]}
        else:
            kept[each["gguf"]] = made
    context.run.write_json(THRESHOLDS, kept)
    if not stays:
        return []
    other = f"--set review.threshold={stays['instead']:.4g} takes this one"
    return [f"chat keeps the threshold that {stays['n']} other problems have fitted before; {other}"]


def cut_note(figures: Mapping[str, Any], limit: int) -> list[str]:
    """A sentence on first answers that were cut off by length, where they are more than one in a hundred of a student's."""
    many = [
        f"{name} {each['cut']} of {each['n']}"
        for name, each in figures.items()
        if each["cut"] > 0.01 * each["n"]
    ]
    if not many:
        return []
    return [
        f"first answers that were cut off: {', '.join(many)}; raise eval.max_tokens ({limit}) or eval.context"
    ]


def fit_note(figures: Mapping[str, Any], count: int) -> list[str]:
    """A sentence on a threshold that was fitted on few problems; none where none was fitted."""
    if count >= FEW_TO_FIT or not any(each["fitted"] for each in figures.values()):
        return []
    remedy = "give more problems, or set review.threshold"
    return [f"{count} other problems of the source fitted the review's threshold: few; {remedy}"]


def write_summary(context: Context, summary: dict[str, Any]) -> None:
    """summary.json and report.html in the folder that the summary names."""
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


def _review_digest(context: Context) -> str:
    return prompts.digest(
        "student_system", "student_solve", "student_review", folder=context.config.prompts.folder
    )


def stored_threshold(context: Context, gguf: Path) -> float | None:
    """The threshold that was fitted on this very file under these prompts, here or in the run that it lies in; else None."""
    beside = gguf.parent / Path(THRESHOLDS).name
    for name in dict.fromkeys((str(context.run.path(THRESHOLDS).resolve()), str(beside.resolve()))):
        known = context.run.read_json(name, dict[str, Fitted]) or {}
        kept = known.get(context.run.file_digest(str(gguf.resolve()))) if known else None
        if kept and kept.prompts == _review_digest(context):
            return kept.threshold
    return None


def measured_gguf(context: Context, path: Path) -> Path | None:
    """Of the same student in other quantisations one that has a threshold, the largest; None where none has."""
    student = path.name.partition("-")[0]
    others = sorted(path.parent.glob(f"{student}-*.gguf"), key=lambda other: -other.stat().st_size)
    return next((other for other in others if stored_threshold(context, other) is not None), None)


def for_chat(context: Context, model: Path | None, self_correct: bool) -> tuple[Path, float | None]:
    """(GGUF, threshold of its review): of a run whose newest file has none, the file in another quantisation that has one."""
    path, threshold = find_gguf(context, model), context.config.review.threshold
    if threshold is None:
        threshold = stored_threshold(context, path)
    wanted = self_correct and context.config.review.mode == "guided" and model is None
    if threshold is None and wanted and (other := measured_gguf(context, path)):
        context.display.print(f"{path.name} has not been evaluated; this is {other.name}")
        return other, stored_threshold(context, other)
    return path, threshold


def find_gguf(context: Context, model: Path | None) -> Path:
    """The GGUF to talk to: the one given, else the run's own furthest one; raises DataFault where it is none."""
    if model is not None:
        if not model.is_file():
            raise DataError(f"{model} does not exist", "give the path of a GGUF file")
        with open(model, "rb") as file:
            if file.read(4) != b"GGUF":
                raise DataError(f"{model} is no GGUF file", "give one that `sclite export` has written")
        return model
    from sclite.export.stage import gguf_path

    for name in reversed(ADAPTERS):
        chosen = gguf_path(context.run, name, context.config)
        others = chosen.parent.glob(f"{name}-*.gguf") if not chosen.is_file() else ()
        made = [path for path in others if not path.name.endswith(("-full.gguf", "-lora.gguf"))]
        path = max(made, key=lambda path: path.stat().st_mtime, default=chosen)
        if path.is_file():
            return path
    raise DataError(f"{context.run.path('export')} holds no GGUF", "run `sclite export` first")
