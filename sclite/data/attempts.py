"""A student's attempts at problems that SFT has not seen: sampled in blocks, graded, appended block by block.

The student is the trained one, unless `attempts.student` names a GGUF or an endpoint.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from sclite import prompts
from sclite.config import Config, without_password
from sclite.data.imported import import_attempts, read_imported_attempts
from sclite.grading.extract import answer_of
from sclite.grading.worker import Grader
from sclite.records import Attempt, Drop, Problem
from sclite.run import Report, Run, timed
from sclite.signature import digest
from sclite.student.base import Reply, Request, Student
from sclite.teacher.ledger import FILE as LEDGER
from sclite.teacher.ledger import Ledger
from sclite.trace import parse, render, work_of

_NOT_SAMPLING = {"reviews", "confirmation_share", "student", "api_base", "concurrency", "price"}
FATAL_ISSUES = ("no_steps", "no_answer", "empty_step", "wrong_step_number", "step_after_the_end")
"""Issues after which the steps are ambiguous. The parser repairs the others (a missing or stray closing tag), and such
attempts are worth the most: a student that doubts its own step often closes it wrongly."""


def attempts_inputs(config: Config, run: Run, problems: Sequence[Problem]) -> dict[str, Any]:
    """The inputs that decide the attempts: student, problems, sampling settings."""
    source = config.attempts.source
    if source and not Path(source).is_file() and (manifest := run.manifest("attempts")):
        # deleted, or the run was moved: keep the digest of what was read
        read = manifest["inputs"].get("source", "")
    else:
        read = run.file_digest(str(Path(source).resolve())) if source else ""
    return {
        "problems": digest([p.model_dump() for p in problems]),
        "student": external_student_digest(config)
        or run.file_digest("sft/adapter/adapter_model.safetensors"),
        # not student.batch: each request has its own seed, and replacing attempts means paying for corrections again
        "sampling": digest([config.attempts.model_dump(exclude=_NOT_SAMPLING), config.seed]),
        "source": read,
        "prompts": prompts.digest("student_system", "student_solve", folder=config.prompts.folder),
    }


def external_student_digest(config: Config) -> str:
    """A digest of `attempts.student`: an endpoint's model and address, or a GGUF's bytes; "" if unset."""
    settings = config.attempts
    if settings.kind == "endpoint":
        return digest([settings.student, without_password(settings.api_base).rstrip("/")])
    path = Path(settings.student)
    if settings.kind == "trained" or not path.is_file():
        return ""
    return Run(path.parent).file_digest(path.name)


def endpoint_cost_usd(run: Run, stage: str) -> float:
    """Cost of the endpoint student's replies in this stage; 0 for a local student."""
    if not run.path(LEDGER).is_file():
        return 0.0
    with Ledger.reading(run.path(LEDGER)) as ledger:
        return ledger.totals(stage)["cost_usd"]


