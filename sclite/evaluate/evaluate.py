"""Evaluation: a student solves held-out problems and reviews its own answers.

Gold answers are used for grading only, never to decide when to stop.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sclite.config import Config
from sclite.evaluate.answers import NO_STEPS, FirstAnswers, grade, review_settings, solve_problems
from sclite.evaluate.metrics import Outcome, compute_metrics
from sclite.evaluate.threshold import FittedThreshold, ensure_threshold, load_threshold, prompts_digest
from sclite.grading.grader import Grader
from sclite.records import Problem
from sclite.run import Run
from sclite.signature import digest
from sclite.student.base import Student
from sclite.student.self_correction import NEVER, NO_REPLY, correct_steps, review, run_together
from sclite.student.step_scores import Cutoff
from sclite.trace import Trace, render

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


def review_answers(
    student: Student,
    first: FirstAnswers,
    config: Config,
    grader: Grader,
    cutoff: Cutoff,
    judge: Judge | None,
    endpoint: bool = False,
) -> list[Outcome]:
    """Turn 2: review each first answer and grade the result. With an `endpoint`, an answer without a reply is unknown."""
    settings, mode = review_settings(config, cutoff), config.review.mode
    pairs = zip(first.problems, first.reviewable, strict=True)
    scripts = [review(problem.question, trace, settings, mode) for problem, trace in pairs]
    reviewed = run_together(student, scripts)
    second = grade(grader, [review.answer for review in reviewed], first.problems)
    rows = []
    columns = first.problems, first.replies, first.parsed, first.correct, reviewed, second
    for problem, reply, parsed, correct, result, verdict in zip(*columns, strict=True):
        work = parsed.work
        judged = judge(problem.question, work) if judge is not None and work.steps else None
        true_step, known = judged or None, judged is not None
        after = verdict if result.trace else correct
        labelled = range(1, (true_step or len(work.steps)) + 1) if known else ()
        rows.append(
            Outcome(
                id=problem.id,
                question=problem.question,
                gold=problem.answer,
                first=reply.text,
                second=render(result.trace) if result.trace else None,
                correct1=correct,
                correct2=None if endpoint and result.note == NO_REPLY else after,
                accused=result.accused,
                cause=result.cause,
                correction=result.correction,
                true_step=true_step,
                true_known=known,
                step_scores=tuple(round(score, 4) for score in result.scores),
                step_labels=tuple(step == true_step for step in labelled),
                format_ok=not parsed.issues,
                cut=reply.finish == "length",
                tokens1=reply.tokens,
                tokens2=result.tokens,
                prefill1=reply.prefill_tokens,
                prefill2=result.prefill,
                note=result.note,
            )
        )
    return rows


def located_correction_rate(
    student: Student, rows: Sequence[Outcome], first: FirstAnswers, config: Config, grader: Grader
) -> float | None:
    """The share of wrong answers that are corrected when given the true first wrong step; None if none is known."""
    cases = [
        (problem, (problem.question, parsed.work, o.true_step))
        for o, problem, parsed in zip(rows, first.problems, first.parsed, strict=True)
        if o.true_step is not None and o.correct1 is False
    ]
    corrected = correct_steps(student, [case for _, case in cases], review_settings(config))
    verdicts = grade(grader, [c.answer for c in corrected], [problem for problem, _ in cases])
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
    problems, free = held_out.problems, config.review.mode == "free" and not version
    file = f"{held_out.folder}/{name}{'-free' * free}"
    fits = config.review.needs_fit
    chosen = config.eval.model_dump(exclude={"baselines", "votes", "labelled"})
    settings = [chosen, config.review.model_dump(), prompts_digest(config)]
    rows_used = [[p.model_dump() for p in part] for part in (problems, held_out.fitting)]
    identity = version or run.file_digest(str(gguf.resolve()))
    signature = digest([identity, settings, rows_used, judge is not None])
    stored = load_threshold(config, run, gguf) if fits else None
    kept = run.read_json(f"{file}.json", dict[str, Any]) or {}
    same_fit = kept.get("off") == NO_STEPS or kept.get("fitted") == (stored and stored.model_dump())
    if kept.get("signature") == signature and same_fit:
        return kept | {"rows": f"{file}.jsonl"}
    began = time.monotonic()
    first = solve_problems(student, problems, config, grader)
    between = time.monotonic()
    reviewable, fitted = any(trace.steps for trace in first.reviewable), None
    cutoff, off = Cutoff.of(config.review), ""
    if fits and reviewable:
        fitted = ensure_threshold(config, run, gguf, student, held_out.fitting, grader)
        cutoff, off = fitted.cutoff or Cutoff(NEVER, fitted.confidence_weight), fitted.off
    if not reviewable:
        off = NO_STEPS
    elif config.review.mode == "guided" and config.review.rounds == 0:
        off = "review.rounds is 0"
    reviewing = time.monotonic()
    rows = review_answers(student, first, config, grader, cutoff, judge, bool(version))
    ended = time.monotonic()
    figures = compute_metrics(rows, seed=config.seed)
    # failed calls, unlike prompts that are too long, are retried by the next evaluation
    failed = any(r.finish == "error" for r in first.replies) or any(row.note == NO_REPLY for row in rows)
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
        else located_correction_rate(student, rows, first, config, grader),
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
    if {"sft", "dpo"} <= figures.keys():
        before, after = (figures[name]["acc_t1"] for name in ("sft", "dpo"))
        if None not in (before, after) and after < figures["sft"]["acc_t1_interval"][0]:
            shares = f"{100 * before:.1f} → {100 * after:.1f} % right"
            hint = "lower warmup.learning_rate, or raise warmup.replay_share"
            notes.append(f"stage 2 made first answers worse, {shares}; {hint}")
    cut = {name: each for name, each in figures.items() if each["cut"] > each["n"] / 100}
    if cut:
        counts = ", ".join(f"{name} {each['cut']} of {each['n']}" for name, each in cut.items())
        hint = f"raise eval.max_tokens ({max_tokens}) or eval.context"
        notes.append(f"truncated first answers: {counts}; {hint}")
    for name, each in figures.items():
        fitted = FittedThreshold.model_validate(each["fitted"]) if each["fitted"] else None
        earlier = fitted is not None and fitted.problems > len(held_out.fitting)
        if fitted and fitted.threshold is not None and (earlier or fitted.given_up):
            notes.append(f"review threshold of {name}: {fitted.summary}")
    return notes
