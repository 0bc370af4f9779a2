"""The teacher's reviews of wrong attempts, checked, plus confirmations of right ones (METHOD section 4)."""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from sclite import prompts
from sclite.config import Config, without_password
from sclite.data.attempts import FATAL_ISSUES, add_warning, deduplicate
from sclite.data.imported import reject_row
from sclite.data.review_check import review_rejection, step_rejection
from sclite.errors import DataError
from sclite.grading.worker import Grader
from sclite.records import Attempt, Drop, Problem, Review, Template
from sclite.run import Report, Run, timed
from sclite.signature import digest
from sclite.teacher.client import Job, Teacher, count_unanswered
from sclite.teacher.forecast import CHARACTERS_PER_TOKEN, Forecast, ask_after_pilot, forecast
from sclite.trace import Trace, first_corrected, parse, render, work_of

SAMPLED = 50  # templates from which the length of a correction is estimated


def corrections_inputs(config: Config, run: Run) -> dict[str, Any]:
    """The inputs that decide the teacher's reviews."""
    teacher = config.teacher
    used = ["teacher_system", "teacher_correction"]
    used += ["inspector_correction"] if teacher.inspector else []
    return {
        "attempts": run.file_digest("attempts.jsonl"),
        "teacher": digest(
            [
                teacher.model,
                without_password(teacher.api_base),
                teacher.temperature,
                teacher.max_tokens,
                teacher.repairs,
                teacher.inspector,
                teacher.extra,
            ]
        ),
        "confirmations": config.attempts.confirmation_share,
        "seed": config.seed,
        "prompts": prompts.digest(*used, folder=config.prompts.folder),
    }


def write_corrections(
    config: Config,
    run: Run,
    *,
    teacher: Teacher,
    grader: Grader,
    confirm: Callable[[Forecast], bool] | None = None,
    progress: Callable[[int, int, float | None], None] | None = None,
) -> Report:
    """Have the teacher correct every distinct wrong attempt, and confirm right ones; writes reviews.jsonl.

    An imported reviews.jsonl replaces the stage, once each row has been checked against its attempt.
    """
    if run.is_imported("corrections", "reviews.jsonl"):
        return _validate_imported(run)
    inputs, report = corrections_inputs(config, run), Report("corrections")
    if manifest := run.done("corrections", inputs, "reviews.jsonl"):
        return Report.of(manifest)
    with timed(report):
        problems = {problem.id: problem for problem in run.read("problems.jsonl", Problem)}
        every = run.require(
            "attempts.jsonl", Attempt, "run `sclite train`: it trains SFT, then samples attempts"
        )
        attempts = deduplicate(every)
        wrong, drops = _split_usable(attempts)
        reviews, rejected = _request_reviews(config, teacher, grader, wrong, problems, confirm, progress)
        report.cost_usd = teacher.ledger.totals("corrections")["cost_usd"]
        drops += rejected
        run.replace_drops({"corrections"}, drops)
        report.dropped = dict(Counter(drop.reason for drop in drops))
        if not reviews:
            reasons = ", ".join(f"{n} {reason.replace('_', ' ')}" for reason, n in report.dropped.items())
            other = "use an attempts.student that writes <Step1> .."
            if config.attempts.kind == "trained":
                other = "train SFT for longer (--fresh)"
            raise DataError(
                f"no wrong attempt could be corrected: {reasons or 'there are none'}",
                f"see {run.path('dropped.jsonl')}; add problems or samples (attempts.samples), or {other}",
            )
        confirmed = _sample_confirmations(attempts, len(reviews), config)
        order = {(a.id, a.sample): i for i, a in enumerate(attempts)}
        run.mark_started("corrections")
        run.replace("reviews.jsonl", sorted([*reviews, *confirmed], key=lambda r: order[r.id, r.sample]))
    report.counts |= {"wrong": len(wrong), "corrected": len(reviews), "confirmed": len(confirmed)}
    if not confirmed and _confirmations_wanted(len(reviews), config):
        text = "no attempt is right and well-formed: without confirmations the student learns to accuse every step"
        add_warning(report, progress, f"{text}; add easier problems, or raise attempts.samples")
    # duplicates of another wrong attempt at the same problem, sent to the teacher once
    if repeated := sum(a.correct is not True for a in every) - sum(a.correct is not True for a in attempts):
        report.counts["wrong_in_the_same_words"] = repeated
    unanswered = count_unanswered(report.dropped)
    # failed calls: this signature matches no inputs, so the next run requests them again
    signed = {**inputs, "unanswered": unanswered} if unanswered else inputs
    run.sign("corrections", signed, report, {"reviews.jsonl": len(reviews) + len(confirmed)})
    return report


