"""Thought templates: the teacher turns each gold solution into a trace, which is kept if it passes the checks."""

import html
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial

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
_NUMBER = r"\$?\d+(?:[.,/]\d+)*\$?\s*"
_MIXTURE = rf"\s+set\b|\s+of\s+{_NUMBER}(?:\\?%|[a-z])|(?:\s+\w+){{1,4}}\s+{_NUMBER}(?:\\?%|percent)"
"""What follows a `solution` that is a solution set or a liquid: `the given solution of 2 litres`, `contains 20%`."""
_MENTIONS = re.compile(
    rf"\b(?:the|this|that|your)\s+{_GIVEN}\s+(?:(?:written|worked|final)\s+)?(?:answers?\b(?! (?:choice|option))|solutions?\b(?!{_MIXTURE}))"
    r"|\b(?:reference|gold(?:en)?|ground[- ]truth)[- ](?:solution|answer)s?\b"
    r"|\b(?:the|this|your)\s+(?:solution|answer)\s+(?:that\s+)?(?:(?:was|is|has\s+been)\s+(?:given|provided|supplied)"
    r"|(?:you|I\s+was|we\s+were)\s+(?:gave|given)|(?:given|provided|shown)?\s*above)\b(?!\s+(?:by|in|as)\b)"
    rf"|\b(?:answer|solution)\s+key\b|\baccording\s+to\s+the\s+(?:answer\b(?! (?:choice|option))|solution\b(?!{_MIXTURE}))"
    r"|\bthe\s+(?:expected|intended|target)\s+answer\b|\bthe\s+solution\s+(?:says|states)\b",
    re.I,
)


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
    with timed(report):
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
            hint = f"see {run.path('dropped.jsonl')}"
            raise DataError(message, hint)
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
    if leak := find_leak(text):
        return Rejection("leak", f'it says "{leak}", as if a solution had been given')
    equal = grader.equal(found.answer, problem.answer)
    if equal is None:
        return Rejection("grader_unknown", f"its answer cannot be compared, write exactly: {problem.answer}")
    if not equal:
        return Rejection("wrong_answer", f"its answer is {found.answer}, not {problem.answer}")
    return found


def parse_reply(text: str) -> ParsedTrace:
    """Like `parse`, for a teacher that escapes < and & between the tags as in XML."""
    return parse(re.sub("&(?:lt|gt|amp);", lambda entity: html.unescape(entity[0]), text))


def find_leak(text: str) -> str | None:
    """The words that reveal that the teacher saw a solution, or None."""
    found = _MENTIONS.search(text)
    return found[0] if found else None


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

    Rows of other or changed problems are removed. Rows from another `basis` (prompts, teacher) are an error without `fresh`.
    """
    before = run.read_json("templates.begun.json", dict[str, object])
    # also if the basis is damaged: paid replies are in the ledger
    again = fresh or (before is None and run.path("templates.begun.json").is_file())
    if not again and any(True for _ in run.rows("templates.jsonl", Template, whole=False)):
        trained = run.path("sft/adapter").is_dir()
        keep = ". To keep them and continue with the corrections, add --only corrections" if trained else ""
        refuse_other_basis(before, basis, run.path("templates.jsonl"), keep)
    by_id = {problem.id: problem for problem in problems}
    wanted = {problem.id: (problem.question, problem.answer) for problem in problems}
    rows = run.rows("templates.jsonl", Template, whole=False)
    kept = {row.id: None for row in rows if wanted.get(row.id) == (row.question, row.answer)}  # in order
    # the manifest would list rows that are removed
    run.path("done/templates.json").unlink(missing_ok=True)
    if again:
        kept.clear()
    else:
        run.reorder("templates.jsonl", Template, kept)
    run.replace_drops("templates", [])
    missing = [problem for problem in problems if problem.id not in kept]
    drops: dict[str, Drop] = {}
    add, total = None, len(problems)
    progress(len(kept), total, teacher.ledger.spent_usd)
    results = teacher.ask_after_pilot(template_jobs(config, missing, grader), len(missing), "templates")
    with ExitStack() as open_files:
        for done, result in enumerate(results, len(kept) + 1):
            if result.rejection is not None:
                why = {"reason": result.rejection.reason, "detail": result.rejection.text, "raw": result.raw}
                drops[result.id] = Drop(stage="templates", id=result.id, **why)
                run.append("dropped.jsonl", [drops[result.id]])
            elif result.made is not None:
                if add is None:
                    if again:  # now the teacher has answered
                        run.replace("templates.jsonl", [])
                    run.write_json("templates.begun.json", basis)
                    add = open_files.enter_context(run.appending("templates.jsonl"))
                problem = by_id[result.id].model_dump(include={"id", "question", "answer"})
                add([Template(**problem, trace=render(result.made), requests=result.requests)])
            progress(done, total, teacher.ledger.spent_usd)
    unanswered = count_unanswered(Counter(drop.reason for drop in drops.values()))
    if again and add is None and unanswered < len(drops):  # no reply of the new teacher is usable
        run.replace("templates.jsonl", [])
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