def write_attempts(
    config: Config,
    run: Run,
    *,
    problems: Sequence[Problem],
    student: Student | None,
    grader: Grader,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Sample `attempts.samples` attempts per problem, or import `attempts.source`; writes attempts.jsonl.

    Rows are written in blocks of `student.batch`. A resumed run keeps the complete blocks and samples the rest, so the
    file equals that of an uninterrupted run. An imported attempts.jsonl replaces the stage. Unusable rows of
    `attempts.source` go to dropped.jsonl with a reason. An endpoint gets all requests without a pause between blocks,
    and repeated requests are answered from the ledger. A failed call leaves an attempt with unknown outcome, which the
    next run requests again.
    """
    if needs_no_student(config, run) and not config.attempts.source:
        rows = read_imported_attempts(run, problems)
        return Report("attempts", count_outcomes(rows) | {"imported": len(rows)}, skipped=True)
    inputs, report = attempts_inputs(config, run, problems), Report("attempts")
    if manifest := run.done("attempts", inputs, "attempts.jsonl"):
        return Report.of(manifest)
    drops: list[Drop] = []
    with timed(report):
        if config.attempts.source:
            try:
                rows = import_attempts(Path(config.attempts.source), problems, grader, drops)
            finally:
                run.replace_drops(["attempts"], drops)
        else:
            rows = _sample(config, run, inputs, problems, student, grader, progress)
        run.replace("attempts.jsonl", rows)
    report.counts |= count_outcomes(rows)
    add_warning(report, progress, _unreadable_warning(config, rows))
    report.dropped = dict(Counter(drop.reason for drop in drops))
    report.cost_usd = endpoint_cost_usd(run, "attempts")
    unanswered = sum(map(call_failed, rows)) if config.attempts.kind == "endpoint" else 0
    # failed calls: this signature matches no inputs, so the next run requests them again
    run.sign(
        "attempts",
        {**inputs, "unanswered": unanswered} if unanswered else inputs,
        report,
        {"attempts.jsonl": len(rows)},
    )
    return report


def add_warning(report: Report, progress: Callable[..., None] | None, text: str) -> None:
    """Show a warning and keep it in the report; does nothing if `text` is empty."""
    if text:
        report.figures["warnings"] = [text]
        if progress is not None:
            progress(0, 0, warning=text)


def _unreadable_warning(config: Config, rows: Sequence[Attempt]) -> str:
    """A warning if most attempts cannot be parsed into steps, else an empty string."""
    replies = [row for row in rows if not call_failed(row)]
    fatal = (
        next((i.name for i in parse(row.trace).issues if i.name in FATAL_ISSUES), None) for row in replies
    )
    reasons = Counter(filter(None, fatal))
    if 2 * reasons.total() <= len(replies):
        return ""
    remedy = "train SFT for longer (sft.num_train_epochs), or raise attempts.max_tokens if they are cut off"
    if config.attempts.student or config.attempts.source:
        remedy = "they must follow prompts/student_system.txt: <Step1> .. </Step1> <Answer> .. </Answer>"
    reason = reasons.most_common(1)[0][0].replace("_", " ")
    return (
        f"{reasons.total()} of {len(replies)} attempts have no readable steps, most often: {reason}; {remedy}"
    )


def needs_no_student(config: Config, run: Run) -> bool:
    """Whether attempts are imported: from `attempts.source`, or as an attempts.jsonl put into the run folder."""
    return bool(config.attempts.source) or run.is_imported("attempts", "attempts.jsonl")


def count_outcomes(rows: Sequence[Attempt]) -> dict[str, int]:
    """The number of attempts, and of right, wrong and unknown ones among them."""
    return {
        "attempts": len(rows),
        "right": sum(row.correct is True for row in rows),
        "wrong": sum(row.correct is False for row in rows),
        "unknown": sum(row.correct is None for row in rows),
    }


def _sample(
    config: Config,
    run: Run,
    inputs: dict[str, Any],
    problems: Sequence[Problem],
    student: Student,
    grader: Grader,
    progress: Callable[[int, int], None] | None,
) -> list[Attempt]:
    jobs = [(problem, sample) for problem in problems for sample in range(config.attempts.samples)]
    size, endpoint = config.student.batch, config.attempts.kind == "endpoint"
    rows = _completed_rows(run, inputs, jobs, size, endpoint)
    batch = max(1, len(jobs) - len(rows)) if endpoint else size
    for start in range(len(rows), len(jobs), batch):
        pending = jobs[start : start + batch]
        requests = [
            Request(
                prompts.solve_messages(problem.question, config.prompts.folder),
                max_tokens=config.attempts.max_tokens,
                temperature=config.attempts.temperature,
                top_p=config.attempts.top_p,
                seed=int(digest([config.seed, problem.id, sample]), 16) % 2**31,
            )
            for problem, sample in pending
        ]
        for begin, block in group_into_blocks(student.generate(requests), len(pending), size):
            attempts = grade_replies(pending[begin : begin + size], block, grader)
            run.append("attempts.jsonl", attempts)
            rows += attempts
            if progress is not None:
                progress(len(rows), len(jobs))
    return rows


def group_into_blocks(replies: Iterable[Reply], count: int, size: int) -> Iterator[tuple[int, list[Reply]]]:
    """Yield (index of the first request, replies in request order) for each block of `size` once it is complete."""
    waiting, begin = defaultdict(list), 0
    for reply in replies:
        waiting[reply.index // size * size].append(reply)
        while begin < count and len(waiting[begin]) == min(size, count - begin):
            yield begin, sorted(waiting.pop(begin), key=lambda r: r.index)
            begin += size


def call_failed(attempt: Attempt) -> bool:
    """Whether the call for this attempt failed: there is no text, and the outcome is unknown."""
    return attempt.correct is None and not attempt.trace


def _completed_rows(
    run: Run, inputs: dict[str, Any], jobs: Sequence[tuple[Problem, int]], size: int, endpoint: bool
) -> list[Attempt]:
    """The complete blocks left by an interrupted run with the same inputs; for an endpoint, up to the first failed call."""
    if run.read_json("attempts.begun.json") != inputs:
        run.replace("attempts.jsonl", [])
        run.write_json("attempts.begun.json", inputs)
        return []
    rows = []
    for row, (problem, sample) in zip(run.rows("attempts.jsonl", Attempt, whole=False), jobs, strict=False):
        if (row.id, row.sample) != (problem.id, sample):  # earlier rows were damaged
            break
        rows.append(row)
    if endpoint:
        rows = list(takewhile(lambda row: not call_failed(row), rows))
    rows = rows[: len(rows) // size * size]
    run.replace("attempts.jsonl", rows)
    return rows


def grade_replies(
    block: Sequence[tuple[Problem, int]], replies: Sequence[Reply], grader: Grader
) -> list[Attempt]:
    """Turn replies into attempts graded against gold; a failed call leaves the outcome unknown."""
    answers = [answer_of(reply.text) for reply in replies]
    verdicts = grader.equal_many(
        (answer, problem.answer) for answer, (problem, _) in zip(answers, block, strict=True)
    )
    return [
        Attempt(
            id=problem.id,
            sample=sample,
            trace=reply.text,
            answer=answer,
            correct=None if reply.finish == "error" else verdict,
        )
        for (problem, sample), reply, answer, verdict in zip(block, replies, answers, verdicts, strict=True)
    ]


def deduplicate(attempts: Sequence[Attempt]) -> list[Attempt]:
    """The first attempt of each distinct text (steps and answer) per problem, in order."""
    first: dict[tuple[str, str], Attempt] = {}
    for attempt in attempts:
        first.setdefault((attempt.id, render(work_of(attempt.trace)) or attempt.trace), attempt)
    return list(first.values())