def count_pending_corrections(config: Config, run: Run) -> int | None:
    """The number of wrong attempts that still need a review; None before there are attempts.

    0 if the stage is done, or if reviews or pairs are imported. In an unfinished stage, attempts whose reply is already
    in the ledger still count.
    """
    imported = run.is_imported("corrections", "reviews.jsonl") or run.is_imported("pairs", "pairs.jsonl")
    if imported or run.done("corrections", corrections_inputs(config, run), "reviews.jsonl"):
        return 0
    attempts = deduplicate(run.read("attempts.jsonl", Attempt))
    return len(_split_usable(attempts)[0]) if attempts else None


def estimate_corrections_usd(config: Config, run: Run, teacher: Teacher, count: int) -> float | None:
    """Estimated US dollars for `count` corrections; None if prices are unknown or there are no templates. Sends nothing.

    A correction repeats an attempt, which is about as long as a template.
    """
    sample = list(islice(run.rows("templates.jsonl", Template), SAMPLED))
    price = teacher.price() if sample else None
    if price is None:
        return None
    sent = written = 0
    for row in sample:
        messages = prompts.correction_messages(
            row.question, row.trace, row.answer, row.trace, "", config.prompts.folder
        )
        sent += sum(len(message["content"]) for message in messages)
        written += 1.5 * len(row.trace)
    each = price.cost_usd(sent / CHARACTERS_PER_TOKEN, written / CHARACTERS_PER_TOKEN) / len(sample)
    return count * each


def _validate_imported(run: Run) -> Report:
    """The report of an imported reviews.jsonl, each row checked against its attempt."""
    attempts = {(attempt.id, attempt.sample): attempt for attempt in run.read("attempts.jsonl", Attempt)}
    reviews = run.read("reviews.jsonl", Review)
    for number, row in enumerate(reviews, 1):
        parsed, attempt = parse(row.trace), attempts.get((row.id, row.sample))
        if attempt is None:
            problem = f"attempts.jsonl has no attempt with this id and sample {row.sample}"
            reject_row(
                run,
                "reviews.jsonl",
                number,
                row,
                problem,
                "add the attempt to attempts.jsonl, or remove the review",
            )
        if parsed.issues:
            reject_row(run, "reviews.jsonl", number, row, str(parsed.issues[0]))
        corrected = first_corrected(parsed.trace)
        if row.step != corrected:
            problem = f"step is {row.step}, but its trace corrects {corrected or 'none'}"
            reject_row(run, "reviews.jsonl", number, row, problem)
        if row.step:
            if rejection := step_rejection(work_of(attempt.trace), parsed.trace, None):
                reject_row(run, "reviews.jsonl", number, row, rejection.text)
            if row.cause is None or row.correction is None:
                reject_row(run, "reviews.jsonl", number, row, "cause or correction is missing")
    corrected = sum(row.step is not None for row in reviews)
    counts = {"corrected": corrected, "confirmed": len(reviews) - corrected, "imported": len(reviews)}
    return Report("corrections", counts, skipped=True)


def _split_usable(attempts: Iterable[Attempt]) -> tuple[list[Attempt], list[Drop]]:
    """(wrong attempts with readable steps, drops for the others that are not right)."""
    wrong, drops = [], []
    for attempt in attempts:
        if attempt.correct is True:
            continue
        fatal = [issue for issue in parse(attempt.trace).issues if issue.name in FATAL_ISSUES]
        if attempt.correct is None:
            drops.append(_drop(attempt, "outcome_unknown", ""))
        elif fatal:
            drops.append(_drop(attempt, "attempt_not_readable", str(fatal[0])))
        else:
            wrong.append(attempt)
    return wrong, drops


def _drop(attempt: Attempt, reason: str, detail: str, raw: str | None = None) -> Drop:
    raw = attempt.trace if raw is None else raw
    return Drop(
        stage="corrections", id=attempt.id, sample=attempt.sample, reason=reason, detail=detail, raw=raw
    )


