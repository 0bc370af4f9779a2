"""The teacher's reviews of wrong attempts, checked, plus confirmations of right ones."""

import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from sclite import prompts
from sclite.config import Config
from sclite.data.attempts import deduplicate, find_fatal_issue
from sclite.data.imported import reject_row
from sclite.data.templates import LEAK, parse_reply
from sclite.errors import DataError
from sclite.grading.grader import Grader
from sclite.progress import Progress, no_progress
from sclite.records import Attempt, Drop, Problem, Review, from_feedback
from sclite.run import Report, Run, timed
from sclite.signature import with_unanswered
from sclite.teacher.client import (
    Job,
    Rejection,
    Teacher,
    basis_of,
    count_unanswered,
    identity,
    refuse_other_basis,
)
from sclite.trace import Step, Trace, first_corrected, render


def corrections_inputs(config: Config, run: Run) -> dict[str, object]:
    """The inputs that decide the teacher's reviews."""
    used = ["teacher_system", "teacher_correction"]
    used += ["inspector_correction"] if config.teacher.inspector else []
    return {
        "attempts": run.file_digest("attempts.jsonl"),
        "teacher": identity(config.teacher),
        "repairs": config.teacher.repairs,
        "confirmations": config.attempts.confirmation_share,
        "seed": config.seed,
        "prompts": prompts.digest_prompts(*used, folder=config.prompts.folder),
    }


def write_corrections(
    config: Config,
    run: Run,
    *,
    teacher: Teacher,
    grader: Grader,
    fresh: bool = False,
    progress: Progress = no_progress,
) -> Report:
    """Have the teacher correct every distinct wrong attempt, and confirm right ones; writes reviews.jsonl.

    Raises UsageError if earlier replies come from another teacher or other prompts (`fresh` discards them), DataError if
    nothing could be corrected.
    """
    if run.is_imported("corrections", "reviews.jsonl"):
        return _validate_imported(run)
    inputs, report = corrections_inputs(config, run), Report("corrections")
    if manifest := run.done("corrections", inputs, "reviews.jsonl"):
        return Report.of(manifest)
    basis, begun = basis_of(config.teacher, inputs["prompts"]), "corrections.begun.json"
    if not fresh:
        refuse_other_basis(run.read_json(begun, dict[str, object]), basis, run.path("reviews.jsonl"))
    with timed(report):
        hint = "run `sclite train`: it trains SFT, then samples attempts"
        everything = run.require("attempts.jsonl", Attempt, hint)
        attempts = deduplicate(everything)
        if same := len(everything) - len(attempts):
            report.counts["duplicates"] = same
        wrong, drops = split_usable(attempts)
        by_job = {f"{attempt.id}/{attempt.sample}": attempt for attempt in wrong}
        reviews: list[Review] = []
        paid = False
        jobs = correction_jobs(config, run, grader, wrong)
        results = teacher.ask_after_pilot(jobs, len(wrong), "corrections")
        for done, result in enumerate(results, 1):
            attempt = by_job[result.id]
            if not paid and result.entry is not None:
                run.write_json(begun, basis)
                paid = True
            if result.rejection is not None:
                drops.append(_drop(attempt, result.rejection.reason, result.rejection.text, result.raw))
            elif (made := result.made) is not None:
                step, noted = next((n, step) for n, step in enumerate(made.steps, 1) if step.cause)
                ids = {"id": attempt.id, "sample": attempt.sample, "requests": result.requests}
                parts = {"cause": noted.cause, "correction": noted.correction, "trace": render(made)}
                reviews.append(Review(**ids, step=step, **parts))
            progress(done, len(wrong), teacher.ledger.spent_usd)
        report.cost_usd = teacher.ledger.cost_usd("corrections")
        run.replace_drops("corrections", drops)
        report.dropped = dict(Counter(drop.reason for drop in drops))
        if not reviews:
            reasons = ", ".join(f"{n} {reason.replace('_', ' ')}" for reason, n in report.dropped.items())
            other = "use another attempts.student"
            if config.attempts.kind == "trained":
                other = "raise sft.num_train_epochs or sft.learning_rate and train with --fresh"
            hint = f"see {run.path('dropped.jsonl')}; add problems or samples (attempts.samples), or {other}"
            raise DataError(f"no wrong attempt could be corrected: {reasons or 'there are none'}", hint)
        right = [a for a in attempts if a.correct is True and not a.parsed.issues]
        share = config.attempts.confirmation_share
        wanted = round(len(reviews) * share / (1 - share))
        judged = list(filter(from_feedback, right))  # always includes the user's own verdicts
        others = [a for a in right if not from_feedback(a)]
        more = max(0, min(len(others), wanted - len(judged)))
        confirmed = [
            Review(id=a.id, sample=a.sample, step=None, trace=render(a.parsed.work), requests=0)
            for a in (*judged, *random.Random(config.seed).sample(others, more))
        ]
        order = {(a.id, a.sample): i for i, a in enumerate(attempts)}
        rows = sorted([*reviews, *confirmed], key=lambda r: order[r.id, r.sample])
        run.write_json(begun, basis)
        run.replace("reviews.jsonl", rows)
    report.counts |= {"wrong": len(wrong), "corrected": len(reviews), "confirmed": len(confirmed)}
    if wanted and not confirmed:
        why = (
            "no attempt is right and well-formed: without confirmations the student learns to flag every step"
        )
        report.warn(progress, f"{why}; add easier problems, or raise attempts.samples")
    signed = with_unanswered(inputs, count_unanswered(report.dropped))
    run.sign("corrections", signed, report, {"reviews.jsonl": len(rows)})
    return report


