"""Feedback from the chat as attempts: answers judged wrong are corrected by the teacher, right ones are confirmations."""

from collections import Counter
from collections.abc import Mapping, Sequence

from sclite import prompts
from sclite.config import Config
from sclite.data.attempts import find_fatal_issue
from sclite.data.problems import (
    OVERLAPS,
    SHARES,
    build_index,
    find_overlap,
    normalize_question,
    questions_to_avoid,
)
from sclite.grading.extract import answer_of
from sclite.grading.grader import Grader
from sclite.progress import Progress, no_progress
from sclite.records import FEEDBACK, FROM_FEEDBACK, Attempt, Drop, Feedback, Problem, from_feedback
from sclite.run import Report, Run, timed
from sclite.signature import digest, with_unanswered
from sclite.teacher.client import Job, Rejection, Teacher, count_unanswered, identity
from sclite.trace import ParsedTrace, parse


def write_feedback(
    config: Config,
    run: Run,
    *,
    teacher: Teacher,
    grader: Grader,
    fit: Sequence[Problem],
    progress: Progress = no_progress,
) -> Report:
    """Add the answers judged with /good and /bad to attempts.jsonl, and their questions to problems.jsonl.

    The first attempt and the final text are graded by the gold answer. An answer is dropped if the grade contradicts the
    user, or if its question overlaps the evaluation or `fit`, the problems for the threshold.
    """
    problems, attempts = run.read("problems.jsonl", Problem), run.read("attempts.jsonl", Attempt)
    by_question = {normalize_question(row.question): row for row in problems if not from_feedback(row)}
    judged = [*filter(from_feedback, problems), *filter(from_feedback, attempts)]
    sources = [config.eval.source, config.eval.subset, config.eval.split, config.problems.avoid]
    inputs: dict[str, object] = {
        "feedback": run.file_digest(FEEDBACK),
        "golds": digest([[row.id, row.question, row.answer] for row in by_question.values()]),
        "avoid": digest([sources, [row.id for row in fit]]),
        "teacher": digest(identity(config.teacher)),
        "rows": digest([row.model_dump() for row in judged]),
    }
    if manifest := run.done("feedback", inputs):
        return Report.of(manifest)
    report, drops, verdicts = Report("feedback"), list[Drop](), Counter[bool]()
    used, added = list[Problem](), list[Attempt]()
    with timed(report):
        for answers, gold in _find_golds(config, run, teacher, grader, fit, by_question, drops, progress):
            if isinstance(gold, Rejection):
                drops += [_drop(row, gold.reason, gold.text) for row in answers]
                continue
            texts = list[str]()
            for row in answers:
                if (right := grader.equal(answer_of(row.parsed), gold.answer)) is None:
                    drops.append(_drop(row, "grader_unknown", f"cannot be compared with {gold.answer}"))
                elif right is not row.good:
                    why = f"judged {'right' if row.good else 'wrong'}; the answer is {gold.answer}"
                    drops.append(_drop(row, "verdict_contradicts_the_answer", why))
                else:
                    verdicts[row.good] += 1
                    texts += [row.attempt, row.final]
            for text in dict.fromkeys(texts):
                answer = answer_of(parse(text))
                right = grader.equal(answer, gold.answer)
                # not a running number: if a verdict is removed, other corrections are not paid for again
                sample = int(digest(text)[:8], 16)
                added.append(Attempt(id=gold.id, sample=sample, trace=text, answer=answer, correct=right))
            used += [gold] if texts else []
        # first, because a resumed run of the attempts appends to them
        run.replace("problems.jsonl", [*used, *(row for row in problems if not from_feedback(row))])
        _replace_attempts(run, [*added, *(row for row in attempts if not from_feedback(row))])
        run.replace_drops("feedback", drops)
        if signed := run.manifest("problems"):
            now = signed["inputs"] | {"problems": run.file_digest("problems.jsonl")}
            run.sign("problems", now, Report.of(signed))
    report.counts = {"good": verdicts[True], "bad": verdicts[False]}
    report.dropped = dict(Counter(drop.reason for drop in drops))
    report.cost_usd = teacher.ledger.cost_usd("feedback")
    inputs["rows"] = digest([row.model_dump() for row in (*used, *added)])
    run.sign("feedback", with_unanswered(inputs, count_unanswered(report.dropped)), report)
    return report