def preview_corrections(config: Config, run: Run, teacher: Teacher, grader: Grader) -> dict[str, Any]:
    """The first request of `write_corrections` and the estimated cost (see `forecast`); sends nothing.

    Raises DataError before there are attempts: the wrong ones decide what is sent.
    """
    hint = "run without --dry-run: it samples the attempts first, then shows what the rest will cost"
    attempts = deduplicate(run.require("attempts.jsonl", Attempt, hint))
    wrong = _split_usable(attempts)[0] if count_pending_corrections(config, run) else []
    problems = {problem.id: problem for problem in run.read("problems.jsonl", Problem)}
    written = 1.5 * sum(len(attempt.trace) for attempt in wrong) / max(1, len(wrong)) / CHARACTERS_PER_TOKEN
    return forecast(teacher, _jobs(config, grader, wrong, problems), written, "corrections")


def _jobs(
    config: Config, grader: Grader, wrong: Iterable[Attempt], problems: Mapping[str, Problem]
) -> Iterator[Job]:
    """One teacher job per wrong attempt."""
    folder = config.prompts.folder

    def job(attempt: Attempt) -> Job:
        problem = problems[attempt.id]
        solution = problem.solution or problem.answer
        work = render(work_of(attempt.trace))

        def messages(error: str):
            return prompts.correction_messages(
                problem.question, solution, problem.answer, work, error, folder
            )

        def inspect(text: str):
            return prompts.inspection_messages(
                "inspector_correction", problem.question, solution, problem.answer, text, folder
            )

        def check(text: str):
            return review_rejection(text, attempt, problem, grader)

        return Job(f"{attempt.id}/{attempt.sample}", messages, check, attempt.sample, inspect=inspect)

    return map(job, wrong)


def _request_reviews(
    config: Config,
    teacher: Teacher,
    grader: Grader,
    wrong: Sequence[Attempt],
    problems: Mapping[str, Problem],
    confirm: Callable[[Forecast], bool] | None,
    progress: Callable[[int, int, float | None], None] | None,
) -> tuple[list[Review], list[Drop]]:
    """(the teacher's reviews that pass every filter, drops for the rest)."""
    by_id = {f"{attempt.id}/{attempt.sample}": attempt for attempt in wrong}
    reviews, drops = [], []
    jobs = _jobs(config, grader, wrong, problems)
    for done, result in enumerate(ask_after_pilot(teacher, jobs, len(wrong), "corrections", confirm), 1):
        attempt = by_id[result.id]
        if result.rejection is not None:
            drops.append(_drop(attempt, result.rejection.reason, result.rejection.text, result.raw))
        else:
            reviews.append(_review(attempt, parse(result.text).trace, result.requests))
        if progress is not None:
            progress(done, len(wrong), teacher.ledger.spent_usd)
    return reviews, drops


def _review(attempt: Attempt, trace: Trace, requests: int) -> Review:
    """A checked review as a row, with the attempt's own text (keys included) up to the wrong step."""
    step = first_corrected(trace)
    accused = trace.steps[step - 1]
    *before, wrong = work_of(attempt.trace).steps[:step]
    wrong = replace(wrong, cause=accused.cause, correction=accused.correction)
    trace = replace(trace, steps=(*before, wrong, *trace.steps[step:]))
    return Review(
        id=attempt.id,
        sample=attempt.sample,
        step=step,
        cause=accused.cause,
        correction=accused.correction,
        trace=render(trace),
        requests=requests,
    )


def _sample_confirmations(attempts: Sequence[Attempt], corrected: int, config: Config) -> list[Review]:
    """Right attempts as reviews that change nothing; `attempts.confirmation_share` sets how many."""
    right = [a for a in attempts if a.correct is True and not parse(a.trace).issues]
    wanted = min(len(right), _confirmations_wanted(corrected, config))
    picked = random.Random(config.seed).sample(right, wanted)
    return [
        Review(id=a.id, sample=a.sample, step=None, trace=render(work_of(a.trace)), requests=0)
        for a in picked
    ]


def _confirmations_wanted(corrected: int, config: Config) -> int:
    share = config.attempts.confirmation_share
    return round(corrected * share / (1 - share))
