"""From wrong attempts to pairs: the teacher's reviews, the student's own, and the filters between (METHOD section 4)."""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from sclite import prompts
from sclite.config import Config, without_password
from sclite.data.attempts import UNCLEAR, distinct, warn
from sclite.data.imported import refuse
from sclite.data.review_check import review_rejection, step_rejection
from sclite.errors import DataError
from sclite.grading.worker import Grader
from sclite.records import Attempt, Drop, Problem, Review, Template
from sclite.run import Report, Run, timed
from sclite.signature import digest
from sclite.teacher.client import Job, Teacher, count_unanswered
from sclite.teacher.forecast import CHARACTERS_PER_TOKEN, Forecast, ask_after_pilot, forecast
from sclite.trace import Trace, first_corrected, parse, render, work_of

STAGE, FILE = "corrections", "reviews.jsonl"
SAMPLED = 50  # templates that tell how long a correction will be


def inputs_of(config: Config, run: Run) -> dict[str, Any]:
    """What decides the teacher's reviews."""
    teacher = config.teacher
    named = ["teacher_system", "teacher_correction"]
    named += ["inspector_correction"] if teacher.inspector else []
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
            ]
        ),
        "confirmations": config.attempts.confirmation_share,
        "seed": config.seed,
        "prompts": prompts.digest(*named, folder=config.prompts.folder),
    }


def build_corrections(
    config: Config,
    run: Run,
    *,
    teacher: Teacher,
    grader: Grader,
    confirm: Callable[[Forecast], bool] | None = None,
    progress: Callable[[int, int, float | None], None] | None = None,
) -> Report:
    """Have the teacher correct every different wrong attempt; add confirmations of right ones; writes reviews.jsonl.

    A reviews.jsonl that no such stage wrote takes its place, once each row fits its attempt.
    """
    if run.is_imported(STAGE, FILE):
        return _adopt(run)
    inputs, report = inputs_of(config, run), Report(STAGE)
    if manifest := run.done(STAGE, inputs, FILE):
        return Report.of(manifest)
    with timed(report):
        problems = {problem.id: problem for problem in run.read("problems.jsonl", Problem)}
        made = run.require("attempts.jsonl", Attempt, "run `sclite train`: SFT first, then its attempts")
        attempts = distinct(made)
        wrong, drops = _usable(attempts)
        reviews, refused = _ask(config, teacher, grader, wrong, problems, confirm, progress)
        report.cost_usd = teacher.ledger.totals(STAGE)["cost_usd"]
        run.replace_drops({STAGE}, [*drops, *refused])
        report.dropped = dict(Counter(drop.reason for drop in [*drops, *refused]))
        if not reviews:
            reasons = ", ".join(f"{n} {reason.replace('_', ' ')}" for reason, n in report.dropped.items())
            trained = config.attempts.kind == "trained"
            other = (
                "train SFT for longer (--fresh)"
                if trained
                else "name an attempts.student that writes <Step1> .."
            )
            raise DataError(
                f"no wrong attempt could be corrected: {reasons or 'there is none'}",
                f"look into {run.path('dropped.jsonl')}; take more problems or samples (attempts.samples), or {other}",
            )
        confirmed = _confirmations(attempts, len(reviews), config)
        order = {attempt_key(a): i for i, a in enumerate(attempts)}
        run.mark_started(STAGE)
        run.replace(FILE, sorted([*reviews, *confirmed], key=lambda r: order[attempt_key(r)]))
    report.counts |= {"wrong": len(wrong), "corrected": len(reviews), "confirmed": len(confirmed)}
    if not confirmed and _confirmations_wanted(len(reviews), config):
        text = "no attempt is right and well-formed, so there are no confirmations and the student learns to accuse every step"
        warn(report, progress, f"{text}; add easier problems, or raise attempts.samples")
    if again := _not_right(made) - _not_right(attempts):
        report.counts["wrong_in_the_same_words"] = (
            again  # as another attempt at the problem; asked about once
        )
    unanswered = count_unanswered(report.dropped)
    # the signature then fits no inputs, and the next call asks again
    signed = {**inputs, "unanswered": unanswered} if unanswered else inputs
    run.sign(STAGE, signed, report, {FILE: len(reviews) + len(confirmed)})
    return report


def _not_right(attempts: Sequence[Attempt]) -> int:
    return sum(attempt.correct is not True for attempt in attempts)


def left_to_ask(config: Config, run: Run) -> int | None:
    """How many wrong attempts the teacher has not been asked about; None before there are attempts.

    None are left where this stage is done, or where its rows or those made from them were brought along. While it is
    half-way, replies that lie in the ledger are still among them.
    """
    brought = run.is_imported(STAGE, FILE) or run.is_imported("pairs", "pairs.jsonl")
    if brought or run.done(STAGE, inputs_of(config, run), FILE):
        return 0
    attempts = distinct(run.read("attempts.jsonl", Attempt))
    return len(_usable(attempts)[0]) if attempts else None