def count_pending_corrections(config: Config, run: Run) -> int | None:
    """How many wrong attempts still need a review, paid replies included; None before there are attempts."""
    imported = run.is_imported("corrections", "reviews.jsonl") or run.is_imported("pairs", "pairs.jsonl")
    if imported or run.done("corrections", corrections_inputs(config, run), "reviews.jsonl"):
        return 0
    attempts = deduplicate(run.read("attempts.jsonl", Attempt))
    return len(split_usable(attempts)[0]) if attempts else None


def check_review(text: str, attempt: Attempt, problem: Problem, grader: Grader) -> Trace | Rejection:
    """A teacher's review of an attempt, with the attempt's own text (keys included) up to the wrong step; or a rejection."""
    parsed, work = parse_reply(text), attempt.parsed.work
    review = parsed.trace
    if parsed.issues:
        return Rejection("not_readable", str(parsed.issues[0]))
    step = find_flagged_step(work, review, attempt.first_error, exact=False)
    if isinstance(step, Rejection):
        return step
    notes = review.steps[step - 1]
    # the rest is the student's text
    added = (Step("", None, notes.cause, notes.correction), *review.steps[step:])
    written = render(replace(review, steps=added))
    if "\ufffd" in written:
        return Rejection("broken_text", "it contains broken characters")
    if LEAK.search(written):
        return Rejection("leak", "the text mentions a given solution or answer")
    right = grader.equal(review.answer, problem.answer)
    if right is None:
        return Rejection("grader_unknown", "the answer could not be compared")
    if not right:
        return Rejection("wrong_answer", f"{review.answer} is not the right final answer")
    noted = replace(work.steps[step - 1], cause=notes.cause, correction=notes.correction)
    return replace(review, steps=(*work.steps[: step - 1], noted, *review.steps[step:]))


