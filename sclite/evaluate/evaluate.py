"""Evaluation: a student solves held-out problems, reviews its own work, and is measured (METHOD section 6).

The threshold of the guided review is fitted first, on problems used nowhere else, with the very student that is
measured. A gold answer is used for grading alone, never to decide when to stop.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sclite import prompts
from sclite.config import Config
from sclite.evaluate.metrics import Outcome, Scored, fit_threshold, summarise
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
"""Tells the first wrong step (from 1; None: all are right) of a trace for a question, where somebody can know it."""

FIT_SHARE, FIT_BLOCK = 0.6, 0.1
"""Shares of the fitting problems: of those whose steps are tried at all, and of those that are tried at once."""
MANY_TO_FIT = 200
"""So many fitting problems that half of them show whether a student's corrections mend anything."""


@dataclass(frozen=True)
class First:
    """A student's first answers to some problems: texts, traces, verdicts, tokens."""

    problems: Sequence[Problem]
    replies: list[Reply]
    traces: list[Trace]
    correct: list[bool | None]


def solve(student: Student, problems: Sequence[Problem], config: Config, grader: Grader) -> First:
    """Turn 1: greedy answers to all problems, graded. A failed call leaves the verdict unknown."""
    requests = [
        Request(prompts.solve_messages(p.question, config.prompts.folder), max_tokens=config.eval.max_tokens)
        for p in problems
    ]
    replies = sorted(student.generate(requests), key=lambda reply: reply.index)
    verdicts = grade(grader, [reply.text for reply in replies], problems)
    correct = [None if r.finish == "error" else v for r, v in zip(replies, verdicts, strict=True)]
    return First(problems, replies, [work_of(reply.text) for reply in replies], correct)


def grade(grader: Grader, texts: Sequence[str], problems: Sequence[Problem]) -> list[bool | None]:
    return grader.equal_many((answer_of(text), p.answer) for text, p in zip(texts, problems, strict=True))


def review_settings(config: Config, threshold: float) -> ReviewSettings:
    return ReviewSettings(threshold, config.review.rounds, config.eval.max_tokens, config.prompts.folder)


def fit(student: Student, problems: Sequence[Problem], config: Config, grader: Grader) -> dict[str, Any]:
    """Fit the threshold on problems that are used nowhere else; see `metrics.fit_threshold`.

    Where they are many, every other one comes first, and the rest only where the student's corrections mend something in
    those.
    """
    trials = Trials(student, config, grader)
    many = len(problems) >= MANY_TO_FIT
    trials.add(problems[::2] if many else problems)
    found = trials.fit()
    if many and trials.mended:
        trials.add(problems[1::2])
        found = trials.fit()
    return found


class Trials:
    """A student's first answers to fitting problems, the scores of their steps, and what correcting some of them gave."""

    def __init__(self, student: Student, config: Config, grader: Grader):
        self.student, self.config, self.grader = student, config, grader
        self.problems: list[Problem] = []
        self.traces: list[Trace] = []
        self.correct: list[bool | None] = []
        self.scores: list[Sequence[float]] = []
        self.results: dict[tuple[int, int], bool | None] = {}

    def add(self, problems: Sequence[Problem]) -> None:
        """Let the student solve further problems and score its steps."""
        first = solve(self.student, problems, self.config, self.grader)
        questions = [problem.question for problem in problems]
        self.scores += score_traces(self.student, questions, first.traces, self.config.prompts.folder)
        self.problems += first.problems
        self.traces += first.traces
        self.correct += first.correct

    @property
    def mended(self) -> bool:
        """Whether a correction has made a wrong answer right."""
        return any(result and self.correct[i] is False for (i, _), result in self.results.items())

    def fit(self) -> dict[str, Any]:
        """The threshold on all problems so far.

        Corrections are tried only where they could decide: at steps that score above all before them, in a block of
        problems after the other, those with the highest scores first, until accusing that far spoils twice as many
        answers as are allowed, two blocks with wrong answers in a row mend none, or `FIT_SHARE` is reached. Elsewhere the
        worse is assumed.
        """
        scores, harm = self.scores, self.config.review.max_harm
        ranked = sorted((i for i, s in enumerate(scores) if s), key=lambda i: -max(scores[i]))
        most, size = round(FIT_SHARE * len(ranked)), max(1, round(FIT_BLOCK * len(ranked)))
        barren, seen = 0, set()
        for end in range(size, most + size, size):
            chosen = ranked[: min(end, most)]
            floor = max(scores[chosen[-1]])
            steps = {i: list(_could_be_accused(scores[i], floor)) for i in sorted(chosen)}
            newest = {(i, step) for i in steps for step in steps[i]} - seen
            self._try(sorted(newest))
            seen |= newest
            spoiled = [i for i in chosen if self.correct[i] and not self.results[i, steps[i][0]]]
            wrong = [place for place in newest if self.correct[place[0]] is False]
            mends = any(self.results[place] for place in wrong)
            barren = 0 if mends else barren + bool(wrong)
            if len(spoiled) > 2 * harm * len(scores) or barren == 2:
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

    def _try(self, places: Sequence[tuple[int, int]]) -> None:
        """Correct these steps, (problem, step), as far as that was not done before."""
        new = [place for place in places if place not in self.results]
        cases = [(self.problems[i].question, self.traces[i], step) for i, step in new]
        mended = correct_steps(self.student, cases, review_settings(self.config, 0.0))
        verdicts = grade(self.grader, [m.text for m in mended], [self.problems[i] for i, _ in new])
        for (i, step), outcome, verdict in zip(new, mended, verdicts, strict=True):
            self.results[i, step] = verdict if outcome.changed else self.correct[i]


