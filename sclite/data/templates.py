"""Stage 1's data: the teacher turns each gold solution into a thought trace, which is kept only if it holds (METHOD 3)."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import lru_cache
from typing import Any

from sclite import prompts, trace
from sclite.config import Config
from sclite.data.problems import divide, gather_problems
from sclite.errors import DataError, UsageError
from sclite.grading.worker import Grader
from sclite.records import Drop, Problem, Template
from sclite.run import Report, Run, timed
from sclite.signature import digest_rows
from sclite.teacher.client import Job, Rejection, Result, Teacher, count_unanswered, identity
from sclite.teacher.forecast import CHARACTERS_PER_TOKEN, Forecast, ask_after_pilot, forecast

STAGE, FILE = "templates", "templates.jsonl"
BEGUN = ".templates.json"  # what the rows of an unfinished file are made from
Progress = Callable[[int, int, float], None]
"""(done, total, spent_usd) after each row."""

_GIVEN = r"(?:given|provided|supplied|official|model|reference|gold(?:en)?|ground[- ]truth)"
_NUMBER = r"\$?\d+(?:[.,/]\d+)*\$?\s*"
_MIXTURE = rf"\s+set\b|\s+of\s+{_NUMBER}(?:\\?%|[a-z])|(?:\s+\w+){{1,4}}\s+{_NUMBER}(?:\\?%|percent)"
"""What follows where the word means a set of numbers or a liquid: `the given solution of 2 litres`, `contains 20%`."""
_MENTIONS = re.compile(
    rf"\b(?:the|this|that|your)\s+{_GIVEN}\s+(?:(?:written|worked|final)\s+)?(?:answers?\b|solutions?\b(?!{_MIXTURE}))"
    r"|\b(?:reference|gold(?:en)?|ground[- ]truth)[- ](?:solution|answer)s?\b"
    r"|\b(?:the|this|your)\s+(?:solution|answer)\s+(?:that\s+)?(?:(?:was|is|has\s+been)\s+(?:given|provided|supplied)"
    r"|(?:you|I\s+was|we\s+were)\s+(?:gave|given)|(?:given|provided|shown)?\s*above)\b(?!\s+by)",
    re.I,
)


def build_templates(
    settings: Config,
    run: Run,
    *,
    teacher: Teacher,
    grader: Grader,
    problems: Sequence[Problem] | None = None,
    fresh: bool = False,
    confirm: Callable[[Forecast], bool] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Write templates.jsonl: one checked thought trace for each problem of stage 1, or for each of `problems`.

    What is left out stands in dropped.jsonl with its reason and the last reply. Unfinished work is taken up again, and
    nothing happens where the stage was finished from the same inputs. A templates.jsonl that no such stage wrote takes
    its place. `confirm` decides after a few rows whether the rest is worth its price. Raises UsageFault where rows by another teacher or prompt lie there (`fresh` makes them anew), DataFault
    where not one template came out.
    """
    report = Report(STAGE)
    with timed(report):
        if is_imported(run):
            return _adopt(run, report)
        if problems is None:
            problems = divide(settings, gather_problems(settings, run))[0]
        inputs = inputs_of(settings, problems)
        manifest = run.done(STAGE, inputs, FILE)
        if manifest is not None and not fresh:
            return Report.of(manifest)
        kept = _kept(run, inputs, problems, fresh)
        drops = _ask(settings, run, teacher, grader, problems, kept, _basis(inputs), confirm, progress)
        _finish(run, report, problems, drops, teacher)
    unanswered = count_unanswered(report.dropped)
    # the signature then fits no inputs, and the next call asks again
    signed = {**inputs, "unanswered": unanswered} if unanswered else inputs
    run.sign(STAGE, signed, report, {FILE: len(problems) - len(drops)})
    return report