def reckon_corrections(config: Config, run: Run, teacher: Teacher, count: int) -> float | None:
    """US dollars for so many corrections, from the lengths of the run's templates; None where prices are unknown.

    A correction says over again what an attempt says, which is about as long as a template. Nothing is sent.
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


def _adopt(run: Run) -> Report:
    """The report of a reviews.jsonl that was put into the run, each row checked against its attempt."""
    attempts = {attempt_key(attempt): attempt for attempt in run.read("attempts.jsonl", Attempt)}
    reviews = run.read(FILE, Review)
    for number, row in enumerate(reviews, 1):
        parsed, attempt = parse(row.trace), attempts.get(attempt_key(row))
        if attempt is None:
            remedy = "put that attempt into attempts.jsonl, or remove the review"
            refuse(
                run,
                FILE,
                number,
                row,
                f"attempts.jsonl has no attempt of this id and sample {row.sample}",
                remedy,
            )
        if parsed.issues:
            refuse(run, FILE, number, row, str(parsed.issues[0]))
        if row.step != first_corrected(parsed.trace):
            said = first_corrected(parsed.trace)
            refuse(run, FILE, number, row, f"step is {row.step}, but its trace corrects {said or 'none'}")
        rejection = step_rejection(work_of(attempt.trace), parsed.trace, None) if row.step else None
        if rejection is not None:
            refuse(run, FILE, number, row, rejection.text)
        if row.step and (row.cause is None or row.correction is None):
            refuse(run, FILE, number, row, "cause or correction is missing")
    corrected = sum(row.step is not None for row in reviews)
    counts = {"corrected": corrected, "confirmed": len(reviews) - corrected, "imported": len(reviews)}
    return Report(STAGE, counts, skipped=True)


def attempt_key(row: Any) -> tuple[str, int]:
    return row.id, row.sample


def _usable(attempts: Iterable[Attempt]) -> tuple[list[Attempt], list[Drop]]:
    """The wrong attempts that have steps, and drops for the others that are not right."""
    wrong, drops = [], []
    for attempt in attempts:
        if attempt.correct is True:
            continue
        unclear = [error for error in parse(attempt.trace).issues if error.name in UNCLEAR]
        if attempt.correct is None:
            drops.append(_drop(attempt, "outcome_unknown", ""))
        elif unclear:
            drops.append(_drop(attempt, "attempt_not_readable", str(unclear[0])))
        else:
            wrong.append(attempt)
    return wrong, drops


def _drop(attempt: Attempt, reason: str, detail: str, raw: str | None = None) -> Drop:
    raw = attempt.trace if raw is None else raw
    return Drop(stage=STAGE, id=attempt.id, sample=attempt.sample, reason=reason, detail=detail, raw=raw)


def forecast_corrections(config: Config, run: Run, teacher: Teacher, grader: Grader) -> dict[str, Any]:
    """What `build_corrections` would send first and what it would cost (`forecast.reckon`); nothing is sent.

    Raises DataFault before there are attempts: which of them are wrong decides what is asked.
    """
    attempts = distinct(
        run.require(
            "attempts.jsonl",
            Attempt,
            "leave --dry-run out: the attempts are made first, and then you are shown what the rest will cost",
        )
    )
    wrong = _usable(attempts)[0] if left_to_ask(config, run) else []
    problems = {problem.id: problem for problem in run.read("problems.jsonl", Problem)}
    written = 1.5 * sum(len(attempt.trace) for attempt in wrong) / max(1, len(wrong)) / CHARACTERS_PER_TOKEN
    return forecast(teacher, _jobs(config, grader, wrong, problems), written, STAGE)


def _jobs(
    config: Config, grader: Grader, wrong: Iterable[Attempt], problems: Mapping[str, Problem]
) -> Iterator[Job]:
    """A question to the teacher for each wrong attempt."""

    def job(attempt: Attempt) -> Job:
        problem = problems[attempt.id]
        solution = problem.solution or problem.answer
        work = render(work_of(attempt.trace))

        def messages(error: str):
            return prompts.correction_messages(
                problem.question, solution, problem.answer, work, error, config.prompts.folder
            )

        def inspect(text: str):
            return prompts.inspection_messages(
                "inspector_correction",
                problem.question,
                solution,
                problem.answer,
                text,
                config.prompts.folder,
            )

        def check(text: str):
            return review_rejection(text, attempt, problem, grader)

        return Job(_name(attempt), messages, check, attempt.sample, inspect=inspect)

    return map(job, wrong)


def _name(attempt: Attempt) -> str:
    return f"{attempt.id}/{attempt.sample}"


def _ask(config, teacher, grader, wrong, problems, confirm, progress) -> tuple[list[Review], list[Drop]]:
    """The teacher's reviews that pass every filter, and drops for the rest."""
    by_key = {_name(attempt): attempt for attempt in wrong}
    reviews, drops = [], []
    jobs = _jobs(config, grader, wrong, problems)
    for done, result in enumerate(ask_after_pilot(teacher, jobs, len(wrong), STAGE, confirm), 1):
        attempt = by_key[result.id]
        if result.rejection is not None:
            drops.append(_drop(attempt, result.rejection.reason, result.rejection.text, result.raw))
        else:
            reviews.append(_review(attempt, parse(result.text).trace, result.requests))
        if progress is not None:
            progress(done, len(wrong), teacher.ledger.spent_usd)
    return reviews, drops


def _review(attempt: Attempt, trace: Trace, requests: int) -> Review:
    """A checked review as a row. Up to the wrong step it says what the attempt said, keys included."""
    step = first_corrected(trace)
    noted = trace.steps[step - 1]
    own = list(work_of(attempt.trace).steps[:step])
    own[-1] = replace(own[-1], cause=noted.cause, correction=noted.correction)
    trace = replace(trace, steps=(*own, *trace.steps[step:]))
    return Review(
        id=attempt.id,
        sample=attempt.sample,
        step=step,
        cause=noted.cause,
        correction=noted.correction,
        trace=render(trace),
        requests=requests,
    )


def _confirmations(attempts: Sequence[Attempt], corrected: int, config: Config) -> list[Review]:
    """Right attempts as reviews that change nothing, as many as `attempts.confirmation_share` asks for."""
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
