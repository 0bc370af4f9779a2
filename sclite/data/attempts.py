"""A student's attempts at problems that SFT has not seen: sampled in fixed blocks, graded, appended as they come.

The student is the one that is trained, unless `attempts.student` names a GGUF or an endpoint.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sclite import prompts
from sclite.config import Config, without_password
from sclite.data.imported import adopt_attempts, bring
from sclite.grading.extract import answer_of
from sclite.grading.worker import Grader
from sclite.records import Attempt, Drop, Problem
from sclite.run import Report, Run, timed
from sclite.signature import digest
from sclite.student.base import Reply, Request, Student
from sclite.teacher.ledger import FILE as LEDGER
from sclite.teacher.ledger import Ledger
from sclite.trace import parse, render, work_of

STAGE = "attempts"
FILE = "attempts.jsonl"


_NOT_SAMPLING = {"reviews", "confirmation_share", "student", "api_base", "concurrency", "price"}


def inputs_of(config: Config, run: Run, problems: Sequence[Problem]) -> dict[str, Any]:
    """What decides the attempts: the student, the problems, how they are sampled."""
    source = config.attempts.source
    if source and not Path(source).is_file() and (manifest := run.manifest(STAGE)):
        read = manifest["inputs"].get("source", "")  # gone, or the run was moved: what was read of it counts
    else:
        read = run.file_digest(str(Path(source).resolve())) if source else ""
    return {
        "problems": digest([p.model_dump() for p in problems]),
        "student": other_student(config) or run.file_digest("sft/adapter/adapter_model.safetensors"),
        # not student.batch: each request has its own seed, and replacing attempts means paying for corrections again
        "sampling": digest([config.attempts.model_dump(exclude=_NOT_SAMPLING), config.seed]),
        "source": read,
        "prompts": prompts.digest("student_system", "student_solve", folder=config.prompts.folder),
    }


def other_student(config: Config) -> str:
    """A signature of who `attempts.student` names: an endpoint's model and address, a GGUF's bytes; "" for nobody."""
    settings = config.attempts
    if settings.kind == "endpoint":
        return digest([settings.student, without_password(settings.api_base).rstrip("/")])
    path = Path(settings.student)
    if settings.kind == "trained" or not path.is_file():
        return ""
    return Run(path.parent).file_digest(path.name)


def cost_usd(run: Run, stage: str) -> float:
    """What the replies of a student behind an endpoint have cost in this stage; 0 for one that runs here."""
    if not run.path(LEDGER).is_file():
        return 0.0
    with Ledger.reading(run.path(LEDGER)) as ledger:
        return ledger.totals(stage)["cost_usd"]


def sample_attempts(
    config: Config,
    run: Run,
    *,
    problems: Sequence[Problem],
    student: Student | None,
    grader: Grader,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Let the student solve each problem `attempts.samples` times, or read `attempts.source`; writes attempts.jsonl.

    Rows come in blocks of `student.batch`; after a kill whole blocks are kept, a broken one is sampled again, so the
    file is the same as that of an unbroken run. An attempts.jsonl that no such stage wrote takes its place. Rows of
    `attempts.source` that cannot be used stand in dropped.jsonl with their reason. An endpoint is asked without a pause
    between blocks, and what it has said before comes from the ledger. A call to it that failed leaves an attempt of
    unknown outcome, and the next start asks it again.
    """
    if needs_no_student(config, run) and not config.attempts.source:
        rows = adopt_attempts(run, problems)
        return Report(STAGE, count(rows) | {"imported": len(rows)}, skipped=True)
    inputs, report = inputs_of(config, run, problems), Report(STAGE)
    if manifest := run.done(STAGE, inputs, FILE):
        return Report.of(manifest)
    drops: list[Drop] = []
    with timed(report):
        if config.attempts.source:
            try:
                rows = bring(Path(config.attempts.source), problems, grader, drops)
            finally:
                run.replace_drops([STAGE], drops)
        else:
            rows = _sample(config, run, inputs, problems, student, grader, progress)
        run.replace(FILE, rows)
    report.counts |= count(rows)
    warn(report, progress, _unreadable(config, rows))
    report.dropped = dict(Counter(drop.reason for drop in drops))
    report.cost_usd = cost_usd(run, STAGE)
    unanswered = sum(map(failed, rows)) if config.attempts.kind == "endpoint" else 0
    # a network fault is no verdict on a row: the signature then fits no inputs, and the next call asks again
    run.sign(STAGE, {**inputs, "unanswered": unanswered} if unanswered else inputs, report, {FILE: len(rows)})
    return report


UNCLEAR = ("no_steps", "no_answer", "empty_step", "wrong_step_number", "step_after_the_end")
"""Faults that leave open which steps there are. Others (a closer that is missing or strays) are fixed in reading, and such
an attempt is worth the most: a student that doubts its own step often closes it wrongly."""


def warn(report: Report, progress: Callable[..., None] | None, text: str) -> None:
    """Show a warning, unless it is empty, and keep it in the report."""
    if text:
        report.figures["warnings"] = [text]
        if progress is not None:
            progress(0, 0, warning=text)