def forecast_templates(
    settings: Config, run: Run, *, teacher: Teacher, grader: Grader, problems: Sequence[Problem]
) -> dict[str, Any]:
    """What build_templates would send first, and what it would cost; sends and writes nothing."""
    there = {row.id for row in run.rows(FILE, Template, whole=False)}
    missing = [problem for problem in problems if problem.id not in there]
    solutions = sum(len(problem.solution or problem.answer) for problem in missing)
    guess = 120 + 1.5 * solutions / CHARACTERS_PER_TOKEN / max(1, len(missing))
    return forecast(teacher, _jobs(settings, iter(missing), grader), guess, STAGE)


def check_template(reply: str, problem: Problem, grader: Grader) -> Rejection | None:
    """What is wrong with a teacher's reply as a template for this problem; None where nothing is."""
    parsed, text = _read(reply)
    if parsed.issues:
        named = "; ".join(str(error) for error in parsed.issues[:3])
        return Rejection(parsed.issues[0].name, f"its tags are not in order: {named}")
    found = parsed.trace
    if not_text := broken_text(text):
        return not_text
    if trace.first_corrected(found) is not None:
        return Rejection(
            "correction_in_template", "it has a <Cause> or <Correction>, which do not belong here"
        )
    if found.generalized is None:
        return Rejection("no_generalized", "<Generalized> is missing")
    mention = mentions_the_solution(text)
    if mention:
        return Rejection("leak", f'it says "{mention}", as if a solution had been given')
    equal = grader.equal(found.answer, problem.answer)
    if equal is None:
        return Rejection("grader_unknown", f"its answer cannot be compared, write exactly: {problem.answer}")
    if not equal:
        return Rejection("wrong_answer", f"its answer is {found.answer}, not {problem.answer}")
    return None


def broken_text(text: str) -> Rejection | None:
    """A flaw where characters were lost on the way, which reading has replaced by U+FFFD."""
    return Rejection("broken_text", "it has characters that are no text") if "\ufffd" in text else None


@lru_cache(maxsize=512)  # a reply is read for its check, and soon after for its row
def _read(reply: str) -> tuple[trace.Parsed, str]:
    """A reply as a trace, and its canonical text where it has no faults."""
    parsed = trace.parse(reply)
    return parsed, "" if parsed.issues else trace.render(parsed.trace)


def mentions_the_solution(text: str) -> str | None:
    """The words by which a text betrays that a solution was given; None where there are none."""
    found = _MENTIONS.search(text)
    return found[0] if found else None


# -- the stage's parts ---------------------------------------------------------------------------------------------


def inputs_of(settings: Config, problems: Sequence[Problem]) -> dict[str, Any]:
    """What decides the templates of these problems."""
    named = ["teacher_system", "teacher_template"]
    named += ["inspector_template"] if settings.teacher.inspector else []
    return {
        "problems": digest_rows(problems),
        "prompts": prompts.digest(*named, folder=settings.prompts.folder),
        "teacher": identity(settings.teacher),
        "repairs": settings.teacher.repairs,
    }


def _basis(inputs: dict[str, Any]) -> dict[str, Any]:
    """The part of the inputs that all rows have in common."""
    return {"prompts": inputs["prompts"], "teacher": inputs["teacher"]}


def is_imported(run: Run) -> bool:
    """Whether templates.jsonl was put into the run by the user."""
    return not run.path(BEGUN).is_file() and any(True for _ in run.rows(FILE, Template))


def _adopt(run: Run, report: Report) -> Report:
    rows = run.read(FILE, Template)
    for number, row in enumerate(rows, 1):
        issues = trace.parse(row.trace).issues
        if issues:
            raise DataError(f"{run.path(FILE)}, row {number} ({row.id}): {issues[0]}", "mend or remove it")
    report.counts = {"templates": len(rows), "imported": len(rows)}
    report.skipped = True
    return report


