"""Evaluation: a student solves held-out problems and reviews its own answers (METHOD section 6).

The threshold of the guided review is fitted first, for the same student, on problems used nowhere else. Gold answers
are used for grading only, never to decide when to stop.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from sclite import prompts
from sclite.config import Config
from sclite.evaluate.metrics import Outcome, Scored, fit_threshold, summarize
from sclite.grading.extract import answer_of
from sclite.grading.worker import Grader
from sclite.records import Problem
from sclite.run import Run
from sclite.signature import digest
from sclite.student.base import Reply, Request, Student
from sclite.student.self_correction import (
    NEVER,
    Reviewed,
    ReviewSettings,
    correct_steps,
    review_free,
    review_guided,
    score_traces,
)
from sclite.trace import Trace, parse, work_of

Judge = Callable[[str, Trace], int | None]
"""(question, trace) -> the first wrong step (from 1), or None if all are right."""

FIT_SHARE, FIT_BLOCK = 0.6, 0.1
"""Shares of the fitting problems: at most how many have steps corrected, and how many per block."""
MANY_TO_FIT = 200
"""From this number of fitting problems on, half of them show whether the student's corrections fix anything."""


@dataclass(frozen=True)
class FirstAnswers:
    """A student's first answers to some problems: replies, traces, verdicts."""

    problems: Sequence[Problem]
    replies: list[Reply]
    traces: list[Trace]
    correct: list[bool | None]


def solve(student: Student, problems: Sequence[Problem], config: Config, grader: Grader) -> FirstAnswers:
    """Turn 1: greedy answers to all problems, graded. The verdict of a failed call is None."""
    requests = [
        Request(prompts.solve_messages(p.question, config.prompts.folder), max_tokens=config.eval.max_tokens)
        for p in problems
    ]
    replies = sorted(student.generate(requests), key=lambda reply: reply.index)
    verdicts = grade(grader, [reply.text for reply in replies], problems)
    correct = [None if r.finish == "error" else v for r, v in zip(replies, verdicts, strict=True)]
    return FirstAnswers(problems, replies, [work_of(reply.text) for reply in replies], correct)


def grade(grader: Grader, texts: Sequence[str], problems: Sequence[Problem]) -> list[bool | None]:
    return grader.equal_many((answer_of(text), p.answer) for text, p in zip(texts, problems, strict=True))


def review_settings(config: Config, threshold: float) -> ReviewSettings:
    return ReviewSettings(threshold, config.review.rounds, config.eval.max_tokens, config.prompts.folder)


def fit_review(
    student: Student, problems: Sequence[Problem], config: Config, grader: Grader
) -> dict[str, Any]:
    """Fit the threshold on problems that are used nowhere else; see `metrics.fit_threshold`.

    With many problems, every other one is used first, and the rest only if a correction fixed any of those.
    """
    trials = Trials(student, config, grader)
    many = len(problems) >= MANY_TO_FIT
    trials.add(problems[::2] if many else problems)
    found = trials.fit()
    if many and trials.any_fixed:
        trials.add(problems[1::2])
        found = trials.fit()
    return found