def _unreadable(config: Config, rows: Sequence[Attempt]) -> str:
    """A warning where most attempts have no steps that can be told from each other; else empty."""
    said = [row for row in rows if not failed(row)]
    issues = [next((f.name for f in parse(row.trace).issues if f.name in UNCLEAR), None) for row in said]
    common = Counter(filter(None, issues)).most_common(1)
    unreadable = sum(error is not None for error in issues)
    if 2 * unreadable <= len(said):
        return ""
    remedy = (
        "train SFT for longer (sft.num_train_epochs), or raise attempts.max_tokens where they are cut off"
    )
    if config.attempts.student or config.attempts.source:
        remedy = "they need the form of prompts/student_system.txt: <Step1> .. </Step1> <Answer> .. </Answer>"
    reason = common[0][0].replace("_", " ")
    return f"{unreadable} of {len(said)} attempts cannot be read as steps, most often: {reason}; {remedy}"


def needs_no_student(config: Config, run: Run) -> bool:
    """Whether attempts are brought along: in a file that the configuration names, or as the run's own attempts.jsonl."""
    return bool(config.attempts.source) or run.is_imported(STAGE, FILE)


def count(rows: Sequence[Attempt]) -> dict[str, int]:
    """How many attempts there are, right, wrong, and of unknown outcome."""
    return {
        "attempts": len(rows),
        "right": sum(row.correct is True for row in rows),
        "wrong": sum(row.correct is False for row in rows),
        "unknown": sum(row.correct is None for row in rows),
    }


def _sample(config, run, inputs, problems, student, grader, progress) -> list[Attempt]:
    jobs = [(problem, sample) for problem in problems for sample in range(config.attempts.samples)]
    size, endpoint = config.student.batch, config.attempts.kind == "endpoint"
    rows = _kept(run, inputs, jobs, size, complete=endpoint)
    at_once = max(1, len(jobs) - len(rows)) if endpoint else size
    for start in range(len(rows), len(jobs), at_once):
        asked = jobs[start : start + at_once]
        replies = student.generate([_request(problem, sample, config) for problem, sample in asked])
        for begin, block in in_blocks(replies, len(asked), size):
            found = graded(asked[begin : begin + size], block, grader)
            run.append(FILE, found)
            rows += found
            if progress is not None:
                progress(len(rows), len(jobs))
    return rows


def in_blocks(replies: Iterable[Reply], count: int, size: int) -> Iterator[tuple[int, list[Reply]]]:
    """(number of its first request, `size` replies in the order of their requests), each block once it is whole."""
    waiting, begin = defaultdict(list), 0
    for reply in replies:
        waiting[reply.index // size * size].append(reply)
        while begin < count and len(waiting[begin]) == min(size, count - begin):
            yield begin, sorted(waiting.pop(begin), key=lambda r: r.index)
            begin += size


def failed(attempt: Attempt) -> bool:
    """Whether the call for this attempt failed, so that nothing was said and nothing is known."""
    return attempt.correct is None and not attempt.trace


def _kept(
    run: Run, inputs: dict[str, Any], jobs: Sequence[tuple[Problem, int]], size: int, complete: bool
) -> list[Attempt]:
    """The whole blocks that an interrupted run with the same inputs has left; `complete`: up to the first failed call."""
    if run.read_json("attempts.begun.json") != inputs:
        run.replace(FILE, [])
        run.write_json("attempts.begun.json", inputs)
        return []
    rows = []
    for row, (problem, sample) in zip(run.rows(FILE, Attempt, whole=False), jobs, strict=False):
        if (row.id, row.sample) != (problem.id, sample):  # rows before it were damaged
            break
        rows.append(row)
    if complete:
        rows = rows[: next((i for i, row in enumerate(rows) if failed(row)), len(rows))]
    rows = rows[: len(rows) // size * size]
    run.replace(FILE, rows)
    return rows


def _request(problem: Problem, sample: int, config: Config) -> Request:
    return Request(
        prompts.solve_messages(problem.question, config.prompts.folder),
        max_tokens=config.attempts.max_tokens,
        temperature=config.attempts.temperature,
        top_p=config.attempts.top_p,
        seed=int(digest([config.seed, problem.id, sample]), 16) % 2**31,
    )


def graded(block: Sequence[tuple[Problem, int]], replies: Sequence[Reply], grader: Grader) -> list[Attempt]:
    """Replies as attempts, each with its answer compared to gold; a failed call leaves the outcome unknown."""
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


def distinct(attempts: Sequence[Attempt]) -> list[Attempt]:
    """The attempts in their order, without those that say the same about a problem as an earlier one, steps and answer."""
    seen: set[tuple[str, str]] = set()
    kept = []
    for attempt in attempts:
        said = attempt.id, render(work_of(attempt.trace)) or attempt.trace
        if said not in seen:
            seen.add(said)
            kept.append(attempt)
    return kept
