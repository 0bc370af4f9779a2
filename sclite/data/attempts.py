"""The attempts of a student (the trained one, or `attempts.student`), graded and appended block by block."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from sclite import prompts
from sclite.config import Config, without_password
from sclite.data.imported import import_attempts, reject_row
from sclite.errors import UsageError
from sclite.files import file_digest
from sclite.grading.extract import answer_of
from sclite.grading.grader import Grader
from sclite.progress import Progress, no_progress
from sclite.records import Attempt, Drop, Problem, from_feedback
from sclite.run import Report, Run, timed
from sclite.signature import differences, digest, digest_rows, with_unanswered
from sclite.student.adapters import adapter_weights
from sclite.student.base import Request, Student
from sclite.teacher.ledger import FILE as LEDGER
from sclite.teacher.ledger import Ledger
from sclite.trace import ParsedTrace, parse, render

_NOT_SAMPLING = {"reviews", "confirmation_share", "student", "api_base", "concurrency", "price"}
_FATAL_ISSUES = ("no_steps", "no_answer", "empty_step", "wrong_step_number", "step_after_the_end")


def attempts_inputs(config: Config, run: Run, problems: Sequence[Problem]) -> dict[str, object]:
    """The inputs that decide the attempts: student, problems, sampling settings."""
    source = config.attempts.source
    read = file_digest(Path(source)) if source else ""
    if source and not read and (manifest := run.manifest("attempts")):  # deleted, or the run was moved
        read = manifest["inputs"].get("source", "")
    return {
        "problems": digest_rows(problems),
        "student": external_student_digest(config) or run.file_digest(adapter_weights("sft")),
        # not student.batch: each request has its own seed, and replacing attempts means paying for corrections again
        "sampling": digest([config.attempts.model_dump(exclude=_NOT_SAMPLING), config.seed]),
        "source": read,
        "prompts": prompts.digest_prompts("student_system", "student_solve", folder=config.prompts.folder),
    }


def refuse_other_attempts(config: Config, run: Run, problems: Sequence[Problem]) -> None:
    """Raise UsageError if a stage 2 was trained on attempts with other settings, before new ones are paid for."""
    signed = run.manifest("attempts")
    imported = run.is_imported("corrections", "reviews.jsonl")
    if signed is None or imported or run.manifest("warmup") is None:
        return
    before = {key: value for key, value in signed["inputs"].items() if key != "unanswered"}
    if changed := differences(before, attempts_inputs(config, run, problems)):
        hint = "restore these settings, or add --fresh to sample, correct (and pay) and train again"
        raise UsageError(f"stage 2 was trained on attempts with other settings: {'; '.join(changed)}", hint)


def external_student_digest(config: Config) -> str:
    """A digest of `attempts.student`: an endpoint's model and address, or a GGUF's bytes; "" if unset."""
    settings = config.attempts
    if settings.kind == "endpoint":
        return digest([settings.student, without_password(settings.api_base).rstrip("/")])
    return file_digest(Path(settings.student)) if settings.kind == "gguf" else ""


def endpoint_cost_usd(run: Run, stage: str) -> float | None:
    """Cost of the endpoint student's replies in this stage, None if it is unknown; 0 for a local student."""
    if not run.path(LEDGER).is_file():
        return 0.0
    with Ledger.reading(run.path(LEDGER)) as ledger:
        return ledger.cost_usd(stage)


def write_attempts(
    config: Config,
    run: Run,
    *,
    problems: Sequence[Problem],
    student: Student | None,
    grader: Grader,
    progress: Progress = no_progress,
) -> Report:
    """Sample `attempts.samples` attempts per problem, or import `attempts.source`; writes attempts.jsonl.

    The file of a resumed run equals that of an uninterrupted one. The next run retries failed calls.
    """
    settings = config.attempts
    if run.is_imported("attempts", "attempts.jsonl") and not settings.source:
        known, seen = {problem.id for problem in problems}, set()
        given = [row for row in run.rows("attempts.jsonl", Attempt) if not from_feedback(row)]
        for number, row in enumerate(given, 1):
            steps, label, why = len(row.parsed.trace.steps), row.first_error, ""
            if row.id not in known:
                why = "no problem has this id"
            elif (row.id, row.sample) in seen:
                why = f"sample {row.sample} occurs twice"
            elif label is not None and (not -1 <= label <= steps or row.correct is not (label < 1)):
                why = f"first_error is {label}, but it has {steps} steps, and correct is {row.correct}"
            if why:
                hint = "fix or remove it; an attempt with a labelled step is wrong, and 0 or -1 means that it is right"
                reject_row(run, "attempts.jsonl", number, row, why, hint)
            seen.add((row.id, row.sample))
        return Report("attempts", _count_outcomes(given) | {"imported": len(given)}, skipped=True)
    inputs, report = attempts_inputs(config, run, problems), Report("attempts")
    if manifest := run.done("attempts", inputs, "attempts.jsonl"):
        return Report.of(manifest)
    drops: list[Drop] = []
    with timed(report):
        if settings.source:
            rows = import_attempts(Path(settings.source), problems, grader, drops)
        else:
            assert student is not None
            rows = _sample(config, run, inputs, problems, student, grader, progress)
        run.replace_drops("attempts", drops)
        judged = list(filter(from_feedback, run.rows("attempts.jsonl", Attempt, whole=False)))
        run.replace("attempts.jsonl", [*judged, *rows])
    report.counts |= _count_outcomes(rows)
    report.dropped = dict(Counter(drop.reason for drop in drops))
    report.cost_usd = endpoint_cost_usd(run, "attempts")
    unanswered = sum(map(_call_failed, rows)) if settings.kind == "endpoint" else 0
    outputs = {"attempts.jsonl": len(judged) + len(rows)}
    run.sign("attempts", with_unanswered(inputs, unanswered), report, outputs)
    return report