class Trials:
    """A student's first answers to fitting problems, their step scores, and the results of correcting some steps."""

    def __init__(self, student: Student, config: Config, grader: Grader):
        self.student, self.config, self.grader = student, config, grader
        self.problems: list[Problem] = []
        self.traces: list[Trace] = []
        self.correct: list[bool | None] = []
        self.scores: list[Sequence[float]] = []
        self.results: dict[tuple[int, int], bool | None] = {}

    def add(self, problems: Sequence[Problem]) -> None:
        """Have the student solve more problems and score its steps."""
        first = solve(self.student, problems, self.config, self.grader)
        questions = [problem.question for problem in problems]
        self.scores += score_traces(self.student, questions, first.traces, self.config.prompts.folder)
        self.problems += first.problems
        self.traces += first.traces
        self.correct += first.correct

    @property
    def any_fixed(self) -> bool:
        """Whether a correction has made a wrong answer right."""
        return any(result and self.correct[i] is False for (i, _), result in self.results.items())

    def fit(self) -> dict[str, Any]:
        """Fit the threshold on all problems so far.

        Only steps that score above all earlier ones can be accused, so only those are corrected. Problems are processed in
        blocks, highest scores first, until twice as many answers as allowed are spoiled, two consecutive blocks with
        wrong answers fix none, or `FIT_SHARE` is reached. Untried corrections count as the worse outcome.
        """
        scores, harm = self.scores, self.config.review.max_harm
        ranked = sorted((i for i, s in enumerate(scores) if s), key=lambda i: -max(scores[i]))
        most, size = round(FIT_SHARE * len(ranked)), max(1, round(FIT_BLOCK * len(ranked)))
        futile_blocks, seen = 0, set()
        for end in range(size, most + size, size):
            chosen = ranked[: min(end, most)]
            floor = max(scores[chosen[-1]])
            steps = {i: _accusable_steps(scores[i], floor) for i in sorted(chosen)}
            newest = {(i, step) for i in steps for step in steps[i]} - seen
            self._correct(sorted(newest))
            seen |= newest
            spoiled = [i for i in chosen if self.correct[i] and not self.results[i, steps[i][0]]]
            wrong = [place for place in newest if self.correct[place[0]] is False]
            fixed = any(self.results[place] for place in wrong)
            futile_blocks = 0 if fixed else futile_blocks + bool(wrong)
            if len(spoiled) > 2 * harm * len(scores) or futile_blocks == 2:
                break
        rows = [
            Scored(
                id=problem.id,
                correct1=self.correct[i],
                step_scores=scores[i],
                corrected=tuple(self.results.get((i, step)) for step in range(1, len(scores[i]) + 1)),
            )
            for i, problem in enumerate(self.problems)
        ]
        return fit_threshold(rows, harm)

    def _correct(self, places: Sequence[tuple[int, int]]) -> None:
        """Have the student correct these (problem, step) places, except those already tried."""
        new = [place for place in places if place not in self.results]
        cases = [(self.problems[i].question, self.traces[i], step) for i, step in new]
        corrected = correct_steps(self.student, cases, review_settings(self.config, 0.0))
        verdicts = grade(self.grader, [c.text for c in corrected], [self.problems[i] for i, _ in new])
        for (i, step), outcome, verdict in zip(new, corrected, verdicts, strict=True):
            self.results[i, step] = verdict if outcome.changed else self.correct[i]


def _accusable_steps(scores: Sequence[float], floor: float) -> list[int]:
    """The steps (from 1) that some threshold >= `floor` accuses: those that score above all earlier ones."""
    before = accumulate(scores, max, initial=-math.inf)
    steps = enumerate(zip(scores, before, strict=False), 1)
    return [step for step, (score, highest) in steps if score >= floor and score > highest]


def review_answers(
    student: Student,
    first: FirstAnswers,
    config: Config,
    grader: Grader,
    threshold: float,
    judge: Judge | None = None,
    mode: str = "guided",
) -> tuple[list[Outcome], list[Reviewed]]:
    """Turn 2: review each first answer and grade the result."""
    questions, texts = [p.question for p in first.problems], [reply.text for reply in first.replies]
    settings = review_settings(config, threshold)
    reviewed = (review_guided if mode == "guided" else review_free)(student, questions, texts, settings)
    second = grade(grader, [r.text for r in reviewed], first.problems)
    rows = []
    columns = first.problems, first.replies, first.traces, first.correct, reviewed, second
    for problem, reply, trace, correct, review, verdict in zip(*columns, strict=True):
        known = judge is not None and bool(trace.steps)
        true_step = judge(problem.question, trace) if known else None
        labelled = range(1, (true_step or len(trace.steps)) + 1) if known else ()
        rows.append(
            Outcome(
                id=problem.id,
                question=problem.question,
                gold=problem.answer,
                first=reply.text,
                second=review.text if review.changed else None,
                correct1=correct,
                correct2=verdict if review.changed else correct,
                accused=review.accused,
                true_step=true_step,
                true_known=known,
                step_scores=tuple(round(score, 4) for score in review.scores),
                step_labels=tuple(step == true_step for step in labelled),
                format_ok=not parse(reply.text).issues,
                cut=reply.finish == "length",
                tokens1=reply.tokens,
                tokens2=review.tokens,
                note=review.note,
            )
        )
    return rows, reviewed


