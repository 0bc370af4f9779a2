"""Thought templates: the teacher turns each gold solution into a trace, which is kept if it passes the checks."""

import html
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain

from sclite import prompts
from sclite.config import Config
from sclite.data.imported import reject_row
from sclite.errors import DataError
from sclite.grading.grader import Grader
from sclite.progress import Progress, no_progress
from sclite.records import Drop, Problem, Template
from sclite.run import Report, Run, timed
from sclite.signature import digest_rows, with_unanswered
from sclite.teacher.client import (
    Job,
    Rejection,
    Teacher,
    basis_of,
    count_unanswered,
    identity,
    refuse_other_basis,
)
from sclite.trace import ParsedTrace, Trace, first_corrected, parse, render

_GIVEN = r"(?:given|provided|supplied|official|model|reference|gold(?:en)?|ground[- ]truth)"
LEAK = re.compile(
    rf"\b(?:the|this|that|your)\s+{_GIVEN}\s+(?:answer\b(?! (?:choice|option))|solution\b(?! (?:set|of)\b))"
    r"|\b(?:reference|gold(?:en)?|ground[- ]truth)[- ](?:solution|answer)s?\b|\b(?:answer|solution)\s+key\b"
    r"|\b(?:solution|answer)\s+(?:that\s+)?(?:(?:was|is)\s+)?(?:given|provided|shown)?\s*above\b"
    r"|\bthe\s+expected\s+answer\b|\bthe\s+solution\s+(?:says|states)\b|\baccording\s+to\s+the\s+solution\b(?! (?:set|of)\b)",
    re.I,
)
"""Words that reveal that the teacher saw a solution."""
BEGUN = "templates.begun.json"


def templates_inputs(config: Config, problems: Sequence[Problem]) -> dict[str, object]:
    """The inputs that decide the templates of these problems."""
    used = ["teacher_system", "teacher_template"]
    used += ["inspector_template"] if config.teacher.inspector else []
    return {
        "problems": digest_rows(problems),
        "prompts": prompts.digest_prompts(*used, folder=config.prompts.folder),
        "teacher": identity(config.teacher),
        "repairs": config.teacher.repairs,
    }


def write_templates(
    config: Config,
    run: Run,
    *,
    teacher: Teacher,
    grader: Grader,
    problems: Sequence[Problem],
    fresh: bool = False,
    progress: Progress = no_progress,
) -> Report:
    """Write templates.jsonl: one checked trace for each problem; resumes unfinished work.

    Raises UsageError if existing rows come from another teacher or prompt (`fresh` discards them), DataError if no
    template passes.
    """
    report = Report("templates")
    if run.is_imported("templates", "templates.jsonl"):
        rows = run.read("templates.jsonl", Template)
        for number, row in enumerate(rows, 1):
            if issues := row.parsed.issues:
                reject_row(run, "templates.jsonl", number, row, str(issues[0]), "fix or remove it")
        report.counts, report.skipped = {"templates": len(rows), "imported": len(rows)}, True
        return report
    inputs = templates_inputs(config, problems)
    manifest = run.done("templates", inputs, "templates.jsonl")
    if manifest is not None and not fresh:
        return Report.of(manifest)
    with timed(report):
        # a larger token budget adds rows and leaves the existing ones unchanged
        basis = basis_of(config.teacher, inputs["prompts"])
        drops = _request_missing(config, run, teacher, grader, problems, basis, fresh, progress)
        run.reorder("templates.jsonl", Template, (problem.id for problem in problems))
        run.replace_drops("templates", [drops[problem.id] for problem in problems if problem.id in drops])
        requests = [row.requests for row in run.rows("templates.jsonl", Template)]
        totals = teacher.ledger.totals("templates")
        report.counts = {"problems": len(problems), "templates": len(requests)}
        report.dropped = dict(Counter(drop.reason for drop in drops.values()).most_common())
        report.cost_usd = teacher.ledger.cost_usd("templates")
        del totals["cost_usd"]
        report.figures = {**totals, "repaired": sum(number > 1 for number in requests)}
        if not requests:
            why = ", ".join(f"{count} {reason}" for reason, count in report.dropped.items()) or "no problems"
            first = next((drop.detail for drop in drops.values()), "")
            message = f"none of the {len(problems)} problems yielded a template: {why}; the first: {first}"
            raise DataError(message, f"see {run.path('dropped.jsonl')}")
    signed = with_unanswered(inputs, count_unanswered(report.dropped))
    run.sign("templates", signed, report, {"templates.jsonl": len(requests)})
    return report


