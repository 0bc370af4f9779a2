"""Preference pairs from reviews: decisions for every step up to the first wrong one, and contents for that one.

The student's own corrections are sampled here, from the warmed-up adapter: its wrong ones are what is rejected, and a
right one, where it has any, is chosen before the teacher's (METHOD section 4: self-written text is worth more).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from sclite import prompts
from sclite.answers import answer_of
from sclite.config import Config
from sclite.data.brought import refuse
from sclite.grader import Grader
from sclite.records import Attempt, Drop, Pair, Problem, Review
from sclite.run import Report, Run, digest, timed
from sclite.student.base import Student
from sclite.student.review import Reviewed, Settings, mend
from sclite.trace import CAUSE, Trace, close_piece, open_piece, parse, render, step_pieces

STAGE, FILE = "pairs", "pairs.jsonl"


def inputs_of(config: Config, run: Run) -> dict[str, Any]:
    """What decides the pairs."""
    return {
        "reviews": run.file_digest("reviews.jsonl"),
        "warm": run.file_digest("dpo/warm/adapter_model.safetensors"),
        "sampling": digest(
            [config.attempts.reviews, config.attempts.temperature, config.student.batch, config.seed]
        ),
        "prompts": prompts.digest(
            "student_system", "student_solve", "student_review", folder=config.prompts.folder
        ),
    }


def build_pairs(
    config: Config,
    run: Run,
    *,
    student: Student,
    grader: Grader,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Sample the student's own corrections of its wrong attempts and write pairs.jsonl.

    A pairs.jsonl that no such stage wrote takes its place, once each row fits the attempt that it holds.
    """
    if run.brought_along(STAGE, FILE):
        return _adopt(run)
    inputs, report = inputs_of(config, run), Report(STAGE)
    if manifest := run.done(STAGE, inputs, FILE):
        return Report.of(manifest)
    with timed(report):
        reviews = run.require("reviews.jsonl", Review, "run `sclite build-data --only corrections` first")
        attempts = {(a.id, a.sample): a for a in run.read("attempts.jsonl", Attempt)}
        problems = {p.id: p for p in run.read("problems.jsonl", Problem)}
        wrong = [review for review in reviews if review.step is not None]
        own = own_corrections(config, student, wrong, attempts, problems, grader, progress)
        pairs, drops = [], []
        for review in reviews:
            work = parse(attempts[review.id, review.sample].trace).trace
            pairs += decision_pairs(review, work)
            if review.step is not None:
                made = content_pair(review, work, own.get((review.id, review.sample), []))
                (drops if isinstance(made, Drop) else pairs).append(made)
        run.begin(STAGE)
        run.replace(FILE, pairs)
        run.replace_drops({STAGE}, drops)
    report.counts |= Counter(f"{pair.kind}" for pair in pairs)
    report.counts["own_corrections_chosen"] = sum(pair.origin == "student" for pair in pairs)
    report.dropped = dict(Counter(drop.reason for drop in drops))
    run.sign(STAGE, inputs, report)
    return report


def _adopt(run: Run) -> Report:
    """The report of a pairs.jsonl that was put into the run, each row checked."""
    known = {problem.id for problem in run.read("problems.jsonl", Problem)}
    pairs, contents = run.read(FILE, Pair), set()
    for number, pair in enumerate(pairs, 1):
        if pair.id not in known:
            refuse(run, FILE, number, pair, "no problem has this id", "use the ids of problems.jsonl")
        if flaw := pair_flaw(pair):
            refuse(run, FILE, number, pair, flaw)
        if pair.kind == "content":
            if (pair.id, pair.sample) in contents:
                refuse(run, FILE, number, pair, f"a second content for sample {pair.sample}")
            contents.add((pair.id, pair.sample))
    decided = {(pair.id, pair.sample) for pair in pairs if pair.kind == "decision"}
    for number, pair in enumerate(pairs, 1):
        if (pair.id, pair.sample) not in decided:
            refuse(run, FILE, number, pair, "its attempt has no decision", "add a decision at its step")
    counts = Counter(pair.kind for pair in pairs)
    return Report(STAGE, {**counts, "brought_along": len(pairs)}, skipped=True)