def _kept(run: Run, inputs: dict[str, Any], problems: Sequence[Problem], fresh: bool) -> set[str]:
    """The ids of the rows that an earlier call left and that still hold; the others are taken out."""
    basis, before = _basis(inputs), run.read_json(BEGUN, dict[str, Any])
    if fresh or (before is None and run.path(BEGUN).is_file()):  # damaged: the ledger has what was paid for
        run.replace(FILE, [])
    elif before != basis and any(True for _ in run.rows(FILE, Template, whole=False)):
        changed = [
            f"{name} {before.get(name)} -> {basis[name]}" for name in basis if before.get(name) != basis[name]
        ]
        raise UsageError(
            f"{run.path(FILE)} was made otherwise: {'; '.join(changed)}",
            "--fresh makes it anew (and pays for it), or put the old setting back",
        )
    asked = {problem.id: problem for problem in problems}
    kept = {
        row.id: None
        for row in run.rows(FILE, Template, whole=False)
        if row.id in asked and (row.question, row.answer) == (asked[row.id].question, asked[row.id].answer)
    }
    run.reorder(FILE, Template, kept)
    run.replace_drops([STAGE], [])
    return set(kept)


def _ask(settings, run, teacher, grader, problems, kept, basis, confirm, progress) -> dict[str, Drop]:
    """Ask for what is missing; each row is in its file before the next is looked at. Gives the drops by id."""
    under_way: dict[str, Problem] = {}
    drops: dict[str, Drop] = {}
    done, add = len(kept), None
    waiting = (under_way.setdefault(p.id, p) for p in problems if p.id not in kept)
    jobs = _jobs(settings, waiting, grader)
    if progress is not None:
        progress(done, len(problems), teacher.ledger.spent_usd)
    with ExitStack() as open_files:
        for result in ask_after_pilot(teacher, jobs, len(problems) - len(kept), STAGE, confirm):
            problem = under_way.pop(result.id)
            if result.text is None:
                drops[result.id] = _drop(result)
                run.append("dropped.jsonl", [drops[result.id]])
            else:
                if add is None:
                    run.write_json(BEGUN, basis)
                    add = open_files.enter_context(run.appending(FILE))
                add([_template(problem, result)])
            done += 1
            if progress is not None:
                progress(done, len(problems), teacher.ledger.spent_usd)
    return drops


def _jobs(settings: Config, problems: Iterator[Problem], grader: Grader) -> Iterator[Job]:
    folder = settings.prompts.folder
    for problem in problems:
        solution = problem.solution or problem.answer

        def messages(error: str, problem: Problem = problem, solution: str = solution):
            return prompts.template_messages(problem.question, solution, problem.answer, error, folder)

        def check(reply: str, problem: Problem = problem) -> Rejection | None:
            return check_template(reply, problem, grader)

        def inspect(reply: str, problem: Problem = problem, solution: str = solution):
            return prompts.inspection_messages(
                "inspector_template", problem.question, solution, problem.answer, reply, folder
            )

        yield Job(problem.id, messages, check, inspect=inspect)


def _template(problem: Problem, result: Result) -> Template:
    given = {"id": problem.id, "question": problem.question, "answer": problem.answer}
    return Template(**given, trace=_read(result.text)[1], requests=result.requests)


def _drop(result: Result) -> Drop:
    return Drop(
        stage=STAGE,
        id=result.id,
        reason=result.rejection.reason,
        detail=result.rejection.text,
        raw=result.raw,
    )


def _finish(
    run: Run, report: Report, problems: Sequence[Problem], drops: dict[str, Drop], teacher: Teacher
) -> None:
    """Put both files into the order of the problems and fill in the report."""
    run.reorder(FILE, Template, (problem.id for problem in problems))
    run.replace_drops([STAGE], [drops[problem.id] for problem in problems if problem.id in drops])
    requests = [row.requests for row in run.rows(FILE, Template)]
    totals = teacher.ledger.totals(STAGE)
    report.counts = {"problems": len(problems), "templates": len(requests)}
    report.dropped = dict(Counter(drop.reason for drop in drops.values()).most_common())
    report.cost_usd = round(totals.pop("cost_usd"), 6)
    report.figures = {**totals, "repaired": sum(number > 1 for number in requests)}
    if not requests:
        why = ", ".join(f"{count} {reason}" for reason, count in report.dropped.items()) or "no problems"
        first = next((drop.detail for drop in drops.values()), "")
        raise DataError(
            f"no template came out of {len(problems)} problems: {why}; the first: {first}",
            f"see {run.path('dropped.jsonl')}",
        )
