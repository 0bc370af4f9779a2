"""Evaluation: a student solves held-out problems and reviews its own answers.

Gold answers are used for grading only, never to decide when to stop.
"""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sclite.config import Config
from sclite.evaluate.answers import NO_STEPS, Answer, grade, harm_warning, review_settings, solve_problems
from sclite.evaluate.metrics import Outcome, compute_metrics
from sclite.evaluate.threshold import FittedThreshold, ensure_threshold, load_threshold, prompts_digest
from sclite.grading.grader import Grader
from sclite.records import Problem
from sclite.run import Run
from sclite.signature import digest
from sclite.student.base import Student
from sclite.student.self_correction import NEVER, NO_REPLY, correct_steps, review, run_together
from sclite.student.step_scores import Cutoff, pool, read_odds
from sclite.trace import Trace, render

SUMMARY, REPORT = "summary.json", "report.html"
LABELLED_SHARES = ("location", "acceptance", "location_f1")
Judge = Callable[[str, Trace], int | None]
"""(question, trace) -> the first wrong step (from 1); 0 if all are right, None if that is unknown."""


@dataclass(frozen=True)
class HeldOut:
    """Problems that no student was trained on: `problems` to solve and review, `fitting` for the review threshold.

    `source` names the dataset in the report, `dataset` is its path or Hub ID, `folder` is for the results.
    """

    problems: Sequence[Problem]
    fitting: Sequence[Problem]
    source: str
    dataset: str
    folder: str
    dropped: Mapping[str, int] = field(default_factory=dict)


def result_folder(run: Run, dataset: str, names: Sequence[str], limit: int, default: int) -> str:
    """eval/<names>, -limit-<N> unless it is the `default`, and a hash if another `dataset` (path or Hub ID) has that name."""
    parts = [*filter(None, names), *([] if limit == default else [f"limit-{limit}"])]
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", "-".join(parts)).strip("-.")[:100] or "problems"
    existing = run.read_json(f"eval/{name}/{SUMMARY}", dict[str, Any])
    taken = existing is not None and existing.get("dataset") != dataset
    return f"eval/{name}-{digest(dataset)[:6]}" if taken else f"eval/{name}"


def summaries(run: Run, shape: Any = dict[str, Any]) -> list[Any]:
    """The summaries of all results of a run as `shape`, newest first."""
    paths = sorted(run.folder.glob(f"eval/*/{SUMMARY}"), key=lambda path: -path.stat().st_mtime_ns)
    found = (run.read_json(str(path.relative_to(run.folder)), shape) for path in paths)
    return [summary for summary in found if summary is not None]


def review_answers(
    student: Student,
    answers: Sequence[Answer],
    config: Config,
    grader: Grader,
    cutoff: Cutoff,
    judge: Judge | None,
    endpoint: bool = False,
) -> list[Outcome]:
    """Turn 2: review each first answer and grade the result. With an `endpoint`, an answer without a reply is unknown."""
    settings, mode = review_settings(config, cutoff), config.review.mode
    scripts = [review(each.problem.question, each.reviewable, settings, mode) for each in answers]
    reviewed = run_together(student, scripts)
    verdicts = grade(grader, [result.answer for result in reviewed], [each.problem for each in answers])
    rows = []
    for answer, result, verdict in zip(answers, reviewed, verdicts, strict=True):
        work = answer.parsed.work
        judged = judge(answer.problem.question, work) if judge is not None and work.steps else None
        after = verdict if result.trace else answer.correct
        row = answer.outcome(
            second=render(result.trace) if result.trace else None,
            correct2=None if endpoint and result.note == NO_REPLY else after,
            accused=result.accused,
            cause=result.cause,
            correction=result.correction,
            **step_labels(judged, len(work.steps)),
            step_scores=tuple(round(score, 4) for score in result.scores),
            tokens2=result.tokens,
            prefill2=result.prefill,
            note=result.note,
        )
        rows.append(row)
    return rows


def step_labels(wrong: int | None, count: int) -> dict[str, Any]:
    """The labels in the Outcome of a work of `count` steps, by its first wrong step (0: none, None: unknown)."""
    if wrong is None:
        return {}
    labels = tuple(step == wrong for step in range(1, (wrong or count) + 1))
    return {"true_step": wrong or None, "true_known": True, "step_labels": labels}


def measure_labelled(
    config: Config, student: Student, works: Sequence[tuple[str, Trace, int]], cutoff: Cutoff
) -> dict[str, Any]:
    """The AUC and, with intervals, LABELLED_SHARES of a guided review of (question, work, first wrong step or 0), labelled by
    people (ProcessBench, arXiv 2412.06559).

    `unknown` counts works that are too long to review, `n` the others. Without a threshold, all but the AUC is None.
    """
    weight = cutoff.confidence_weight
    scripts = [read_odds(question, work, config.prompts.folder, (weight,)) for question, work, _ in works]
    rows = []
    for number, odds in enumerate(run_together(student, scripts)):
        (question, work, step), scores = works[number], pool(*odds, weight)
        right = step == 0 if scores else None
        row = Outcome(
            id=str(number),
            question=question,
            gold="",
            first=render(work),
            second=None,
            correct1=right,
            correct2=right,
            accused=next((n for n, score in enumerate(scores, 1) if score > cutoff.threshold), None),
            **step_labels(step, len(work.steps)),
            step_scores=scores,
            format_ok=True,
        )
        rows.append(row)
    figures, shares = compute_metrics(rows, seed=config.seed), LABELLED_SHARES
    names = [*shares, *(f"{share}_interval" for share in shares)]
    known = [] if cutoff.threshold == NEVER else names
    found = {name: figures[name] for name in ("n", "unknown", "auc", *known)}
    return dict.fromkeys(names) | found