def _could_be_accused(scores: Sequence[float], floor: float) -> Iterator[int]:
    """The steps (from 1) that some threshold of at least `floor` accuses: those that score above all before them."""
    highest = -math.inf
    for step, score in enumerate(scores, 1):
        if score >= floor and score > highest:
            yield step
        highest = max(highest, score)


def outcomes(
    student: Student,
    first: First,
    config: Config,
    grader: Grader,
    threshold: float,
    judge: Judge | None = None,
    mode: str = "guided",
) -> tuple[list[Outcome], list[Reviewed]]:
    """Turn 2: review each first answer and grade what comes of it."""
    questions, texts = [p.question for p in first.problems], [reply.text for reply in first.replies]
    settings = review_settings(config, threshold)
    reviewed = (review_guided if mode == "guided" else review_free)(student, questions, texts, settings)
    second = grade(grader, [r.text for r in reviewed], first.problems)
    rows = [
        _outcome(first, i, review, verdict, judge)
        for i, (review, verdict) in enumerate(zip(reviewed, second, strict=True))
    ]
    return rows, reviewed


def _outcome(first: First, i: int, review: Reviewed, verdict: bool | None, judge: Judge | None) -> Outcome:
    problem, reply, trace = first.problems[i], first.replies[i], first.traces[i]
    truth = judge(problem.question, trace) if judge is not None and trace.steps else None
    known = judge is not None and bool(trace.steps)
    labels = tuple(step == truth for step in range(1, (truth or len(trace.steps)) + 1)) if known else ()
    mended = review.changed
    return Outcome(
        id=problem.id,
        question=problem.question,
        gold=problem.answer,
        first=reply.text,
        second=review.text if mended else None,
        correct1=first.correct[i],
        correct2=verdict if mended else first.correct[i],
        accused=review.accused,
        true_step=truth,
        true_known=known,
        step_scores=tuple(round(score, 4) for score in review.scores),
        step_labels=labels,
        format_ok=not parse(reply.text).issues,
        cut=reply.finish == "length",
        tokens1=reply.tokens,
        tokens2=review.tokens,
        note=review.note,
    )


def located_correction_rate(
    student: Student, rows: Sequence[Outcome], problems: Sequence[Problem], config: Config, grader: Grader
) -> float | None:
    """How often a wrong answer is mended when the true first wrong step is given; None where none is known."""
    cases = [
        (o, p) for o, p in zip(rows, problems, strict=True) if o.true_step is not None and o.correct1 is False
    ]
    if not cases:
        return None
    asked = [(o.question, work_of(o.first), o.true_step) for o, _ in cases]
    mended = correct_steps(student, asked, review_settings(config, 0.0))
    verdicts = grade(grader, [m.text for m in mended], [p for _, p in cases])
    known = [bool(v) and m.changed for v, m in zip(verdicts, mended, strict=True) if v is not None]
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
    """All figures of one student: one pass, and reviewed. Writes <name>.jsonl and <name>.json into `folder` of the run.

    `fitting` are the problems for the threshold, unless `review.threshold` is set. `identity` is the digest of the
    student's file; where nothing has changed the figures kept in the run are returned.
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
            fitted = fit(student, fitting, config, grader)
            threshold = fitted["threshold"]
    reviewing = time.monotonic()
    rows, reviewed = outcomes(student, first, config, grader, threshold or 0.0, judge, config.review.mode)
    ended = time.monotonic()
    figures = summarise(rows, seed=config.seed)
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
        [_shown(o, r) for o, r in zip(rows, reviewed, strict=True) if r.accused],
    )
    run.write_json(f"{folder}/{name}.json", figures)
    return figures


def _why_off(config: Config, threshold: float | None, fitted: dict[str, Any] | None, reviewable: bool) -> str:
    """Why no answer can have been corrected; empty where one can."""
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


def _shown(outcome: Outcome, reviewed: Reviewed) -> dict[str, Any]:
    """An outcome with its cause and correction, for the terminal and the report."""
    return {**outcome.model_dump(), "cause": reviewed.cause, "correction": reviewed.correction}


def best_example(examples: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """One mended answer to show: with an answer before, located where that is known, and the shortest."""
    mended = [e for e in examples if e["correct1"] is False and e["correct2"] is True]
    answered = [e for e in mended if parse(e["first"]).trace.answer] or mended
    located = [e for e in answered if e["accused"] == e["true_step"]] or answered
    return min(located, key=lambda e: len(e["question"]) + len(e["correction"] or ""), default=None)
