"""Preference pairs from reviews: decisions for every step up to the first wrong one, and contents for that one.

The student's own corrections are sampled here: its wrong ones are what is rejected, and a right one, where it has any,
is chosen before the teacher's (METHOD section 4: self-written text is worth more). Who writes them, and how:

- the warmed-up adapter of the run, or the GGUF of `attempts.student`, the guided way: from `<Cause>` at the step that
  the teacher accuses;
- an endpoint, freely: it reviews its attempt as a whole. Its cause and correction are used where it accuses that very
  step and leaves those before it as they were; what else it does is counted by reason;
- nobody, where attempts were brought along and no student is at hand: then there are decisions alone.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from sclite import prompts
from sclite.config import Config
from sclite.data.attempts import cost_usd, other_student, warn
from sclite.data.imported import refuse
from sclite.grading.extract import answer_of
from sclite.grading.worker import Grader
from sclite.records import Attempt, Drop, Pair, Problem, Review
from sclite.run import Report, Run, timed
from sclite.signature import digest
from sclite.student.base import Student
from sclite.student.self_correction import NO_REPLY, Reviewed, ReviewSettings, correct_steps, review_free
from sclite.trace import CAUSE, Trace, close_piece, open_piece, parse, render, step_pieces, work_of

STAGE, FILE = "pairs", "pairs.jsonl"
UNREADABLE, UNANSWERED = "student_review_not_readable", "student_did_not_reply"


def inputs_of(config: Config, run: Run) -> dict[str, Any]:
    """What decides the pairs."""
    other = config.attempts.kind != "trained"
    student = {"student": digest([other_student(config), config.attempts.max_tokens])} if other else {}
    return student | {
        "reviews": run.file_digest("reviews.jsonl"),
        "warmup": "" if other else run.file_digest("warmup/adapter/adapter_model.safetensors"),
        "sampling": digest([config.attempts.reviews, config.attempts.temperature, config.seed]),
        "prompts": prompts.digest(
            "student_system", "student_solve", "student_review", folder=config.prompts.folder
        ),
    }


def build_pairs(
    config: Config,
    run: Run,
    *,
    student: Student | None,
    grader: Grader,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Sample the student's own corrections of its wrong attempts and write pairs.jsonl; without a student, decisions.

    A pairs.jsonl that no such stage wrote takes its place, once each row fits the attempt that it holds.
    """
    if run.is_imported(STAGE, FILE):
        return _adopt(run)
    inputs, report = inputs_of(config, run), Report(STAGE)
    if manifest := run.done(STAGE, inputs, FILE):
        return Report.of(manifest)
    with timed(report):
        reviews = run.require("reviews.jsonl", Review, "run `sclite build-data --only corrections` first")
        attempts = {(a.id, a.sample): a for a in run.read("attempts.jsonl", Attempt)}
        problems = {p.id: p for p in run.read("problems.jsonl", Problem)}
        wrong = [review for review in reviews if review.step is not None]
        own, reasons = _own(config, student, wrong, attempts, problems, grader, progress)
        pairs, drops = [], []
        for review in reviews:
            work = work_of(attempts[review.id, review.sample].trace)
            pairs += decision_pairs(review, work)
            if review.step is not None:
                key = review.id, review.sample
                made = content_pair(review, work, own.get(key, []), _telling(reasons.get(key, ())))
                (drops if isinstance(made, Drop) else pairs).append(made)
        run.mark_started(STAGE)
        run.replace(FILE, pairs)
        run.replace_drops({STAGE}, drops)
    report.counts |= Counter(f"{pair.kind}" for pair in pairs)
    report.counts["own_corrections_chosen"] = sum(pair.origin == "student" for pair in pairs)
    report.dropped = dict(Counter(drop.reason for drop in drops))
    warn(report, progress, _few_contents(report) if student is not None else "")
    if config.attempts.kind == "endpoint":
        report.figures["own_reviews"] = dict(Counter(reason for each in reasons.values() for reason in each))
        report.cost_usd = cost_usd(run, STAGE)
    unanswered = report.figures.get("own_reviews", {}).get(UNANSWERED, 0)
    # a network fault is no verdict on a row: the signature then fits no inputs, and the next call asks again
    run.sign(
        STAGE, {**inputs, "unanswered": unanswered} if unanswered else inputs, report, {FILE: len(pairs)}
    )
    return report


def _few_contents(report: Report) -> str:
    """A warning where most content pairs were dropped; else empty."""
    dropped = sum(report.dropped.values())
    contents = dropped + report.counts.get("content", 0)
    if 2 * dropped <= contents:
        return ""
    reason = max(report.dropped, key=report.dropped.__getitem__).replace("_", " ")
    remedy = "raise attempts.reviews, or look at them: sclite show drops --kind pairs"
    return f"{dropped} of {contents} content pairs were dropped, most often: {reason}; {remedy}"