def pair_flaw(pair: Pair) -> str | None:
    """Why a pair cannot be trained on: its prefix is not its attempt up to its step, or a side is not of its kind."""
    work = parse(pair.attempt).trace
    if not 1 <= pair.step <= len(work.steps):
        return f"step {pair.step} is not among the attempt's {len(work.steps)}"
    content = pair.kind == "content"
    if pair.prefix != (*_prefix(work, pair.step), *([CAUSE] if content else [])):
        return f"prefix is not the attempt up to step {pair.step}, in pieces"
    if not content:
        sides = {CAUSE, close_piece(pair.step)}
        return (
            None
            if {pair.chosen, pair.rejected} == sides
            else f"its sides are not {CAUSE} and the step's closer"
        )
    if pair.chosen == pair.rejected:
        return "both sides are alike"
    written = parse("".join(pair.prefix) + pair.chosen + close_piece(pair.step)).trace.steps[pair.step - 1]
    if not (written.cause and written.correction and pair.chosen.endswith("</Correction>\n")):
        return "chosen is not a cause, </Cause>, <Correction> and its closer on a line that ends"
    return None


Own = tuple[str, bool | None]
"""A student's own cause and correction, as it continues `<Cause>`, and whether it leads to the gold answer."""


def own_corrections(
    config: Config,
    student: Student,
    reviews: Sequence[Review],
    attempts,
    problems,
    grader: Grader,
    progress=None,
) -> dict[tuple[str, int], list[Own]]:
    """`attempts.reviews` corrections of each wrong step by the student itself, each followed to its answer."""
    settings = Settings(
        max_tokens=config.attempts.max_tokens,
        temperature=config.attempts.temperature,
        prompt_folder=config.prompts.folder,
        seed=config.seed,
    )
    cases = [(review, sample) for review in reviews for sample in range(config.attempts.reviews)]
    found: dict[tuple[str, int], list[Own]] = {}
    size = max(config.student.batch, 1)
    for start in range(0, len(cases), size):
        block = cases[start : start + size]
        asked = [
            (problems[r.id].question, parse(attempts[r.id, r.sample].trace).trace, r.step) for r, _ in block
        ]
        mended = mend(student, asked, replace(settings, seed=config.seed + start))
        verdicts = grader.equal_many(
            (answer_of(m.text) if m.accused is not None else None, problems[r.id].answer)
            for m, (r, _) in zip(mended, block, strict=True)
        )
        for (review, _), outcome, right in zip(block, mended, verdicts, strict=True):
            if outcome.accused is not None:
                found.setdefault((review.id, review.sample), []).append((continuation(outcome), right))
        if progress is not None:
            progress(min(start + size, len(cases)), len(cases))
    return found


def continuation(reviewed: Reviewed | Review) -> str:
    """Cause and correction as they stand after `<Cause>`, up to and with the newline before the step's closer."""
    return f"{reviewed.cause}</Cause>\n<Correction>{reviewed.correction}</Correction>\n"


def decision_pairs(review: Review, work: Trace) -> list[Pair]:
    """One pair for each step that the review passes judgement on: accuse the wrong one, close the right ones."""
    last = review.step or len(work.steps)
    return [
        Pair(
            id=review.id,
            sample=review.sample,
            step=step,
            kind="decision",
            attempt=render(work),
            prefix=_prefix(work, step),
            chosen=CAUSE if step == review.step else close_piece(step),
            rejected=close_piece(step) if step == review.step else CAUSE,
        )
        for step in range(1, last + 1)
    ]


def _prefix(work: Trace, step: int) -> tuple[str, ...]:
    return (*step_pieces(work.steps[: step - 1]), open_piece(step, work.steps[step - 1]))


def content_pair(review: Review, work: Trace, own: Sequence[Own]) -> Pair | Drop:
    """The chosen cause and correction against a wrong one of the student's own; a drop where it has none."""
    right = [text for text, correct in own if correct is True]
    wrong = [text for text, correct in own if correct is False]
    reason = None
    if not wrong:
        reason = "student_review_already_right" if right else "student_review_not_readable"
    elif wrong[0] == (chosen := right[0] if right else continuation(review)):
        reason = "both_sides_alike"
    if reason:
        raw = own[0][0] if own else ""
        return Drop(stage=STAGE, id=review.id, sample=review.sample, reason=reason, raw=raw)
    return Pair(
        id=review.id,
        sample=review.sample,
        step=review.step,
        kind="content",
        attempt=render(work),
        prefix=(*_prefix(work, review.step), CAUSE),
        chosen=chosen,
        rejected=wrong[0],
        origin="student" if right else "teacher",
    )
