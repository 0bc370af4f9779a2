"""Preference pairs from reviews: a decision pair for every step up to the first wrong one, a content pair for that one.

The student's own corrections are sampled here: a wrong one is rejected, and a right one, if any, is chosen over the
teacher's (self-written text is worth more). The run's adapter after the warm-up, or a GGUF, writes them guided, from
`<Cause>` at the step that the teacher flags. An endpoint writes a free review of the whole attempt, which is used if it
flags the same step and keeps those before it. Without a student there are decision pairs only.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from sclite import prompts
from sclite.config import Config
from sclite.data.attempts import endpoint_cost_usd, external_student_digest
from sclite.data.imported import reject_row
from sclite.grading.grader import Grader
from sclite.progress import Progress, no_progress
from sclite.records import Attempt, Drop, Pair, Problem, Review
from sclite.run import Report, Run, timed
from sclite.signature import digest, with_unanswered
from sclite.student.adapters import adapter_weights
from sclite.student.base import Student
from sclite.student.self_correction import (
    NO_REPLY,
    Reviewed,
    ReviewSettings,
    correct_steps,
    free,
    run_together,
)
from sclite.trace import CAUSE, Trace, close_piece, open_piece, render, step_pieces

Own = tuple[str, bool | None]
"""A student's own cause and correction, as a continuation of `<Cause>`, and whether it leads to the gold answer."""
_CONTENT = re.compile(r".+</Cause>\n<Correction>.+</Correction>\n", re.DOTALL)
_UNREADABLE, _UNANSWERED = "student_review_not_readable", "student_did_not_reply"


@dataclass(frozen=True)
class Case:
    """A wrong attempt: its work, the step that the teacher flags, and the student's own corrections."""

    review: Review
    step: int
    work: Trace
    problem: Problem
    own: list[Own] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)  # why other reviews by the student are unusable


def pairs_inputs(config: Config, run: Run) -> dict[str, object]:
    """The inputs that decide the pairs."""
    settings, used = config.attempts, ("student_system", "student_solve", "student_review")
    sampling = [settings.reviews, settings.temperature, settings.max_tokens, config.seed]
    return {
        "reviews": run.file_digest("reviews.jsonl"),
        "student": external_student_digest(config) or run.file_digest(adapter_weights("warmup")),
        "sampling": digest(sampling),
        "prompts": prompts.digest_prompts(*used, folder=config.prompts.folder),
    }


def write_pairs(
    config: Config, run: Run, *, student: Student | None, grader: Grader, progress: Progress = no_progress
) -> Report:
    """Sample the student's corrections of its wrong attempts; writes pairs.jsonl, without a student decisions only."""
    if run.is_imported("pairs", "pairs.jsonl"):
        return _validate_imported(run)
    inputs, report = pairs_inputs(config, run), Report("pairs")
    if manifest := run.done("pairs", inputs, "pairs.jsonl"):
        return Report.of(manifest)
    with timed(report):
        reviews = run.require("reviews.jsonl", Review, "run `sclite build-data --only corrections` first")
        attempts = {(a.id, a.sample): a for a in run.read("attempts.jsonl", Attempt)}
        problems = {p.id: p for p in run.read("problems.jsonl", Problem)}
        judged = [(review, attempts[review.id, review.sample].parsed.work) for review in reviews]
        cases = [Case(r, r.step, work, problems[r.id]) for r, work in judged if r.step is not None]
        if student is None:
            for case in cases:
                case.reasons.append("no_student_review")
        else:
            _sample_own(config, student, cases, grader, progress)
        own = {(case.review.id, case.review.sample): (case.own, case.reasons) for case in cases}
        made = [make_pairs(r, work, *own.get((r.id, r.sample), ([], []))) for r, work in judged]
        pairs = [pair for found, _ in made for pair in found]
        drops = [drop for _, drop in made if drop is not None]
        run.mark_started("pairs")
        run.replace("pairs.jsonl", pairs)
        run.replace_drops("pairs", drops)
    report.counts |= Counter(pair.kind for pair in pairs)
    report.counts["own_corrections_chosen"] = sum(pair.origin == "student" for pair in pairs)
    report.dropped = dict(Counter(drop.reason for drop in drops))
    unanswered = 0
    if config.attempts.kind == "endpoint":
        reasons = Counter(reason for case in cases for reason in case.reasons)
        report.figures["own_reviews"], unanswered = dict(reasons), reasons[_UNANSWERED]
        report.cost_usd = endpoint_cost_usd(run, "pairs")
    run.sign("pairs", with_unanswered(inputs, unanswered), report, {"pairs.jsonl": len(pairs)})
    return report