def find_flagged_step(work: Trace, review: Trace, label: int | None, exact: bool = True) -> int | Rejection:
    """The one step that a review flags, with cause and correction, keeping the text up to it; or why there is none.

    Unless `exact`, a teacher's copy may differ in blanks, case, dollar signs, bold and the final period.
    """
    step = first_corrected(review)
    if step is None:
        why = "no step carries <Cause> and <Correction>, but the answer of this work is wrong"
        return Rejection("no_error_found", why)
    if step > len(work.steps):
        why = f"the work has {len(work.steps)} steps, the cause is in step {step}"
        return Rejection("step_out_of_range", why)
    if label is not None and step != label:
        return Rejection("other_step_than_label", f"step {label} is the first wrong one, not step {step}")
    if review.steps[step - 1].cause is None or review.steps[step - 1].correction is None:
        return Rejection("cause_or_correction_missing", f"step {step} needs both <Cause> and <Correction>")
    if any(s.cause or s.correction for s in review.steps[step:]):
        why = "only the first wrong step carries <Cause> and <Correction>"
        return Rejection("several_steps_corrected", why)
    for number, pair in enumerate(zip(review.steps[:step], work.steps, strict=False), 1):
        new, old = (" ".join(each.text.split()) for each in pair)
        if not exact:
            plain = (unicodedata.normalize("NFKC", text).casefold() for text in (new, old))
            new, old = (re.sub(r"\\[()\[\]]|[\s$*`\\]", "", text).rstrip(".") for text in plain)
        if new != old:
            return Rejection("steps_changed", f"step {number} must be exactly as the student wrote it")
    return step


def _validate_imported(run: Run) -> Report:
    """The report of an imported reviews.jsonl, each row checked against its attempt."""
    attempts = {(attempt.id, attempt.sample): attempt for attempt in run.read("attempts.jsonl", Attempt)}
    reviews, problems = run.read("reviews.jsonl", Review), {p.id for p in run.rows("problems.jsonl", Problem)}
    for number, row in enumerate(reviews, 1):
        parsed, attempt = row.parsed, attempts.get((row.id, row.sample))
        step, why = first_corrected(parsed.trace), ""
        if attempt is None:
            why = f"attempts.jsonl has no attempt with this id and sample {row.sample}"
        elif row.id not in problems:
            why = "no problem has this id"
        elif parsed.issues:
            why = str(parsed.issues[0])
        elif row.step != step:
            why = f"step is {row.step}, but its trace corrects {step or 'none'}"
        elif step and isinstance(
            found := find_flagged_step(attempt.parsed.work, parsed.trace, None), Rejection
        ):
            why = found.text
        elif step and (row.cause is None or row.correction is None):
            why = "cause or correction is missing"
        if why:
            reject_row(run, "reviews.jsonl", number, row, why, "fix or remove it")
    corrected = sum(row.step is not None for row in reviews)
    counts = {"corrected": corrected, "confirmed": len(reviews) - corrected, "imported": len(reviews)}
    return Report("corrections", counts, skipped=True)


def split_usable(attempts: Iterable[Attempt]) -> tuple[list[Attempt], list[Drop]]:
    """(wrong attempts with readable steps, drops for the others that are not right)."""
    wrong, drops = [], []
    for attempt in attempts:
        if attempt.correct is None:
            drops.append(_drop(attempt, "outcome_unknown", "", attempt.trace))
        elif not attempt.correct and (issue := find_fatal_issue(attempt.parsed)):
            drops.append(_drop(attempt, "attempt_not_readable", issue, attempt.trace))
        elif not attempt.correct:
            wrong.append(attempt)
    return wrong, drops


def _drop(attempt: Attempt, reason: str, detail: str, raw: str) -> Drop:
    of = {"id": attempt.id, "sample": attempt.sample}
    return Drop(stage="corrections", **of, reason=reason, detail=detail, raw=raw)


def correction_jobs(
    config: Config, run: Run, grader: Grader, wrong: Sequence[Attempt]
) -> Iterator[Job[Trace]]:
    """One teacher job per wrong attempt."""
    problems: Mapping[str, Problem] = {p.id: p for p in run.rows("problems.jsonl", Problem)} if wrong else {}
    folder = config.prompts.folder
    for attempt in wrong:
        problem, work = problems[attempt.id], render(attempt.parsed.work)
        gold = problem.question, problem.solution or problem.answer, problem.answer
        yield Job(
            f"{attempt.id}/{attempt.sample}",
            partial(prompts.teacher_messages, *gold, work=work, folder=folder),
            partial(check_review, attempt=attempt, problem=problem, grader=grader),
            attempt.sample,
            inspect=partial(prompts.inspection_messages, "inspector_correction", *gold, folder=folder),
        )