def remove_orphans(run: Run) -> None:
    """Remove judged attempts whose problem is gone, for example after the user replaced problems.jsonl in the run."""
    known = {row.id for row in run.rows("problems.jsonl", Problem)}
    attempts = run.read("attempts.jsonl", Attempt)
    rows = [row for row in attempts if row.id in known or not from_feedback(row)]
    if len(rows) < len(attempts):
        again = "`sclite build-data --only corrections` adds them again"
        run.warn(f"problems.jsonl lacks problems of the chat feedback, which is now unused; {again}")
        _replace_attempts(run, rows)


def _replace_attempts(run: Run, attempts: Sequence[Attempt]) -> None:
    """Replace attempts.jsonl, and keep its stage done."""
    run.replace("attempts.jsonl", attempts)
    if signed := run.manifest("attempts"):
        run.sign("attempts", signed["inputs"], Report.of(signed), {"attempts.jsonl": len(attempts)})


def _find_golds(
    config: Config,
    run: Run,
    teacher: Teacher,
    grader: Grader,
    fit: Sequence[Problem],
    by_question: Mapping[str, Problem],
    drops: list[Drop],
    progress: Progress,
) -> list[tuple[list[Feedback], Problem | Rejection]]:
    """(the judged answers, the gold answer or why there is none) of each question.

    The gold answer is that of the run's problem with the same question, else an answer that the user judged good, else
    one that the teacher reaches twice. The last verdict on an answer counts; unusable answers go to `drops`.
    """
    threshold = ((f"{problem.id}, a problem of the threshold", problem.question) for problem in fit)
    avoid = build_index([*questions_to_avoid(config), *threshold])
    judged: dict[str, list[Feedback]] = {}
    for row in {(row.question, row.final): row for row in run.rows(FEEDBACK, Feedback)}.values():
        if overlap := find_overlap(row.question, avoid):
            drops.append(_drop(row, OVERLAPS, f"{SHARES} {overlap}"))
        elif issue := find_fatal_issue(row.parsed):
            drops.append(_drop(row, "attempt_not_readable", issue))
        else:
            judged.setdefault(normalize_question(row.question), []).append(row)
    golds: dict[str, Problem | Rejection] = {}
    for question, rows in judged.items():
        right = [row for row in rows if row.good]
        if question in by_question:
            golds[question] = by_question[question].model_copy(update={"id": _id(question)})
        elif right:
            answer = answer_of(right[-1].parsed) or ""
            golds[question] = Problem(id=_id(question), question=right[-1].question, answer=answer)
    # the teacher solves the others, twice: its answers must agree
    unknown = {question: rows[0].question for question, rows in judged.items() if question not in golds}

    def ask(question: str, sample: int) -> Job[ParsedTrace]:
        messages = prompts.solve_messages(unknown[question], config.prompts.folder)
        # `parse` rejects nothing: an unreadable solution is not requested again
        return Job(question, lambda _: messages, parse, sample)

    jobs = [ask(question, sample) for question in unknown for sample in range(2)]
    solutions: dict[tuple[str, int], ParsedTrace] = {}
    for done, result in enumerate(teacher.ask_after_pilot(jobs, len(jobs), "feedback"), 1):
        if result.rejection is not None:
            golds[result.id] = result.rejection
        elif result.made is not None:
            solutions[result.id, result.sample] = result.made
        progress(done, len(jobs), teacher.ledger.spent_usd)
    for question in unknown.keys() - golds.keys():  # without the rejection of a reply
        first, second = (solutions[question, sample] for sample in range(2))
        gold, other = first.trace.answer, second.trace.answer
        if gold is None or first.issues or second.issues:
            golds[question] = Rejection("no_gold_answer", "the teacher's solution cannot be read")
        elif not grader.equal(other, gold):
            golds[question] = Rejection("no_gold_answer", f"the teacher answers {gold} and {other}")
        else:
            problem = {"question": unknown[question], "answer": gold, "solution": first.text}
            golds[question] = Problem(id=_id(question), **problem)
    return [(rows, golds[question]) for question, rows in judged.items()]


def _id(question: str) -> str:
    return FROM_FEEDBACK + digest(normalize_question(question))


def _drop(row: Feedback, reason: str, detail: str) -> Drop:
    return Drop(stage="feedback", id=_id(row.question), reason=reason, detail=detail, raw=row.final)