def _own(config, student, wrong, attempts, problems, grader, progress):
    """The student's own corrections by attempt, and by attempt why others of them are none."""
    if student is None:
        return {}, {(review.id, review.sample): ["no_student_review"] for review in wrong}
    if config.attempts.kind == "endpoint":
        return free_corrections(config, student, wrong, attempts, problems, grader, progress)
    return own_corrections(config, student, wrong, attempts, problems, grader, progress), {}


def _telling(reasons: Sequence[str]) -> str:
    """The commonest reason, the first of equals."""
    return Counter(reasons).most_common(1)[0][0] if reasons else UNREADABLE


def _adopt(run: Run) -> Report:
    """The report of a pairs.jsonl that was put into the run, each row checked."""
    known = {problem.id for problem in run.read("problems.jsonl", Problem)}
    pairs, contents = run.read(FILE, Pair), set()
    for number, pair in enumerate(pairs, 1):
        if pair.id not in known:
            refuse(run, FILE, number, pair, "no problem has this id", "use the ids of problems.jsonl")
        if rejection := pair_rejection(pair):
            refuse(run, FILE, number, pair, rejection)
        if pair.kind == "content":
            if (pair.id, pair.sample) in contents:
                refuse(run, FILE, number, pair, f"a second content for sample {pair.sample}")
            contents.add((pair.id, pair.sample))
    decided = {(pair.id, pair.sample) for pair in pairs if pair.kind == "decision"}
    for number, pair in enumerate(pairs, 1):
        if (pair.id, pair.sample) not in decided:
            refuse(run, FILE, number, pair, "its attempt has no decision", "add a decision at its step")
    counts = Counter(pair.kind for pair in pairs)
    return Report(STAGE, {**counts, "imported": len(pairs)}, skipped=True)


def pair_rejection(pair: Pair) -> str | None:
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
    settings = _settings(config)
    cases = [(review, sample) for review in reviews for sample in range(config.attempts.reviews)]
    found: dict[tuple[str, int], list[Own]] = {}
    size = max(config.student.batch, 1)
    for start in range(0, len(cases), size):
        block = cases[start : start + size]
        asked = [(problems[r.id].question, work_of(attempts[r.id, r.sample].trace), r.step) for r, _ in block]
        mended = correct_steps(student, asked, replace(settings, seed=config.seed + start))
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


def _settings(config: Config) -> ReviewSettings:
    return ReviewSettings(
        max_tokens=config.attempts.max_tokens,
        temperature=config.attempts.temperature,
        prompt_folder=config.prompts.folder,
        seed=config.seed,
    )


def free_corrections(
    config: Config,
    student: Student,
    reviews: Sequence[Review],
    attempts,
    problems,
    grader: Grader,
    progress=None,
) -> tuple[dict[tuple[str, int], list[Own]], dict[tuple[str, int], list[str]]]:
    """`attempts.reviews` whole reviews of each wrong attempt by the student itself.

    Returns by attempt the corrections at the step that the teacher accuses, and for each other review its reason.
    """
    found: dict[tuple[str, int], list[Own]] = {}
    reasons: dict[tuple[str, int], list[str]] = {}
    works = [work_of(attempts[r.id, r.sample].trace) for r in reviews]
    questions, texts = [problems[r.id].question for r in reviews], [render(work) for work in works]
    total = len(reviews) * config.attempts.reviews
    for sample in range(config.attempts.reviews):

        def step_on(done: int, _: int, before: int = sample * len(reviews)) -> None:
            if progress is not None:
                progress(before + done, total)

        settings = replace(_settings(config), seed=config.seed + sample)
        written = review_free(student, questions, texts, settings, step_on)
        verdicts = grader.equal_many(
            (answer_of(own.text), problems[r.id].answer) for own, r in zip(written, reviews, strict=True)
        )
        for review, work, own, right in zip(reviews, works, written, verdicts, strict=True):
            reason, key = free_rejection(review, work, own), (review.id, review.sample)
            if reason is None:
                found.setdefault(key, []).append((continuation(own), right))
            else:
                reasons.setdefault(key, []).append(reason)
    return found, reasons


def free_rejection(review: Review, work: Trace, own: Reviewed) -> str | None:
    """Why a student's free review of `work` says nothing about the step that `review` accuses; None where it does."""
    if own.note:
        return UNANSWERED if own.note == NO_REPLY else UNREADABLE
    if own.accused is None:
        return "student_review_accuses_nothing"
    if own.accused != review.step:
        return "student_review_accuses_another_step"
    if not own.cause or not own.correction:
        return UNREADABLE
    before = parse(own.text).trace.steps[: review.step - 1]
    same = [step.text.split() for step in before] == [s.text.split() for s in work.steps[: review.step - 1]]
    return None if same else "student_review_changes_steps"


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


def content_pair(review: Review, work: Trace, own: Sequence[Own], nothing: str = UNREADABLE) -> Pair | Drop:
    """The chosen cause and correction against a wrong one of the student's own; a drop where it has none.

    `nothing` is the reason where it has written neither a right nor a wrong one.
    """
    right = [text for text, correct in own if correct is True]
    wrong = [text for text, correct in own if correct is False]
    reason = None
    if not wrong:
        reason = "student_review_already_right" if right else nothing
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