def find_fatal_issue(parsed: ParsedTrace) -> str:
    """The issue that makes the steps of an attempt ambiguous, or ""."""
    # the parser repairs others; such attempts are worth the most: a student that doubts a step often misplaces tags
    return next((str(issue) for issue in parsed.issues if issue.name in _FATAL_ISSUES), "")


def _count_outcomes(rows: Sequence[Attempt]) -> dict[str, int]:
    found = Counter(row.correct for row in rows)
    return {"attempts": len(rows), "right": found[True], "wrong": found[False], "unknown": found[None]}


def _call_failed(attempt: Attempt) -> bool:
    """Whether the call for this attempt failed: there is no text, and the outcome is unknown."""
    return attempt.correct is None and not attempt.trace


def _sample(
    config: Config,
    run: Run,
    inputs: dict[str, object],
    problems: Sequence[Problem],
    student: Student,
    grader: Grader,
    progress: Progress,
) -> list[Attempt]:
    """Sample, grade and append block by block, after the complete blocks of an interrupted run with the same inputs."""
    settings, endpoint = config.attempts, config.attempts.kind == "endpoint"
    size = (
        4 * settings.concurrency if endpoint else config.student.batch
    )  # few waits for an endpoint's last replies
    jobs = [(problem, sample) for problem in problems for sample in range(settings.samples)]
    rows: list[Attempt] = []
    written = run.read("attempts.jsonl", Attempt, whole=False)
    if run.read_json("attempts.begun.json") == inputs:
        sampled = (row for row in written if not from_feedback(row))
        for row, (problem, sample) in zip(sampled, jobs, strict=False):
            # the IDs differ if earlier rows were damaged; failed calls to an endpoint are retried
            if (row.id, row.sample) != (problem.id, sample) or (endpoint and _call_failed(row)):
                break
            rows.append(row)
    del rows[len(rows) // size * size :]
    run.replace("attempts.jsonl", [*filter(from_feedback, written), *rows])
    run.write_json("attempts.begun.json", inputs)
    for start in range(len(rows), len(jobs), size):
        pending = jobs[start : start + size]
        requests = [
            Request(
                prompts.solve_messages(problem.question, config.prompts.folder),
                max_tokens=settings.max_tokens,
                temperature=settings.temperature,
                top_p=settings.top_p,
                seed=int(digest([config.seed, problem.id, sample]), 16) % 2**31,
            )
            for problem, sample in pending
        ]
        replies = sorted(student.generate(requests), key=lambda reply: reply.index)
        answers = [answer_of(parse(reply.text)) for reply in replies]
        golds = [problem.answer for problem, _ in pending]
        verdicts = grader.equal_many(zip(answers, golds, strict=True))
        for (problem, sample), reply, answer, verdict in zip(
            pending, replies, answers, verdicts, strict=True
        ):
            correct = None if reply.finish == "error" else verdict
            of = {"id": problem.id, "sample": sample}
            rows.append(Attempt(**of, trace=reply.text, answer=answer, correct=correct))
        run.append("attempts.jsonl", rows[start:])
        progress(len(rows), len(jobs))
    return rows


def deduplicate(attempts: Sequence[Attempt]) -> list[Attempt]:
    """The first attempt of each distinct text (steps and answer) per problem, and every failed call, in order."""
    first: dict[tuple[str, str | int], Attempt] = {}
    for attempt in attempts:
        text = attempt.sample if _call_failed(attempt) else render(attempt.parsed.work) or attempt.trace
        first.setdefault((attempt.id, text), attempt)
    return list(first.values())