def _validate_imported(run: Run) -> Report:
    """The report of an imported pairs.jsonl, each row checked: it must be one that training can use."""
    known = {problem.id for problem in run.read("problems.jsonl", Problem)}
    pairs = run.read("pairs.jsonl", Pair)
    contents = {(pair.id, pair.sample): pair for pair in reversed(pairs) if pair.kind == "content"}
    decided = {(pair.id, pair.sample) for pair in pairs if pair.kind == "decision"}
    for number, pair in enumerate(pairs, 1):
        work, step, content = pair.work, pair.step, pair.kind == "content"
        first, why = contents.get((pair.id, pair.sample), pair), ""
        if pair.id not in known:
            why = "no problem has this id"
        elif not 1 <= step <= len(work.steps):
            why = f"step is {step}, but the attempt has {len(work.steps)} steps"
        elif pair.prefix != (*_prefix(work, step), *([CAUSE] if content else [])):
            why = f"prefix is not the attempt up to step {step}, in pieces"
        elif (pair.id, pair.sample) not in decided:
            why = "its attempt has no decision pair"
        elif not content and {pair.chosen, pair.rejected} != {CAUSE, close_piece(step)}:
            why = f"chosen and rejected must be {CAUSE} and the step's closing tag"
        elif not content and step > first.step:
            why = f"step is {step}, after its attempt's content pair at step {first.step}"
        elif pair.chosen == pair.rejected:
            why = "chosen and rejected are identical"
        elif content and not _CONTENT.fullmatch(pair.chosen):
            why = "chosen must be a cause, </Cause>, <Correction>, a correction, </Correction> and a newline"
        if why:
            reject_row(run, "pairs.jsonl", number, pair, why, "fix or remove it")
    counts = Counter(str(pair.kind) for pair in pairs) | Counter(imported=len(pairs))
    return Report("pairs", dict(counts), skipped=True)


def _sample_own(
    config: Config, student: Student, cases: Sequence[Case], grader: Grader, progress: Progress
) -> None:
    """Add `attempts.reviews` of the student's own corrections to each case."""
    settings, whole = config.attempts, config.attempts.kind == "endpoint"
    if whole:  # the seed depends only on the round, so that other rows do not change it
        asked, size = [*cases] * settings.reviews, len(cases)
    else:
        asked, size = [case for case in cases for _ in range(settings.reviews)], config.student.batch
    for start in range(0, len(asked), size or 1):
        block = asked[start : start + size]

        def show(done: int, _: int, before: int = start) -> None:
            progress(before + done, len(asked))

        review = ReviewSettings(
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            prompt_folder=config.prompts.folder,
            seed=config.seed + (start // size if whole else start),
        )
        if whole:
            scripts = [free(case.problem.question, case.work, review) for case in block]
            written = run_together(student, scripts, show)
        else:
            mistakes = [(case.problem.question, case.work, case.step) for case in block]
            written = correct_steps(student, mistakes, review)
            show(len(block), 0)
        verdicts = grader.equal_many(
            (None if result.correction is None else (result.trace or case.work).answer, case.problem.answer)
            for case, result in zip(block, written, strict=True)
        )
        for case, result, right in zip(block, written, verdicts, strict=True):
            before = [step.text.split() for step in (result.trace or case.work).steps[: case.step - 1]]
            kept = before == [step.text.split() for step in case.work.steps[: case.step - 1]]
            if result.accused is None and result.note:
                case.reasons.append(_UNANSWERED if result.note == NO_REPLY else _UNREADABLE)
            elif result.accused != case.step or not kept:
                case.reasons.append("student_review_accuses_another_step")
            elif not result.cause or not result.correction:
                case.reasons.append(_UNREADABLE)
            else:
                case.own.append((continuation(result), right))


def continuation(reviewed: Reviewed | Review) -> str:
    """The text after `<Cause>`: cause and correction, with the newline before the step's closing tag."""
    return f"{reviewed.cause}</Cause>\n<Correction>{reviewed.correction}</Correction>\n"


def make_pairs(
    review: Review, work: Trace, own: Sequence[Own] = (), reasons: Sequence[str] = ()
) -> tuple[list[Pair], Drop | None]:
    """The pairs of a review: a decision per judged step, which flags the wrong one and closes the right ones, and a content.

    The content compares the chosen cause and correction with a wrong one by the student; a drop says why there is none.
    """
    of = {"id": review.id, "sample": review.sample, "attempt": render(work)}
    pairs = [
        Pair(
            **of,
            step=step,
            kind="decision",
            prefix=_prefix(work, step),
            chosen=CAUSE if step == review.step else close_piece(step),
            rejected=close_piece(step) if step == review.step else CAUSE,
        )
        for step in range(1, (review.step or len(work.steps)) + 1)
    ]
    if review.step is None:
        return pairs, None
    right = [text for text, correct in own if correct is True]
    wrong = [text for text, correct in own if correct is False]
    chosen = right[0] if right else continuation(review)
    if wrong and wrong[0] != chosen:
        content = Pair(
            **of,
            step=review.step,
            kind="content",
            prefix=(*_prefix(work, review.step), CAUSE),
            chosen=chosen,
            rejected=wrong[0],
            origin="student" if right else "teacher",
        )
        return [*pairs, content], None
    reason = Counter(reasons or [_UNREADABLE]).most_common(1)[0][0]
    if own:  # none of them could be graded
        reason = "grader_unknown"
    reason = "chosen_equals_rejected" if wrong else "student_review_already_right" if right else reason
    raw = own[0][0] if own else ""
    return pairs, Drop(stage="pairs", id=review.id, sample=review.sample, reason=reason, raw=raw)


def _prefix(work: Trace, step: int) -> tuple[str, ...]:
    return (*step_pieces(work.steps[: step - 1]), open_piece(step, work.steps[step - 1]))
