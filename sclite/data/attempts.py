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
from sclite.student.base import Reply, Request, Student
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
        return _validate_imported(run, problems)
    inputs, report = attempts_inputs(config, run, problems), Report("attempts")
    if manifest := run.done("attempts", inputs, "attempts.jsonl"):
        return Report.of(manifest)
    drops: list[Drop] = []
    with timed(report):
        try:
            if settings.source:
                rows = import_attempts(Path(settings.source), problems, grader, drops)
            else:
                assert student is not None
                rows = _sample(config, run, inputs, problems, student, grader, progress)
        finally:
            run.replace_drops("attempts", drops)
        judged = list(filter(from_feedback, run.rows("attempts.jsonl", Attempt, whole=False)))
        run.replace("attempts.jsonl", [*judged, *rows])
    report.counts |= _count_outcomes(rows)
    report.dropped = dict(Counter(drop.reason for drop in drops))
    report.cost_usd = endpoint_cost_usd(run, "attempts")
    replies = [row for row in rows if not _call_failed(row)]
    issues = filter(None, (find_fatal_issue(row.parsed) for row in replies))
    reasons = Counter(issue.partition(" at ")[0] for issue in issues)
    if 2 * reasons.total() > len(replies):
        remedy = (
            "train SFT for longer (sft.num_train_epochs), or raise attempts.max_tokens if they are cut off"
        )
        if settings.student or settings.source:
            remedy = "they must follow prompts/student_system.txt: <Step1> .. </Step1> <Answer> .. </Answer>"
        unreadable = f"{reasons.total()} of {len(replies)} attempts have no readable steps"
        report.warn(progress, f"{unreadable}, most often: {reasons.most_common(1)[0][0]}; {remedy}")
    unanswered = len(rows) - len(replies) if settings.kind == "endpoint" else 0
    outputs = {"attempts.jsonl": len(judged) + len(rows)}
    run.sign("attempts", with_unanswered(inputs, unanswered), report, outputs)
    return report


def _validate_imported(run: Run, problems: Sequence[Problem]) -> Report:
    """The report of an imported attempts.jsonl, each row checked against the problems."""
    known = {problem.id for problem in problems}
    rows, seen = [row for row in run.rows("attempts.jsonl", Attempt) if not from_feedback(row)], set()
    for number, row in enumerate(rows, 1):
        steps, label = len(row.parsed.trace.steps), row.first_error
        why, hint = "", "fix or remove it"
        if row.id not in known:
            why, hint = "no problem has this id", "use the ids of problems.jsonl"
        elif (row.id, row.sample) in seen:
            why, hint = f"sample {row.sample} occurs twice", "number the samples"
        elif label is not None and not -1 <= label <= steps:
            why = f"first_error is {label}, but it has {steps} steps"
        elif label is not None and row.correct is not (label < 1):
            why = f"first_error is {label}, but correct is {row.correct}"
            hint = "an attempt with a labelled step is wrong; 0 and -1 mean that it is right"
        if why:
            reject_row(run, "attempts.jsonl", number, row, why, hint)
        seen.add((row.id, row.sample))
    return Report("attempts", _count_outcomes(rows) | {"imported": len(rows)}, skipped=True)


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
    settings, size, endpoint = config.attempts, config.student.batch, config.attempts.kind == "endpoint"
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
    batch = max(1, len(jobs) - len(rows)) if endpoint else size  # an endpoint gets all requests at once
    for start in range(len(rows), len(jobs), batch):
        pending = jobs[start : start + batch]
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
        waiting: dict[int, Reply] = {}
        begin = 0
        for reply in student.generate(requests):  # in any order; blocks are written in request order
            waiting[reply.index] = reply
            while (block := range(begin, min(begin + size, len(pending)))) and waiting.keys() >= {*block}:
                begin = block.stop
                replies = [waiting.pop(index) for index in block]
                answers = [answer_of(parse(reply.text)) for reply in replies]
                golds = [pending[index][0].answer for index in block]
                verdicts = grader.equal_many(zip(answers, golds, strict=True))
                for index, reply, answer, verdict in zip(block, replies, answers, verdicts, strict=True):
                    problem, sample = pending[index]
                    correct = None if reply.finish == "error" else verdict
                    of = {"id": problem.id, "sample": sample}
                    rows.append(Attempt(**of, trace=reply.text, answer=answer, correct=correct))
                run.append("attempts.jsonl", rows[-len(block) :])
                progress(len(rows), len(jobs))
    return rows


def deduplicate(attempts: Sequence[Attempt]) -> list[Attempt]:
    """The first attempt of each distinct text (steps and answer) per problem, and every failed call, in order."""
    first: dict[tuple[str, str | int], Attempt] = {}
    for attempt in attempts:
        text = attempt.sample if _call_failed(attempt) else render(attempt.parsed.work) or attempt.trace
        first.setdefault((attempt.id, text), attempt)
    return list(first.values())