def check_template(reply: str, problem: Problem, grader: Grader) -> Trace | Rejection:
    """The template in a teacher's reply for this problem, or why there is none."""
    parsed = parse_reply(reply)
    if parsed.issues:
        named = "; ".join(str(error) for error in parsed.issues[:3])
        return Rejection(parsed.issues[0].name, f"its tags are not in order: {named}")
    found, text = parsed.trace, render(parsed.trace)
    if "\ufffd" in text:
        return Rejection("broken_text", "it contains broken characters")
    if first_corrected(found) is not None:
        why = "it has a <Cause> or <Correction>, which do not belong here"
        return Rejection("correction_in_template", why)
    if found.generalized is None:
        return Rejection("no_generalized", "<Generalized> is missing")
    if leak := LEAK.search(text):
        return Rejection("leak", f'it says "{leak[0]}", as if a solution had been given')
    equal = grader.equal(found.answer, problem.answer)
    if equal is None:
        return Rejection("grader_unknown", f"its answer cannot be compared, write exactly: {problem.answer}")
    if not equal:
        return Rejection("wrong_answer", f"its answer is {found.answer}, not {problem.answer}")
    return found


def parse_reply(text: str) -> ParsedTrace:
    """Like `parse`, for a teacher that escapes < and & between the tags as in XML."""
    return parse(re.sub("&(?:lt|gt|amp);", lambda entity: html.unescape(entity[0]), text))


def _request_missing(
    config: Config,
    run: Run,
    teacher: Teacher,
    grader: Grader,
    problems: Sequence[Problem],
    basis: dict[str, object],
    fresh: bool,
    progress: Progress,
) -> dict[str, Drop]:
    """Request the templates that the run lacks, writing each row before the next result is handled; the drops by id.

    Rows of other or changed problems are removed, and with `fresh` all. Rows from another `basis` (prompts, teacher) are
    an error without it.
    """
    rows = [] if fresh else list(run.rows("templates.jsonl", Template, whole=False))
    if rows:
        trained = run.path("sft/adapter").is_dir()
        keep = ". To keep them and continue with the corrections, add --only corrections" if trained else ""
        refuse_other_basis(run.read_json(BEGUN, dict[str, object]), basis, run.path("templates.jsonl"), keep)
    wanted = {problem.id: (problem.question, problem.answer) for problem in problems}
    kept = {row.id: None for row in rows if wanted.get(row.id) == (row.question, row.answer)}  # in order
    # the manifest would list rows that are removed
    run.path("done/templates.json").unlink(missing_ok=True)
    missing = {problem.id: problem for problem in problems if problem.id not in kept}
    drops: dict[str, Drop] = {}
    progress(len(kept), len(problems), teacher.ledger.spent_usd)
    jobs = template_jobs(config, missing.values(), grader)
    results = teacher.ask_after_pilot(jobs, len(missing), "templates")
    first = next(results, None)  # an error if the teacher cannot be reached: the rows stay as they are
    run.reorder("templates.jsonl", Template, kept)
    if first is not None:
        run.write_json(BEGUN, basis)
        results = chain([first], results)
    for done, result in enumerate(results, len(kept) + 1):
        if result.rejection is not None:
            why = {"reason": result.rejection.reason, "detail": result.rejection.text, "raw": result.raw}
            drops[result.id] = Drop(stage="templates", id=result.id, **why)
        elif result.made is not None:
            problem = missing[result.id].model_dump(include={"id", "question", "answer"})
            run.append(
                "templates.jsonl", [Template(**problem, trace=render(result.made), requests=result.requests)]
            )
        progress(done, len(problems), teacher.ledger.spent_usd)
    return drops


def template_jobs(config: Config, problems: Iterable[Problem], grader: Grader) -> Iterator[Job[Trace]]:
    """One teacher job per problem."""
    folder = config.prompts.folder
    for problem in problems:
        gold = problem.question, problem.solution or problem.answer, problem.answer
        yield Job(
            problem.id,
            partial(prompts.teacher_messages, *gold, folder=folder),
            partial(check_template, problem=problem, grader=grader),
            inspect=partial(prompts.inspection_messages, "inspector_template", *gold, folder=folder),
        )