def located_correction_rate(
    student: Student, rows: Sequence[Outcome], problems: Sequence[Problem], config: Config, grader: Grader
) -> float | None:
    """The share of wrong answers that are corrected if the true first wrong step is given; None if none is known."""
    cases = [
        (o, p) for o, p in zip(rows, problems, strict=True) if o.true_step is not None and o.correct1 is False
    ]
    if not cases:
        return None
    steps = [(o.question, work_of(o.first), o.true_step) for o, _ in cases]
    corrected = correct_steps(student, steps, review_settings(config, 0.0))
    verdicts = grade(grader, [c.text for c in corrected], [p for _, p in cases])
    known = [bool(v) and c.changed for v, c in zip(verdicts, corrected, strict=True) if v is not None]
    return round(sum(known) / len(known), 4) if known else None


def evaluate_model(
    config: Config,
    run: Run,
    name: str,
    student: Student,
    *,
    problems: Sequence[Problem],
    fitting: Sequence[Problem],
    grader: Grader,
    judge: Judge | None = None,
    identity: str = "",
    folder: str,
) -> dict[str, Any]:
    """Evaluate one student with and without review; writes <name>.jsonl and <name>.json into `folder` of the run.

    `fitting` are the problems for the threshold, unless `review.threshold` is set. `identity` is the digest of the
    student's file. Returns the stored figures if nothing has changed.
    """
    signature = digest(
        [identity, config.eval.model_dump(), config.review.model_dump(), [p.model_dump() for p in problems], [p.model_dump() for p in fitting],
         prompts.digest("student_system", "student_solve", "student_review", folder=config.prompts.folder)]
    )  # fmt: skip
    kept = run.read_json(f"{folder}/{name}.json", dict[str, Any])
    if kept is not None and kept.get("signature") == signature:
        return kept
    began = time.monotonic()
    first = solve(student, problems, config, grader)
    between = time.monotonic()
    threshold, fitted = config.review.threshold, None
    reviewable = any(trace.steps for trace in first.traces)
    if threshold is None and config.review.mode == "guided":
        threshold = NEVER
        if reviewable:
            fitted = fit_review(student, fitting, config, grader)
            threshold = fitted["threshold"]
    reviewing = time.monotonic()
    rows, reviewed = review_answers(
        student, first, config, grader, threshold or 0.0, judge, config.review.mode
    )
    ended = time.monotonic()
    figures = summarize(rows, seed=config.seed)
    figures |= {
        "signature": signature,
        "gguf": identity,
        "threshold": threshold,
        "fitted": fitted,
        "off": _why_off(config, threshold, fitted, reviewable),
        "correction_rate_given_location": located_correction_rate(student, rows, problems, config, grader),
        "tokens_first": sum(o.tokens1 for o in rows) / max(1, len(rows)),
        "seconds": round((between - began + ended - reviewing) / max(1, len(rows)), 4),
        "seconds_first": round((between - began) / max(1, len(rows)), 4),
    }
    run.replace(f"{folder}/{name}.jsonl", rows)
    run.write_json(
        f"{folder}/{name}.reviews.json",
        [
            {**o.model_dump(), "cause": r.cause, "correction": r.correction}
            for o, r in zip(rows, reviewed, strict=True)
            if r.accused
        ],
    )
    run.write_json(f"{folder}/{name}.json", figures)
    return figures


def _why_off(config: Config, threshold: float | None, fitted: dict[str, Any] | None, reviewable: bool) -> str:
    """Why review cannot have corrected any answer, or an empty string."""
    if not reviewable:
        return "its answers have no steps"
    if config.review.mode == "guided" and config.review.rounds == 0:
        return "review.rounds is 0"
    if fitted is None or threshold is None or threshold < NEVER:
        return ""
    if fitted["n"] == 0:
        return "none of the fitting problems has a known outcome"
    harm = f"at most {100 * config.review.max_harm:g} % may be spoiled (review.max_harm)"
    return f"on {fitted['n']} fitting problems no threshold corrects more answers than it spoils; {harm}"


def choose_example(examples: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The shortest corrected answer, preferably with a first answer and with its true wrong step accused."""
    corrected = [e for e in examples if e["correct1"] is False and e["correct2"] is True]
    answered = [e for e in corrected if parse(e["first"]).trace.answer] or corrected
    located = [e for e in answered if e["accused"] == e["true_step"]] or answered
    return min(located, key=lambda e: len(e["question"]) + len(e["correction"] or ""), default=None)