def located_correction_rate(
    student: Student, rows: Sequence[Outcome], answers: Sequence[Answer], config: Config, grader: Grader
) -> float | None:
    """The share of wrong answers that are corrected when given the true first wrong step; None if none is known."""
    cases = [
        (answer.problem, answer.parsed.work, row.true_step)
        for row, answer in zip(rows, answers, strict=True)
        if row.true_step is not None and row.correct1 is False
    ]
    asked = [(problem.question, work, step) for problem, work, step in cases]
    corrected = correct_steps(student, asked, review_settings(config))
    verdicts = grade(grader, [each.answer for each in corrected], [problem for problem, *_ in cases])
    known = [verdict for verdict in verdicts if verdict is not None]
    return round(sum(known) / len(known), 4) if known else None


def evaluate_model(
    config: Config,
    run: Run,
    name: str,
    student: Student,
    gguf: Path,
    held_out: HeldOut,
    grader: Grader,
    judge: Judge | None = None,
    version: str = "",
    resumed: bool = False,
) -> dict[str, Any]:
    """Evaluate one student with and without review; writes <name>.jsonl and <name>.json to the results folder.

    Free reviews have files of their own, <name>-free. The threshold is fitted, unless one is set or stored for the `gguf`.
    Returns stored figures if nothing has changed. A model behind an API has a `version` and no `gguf`; its figures are not
    reused if a call has failed. Seconds are None in an evaluation that was `resumed`.
    """
    problems, fits = held_out.problems, config.review.needs_fit
    free = config.review.mode == "free" and not version
    file = f"{held_out.folder}/{name}{'-free' * free}"
    chosen = config.eval.model_dump(exclude={"baselines", "votes", "labelled"})
    settings = [chosen, config.review.model_dump(), prompts_digest(config)]
    rows_used = [[p.model_dump() for p in part] for part in (problems, held_out.fitting)]
    identity = version or run.file_digest(str(gguf.resolve()))
    signature = digest([identity, settings, rows_used, judge is not None])
    kept = run.read_json(f"{file}.json", dict[str, Any]) or {}
    stored = load_threshold(config, run, gguf) if fits else None
    same_fit = kept.get("off") == NO_STEPS or kept.get("fitted") == (stored and stored.model_dump())
    if kept.get("signature") == signature and same_fit:
        return kept
    began = time.monotonic()
    answers = solve_problems(student, problems, config, grader)
    between = time.monotonic()
    reviewable, fitted = any(answer.reviewable.steps for answer in answers), None
    cutoff, off = Cutoff.of(config.review), ""
    if fits and reviewable:
        fitted = ensure_threshold(config, run, gguf, student, held_out.fitting, grader)
        cutoff, off = fitted.cutoff or Cutoff(NEVER, fitted.confidence_weight), fitted.off
    if not reviewable:
        off = NO_STEPS
    reviewing = time.monotonic()
    rows = review_answers(student, answers, config, grader, cutoff, judge, bool(version))
    ended = time.monotonic()
    figures = compute_metrics(rows, seed=config.seed)
    # failed calls, unlike prompts that are too long, are retried by the next evaluation
    failed = any(answer.reply.finish == "error" for answer in answers)
    failed = failed or any(row.note == NO_REPLY for row in rows)
    figures |= {
        "signature": "" if version and failed else signature,
        "gguf": identity,
        "rows": f"{file}.jsonl",
        "threshold": config.review.threshold if fitted is None else fitted.threshold,
        "fitted": fitted and fitted.model_dump(),
        "off": off,
        # an endpoint cannot continue a given prefix
        "correction_rate_given_location": None
        if version
        else located_correction_rate(student, rows, answers, config, grader),
        "seconds": None if resumed else round((between - began + ended - reviewing) / len(rows), 4),
        "seconds_first": None if resumed else round((between - began) / len(rows), 4),
    }
    run.replace(f"{file}.jsonl", rows)
    run.write_json(f"{file}.json", figures)
    return figures


def cutoff_of(config: Config, figures: Mapping[str, Any]) -> Cutoff:
    """The cutoff that an evaluation with these figures has reviewed with."""
    weight = (figures["fitted"] or config.review.model_dump())["confidence_weight"]
    return Cutoff(NEVER if figures["threshold"] is None else figures["threshold"], weight or 0.0)


def summary_notes(figures: Mapping[str, Any], held_out: HeldOut, max_tokens: int) -> list[str]:
    """What a reader of all students' figures must know."""
    notes = [f"skipped ({reason.replace('_', ' ')}): {n:,}" for reason, n in held_out.dropped.items()]
    notes += [f"review is off for {name}: {each['off']}" for name, each in figures.items() if each["off"]]
    if {"sft", "dpo"} <= figures.keys() and (harm := harm_warning("stage 2", figures["sft"], figures["dpo"])):
        notes.append(harm)
    cut = {name: each for name, each in figures.items() if each["cut"] > each["n"] / 100}
    if cut:
        counts = ", ".join(f"{name} {each['cut']} of {each['n']}" for name, each in cut.items())
        hint = f"raise eval.max_tokens ({max_tokens}) or eval.context"
        notes.append(f"truncated first answers: {counts}; {hint}")
    for name, each in figures.items():
        fitted = FittedThreshold.model_validate(each["fitted"]) if each["fitted"] else None
        if fitted is not None and fitted.threshold is not None and fitted.given_up:
            notes.append(f"review threshold of {name}: {fitted.summary}")
    return notes
