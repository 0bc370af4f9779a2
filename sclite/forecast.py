"""What a run will cost and need, before anything is sent or trained."""

from dataclasses import replace
from typing import Any

from sclite import pipeline
from sclite.context import Context
from sclite.progress import ProgressDisplay
from sclite.records import Attempt, Problem, Template


def estimate_cost(context: Context, part: str = "templates", fresh: bool = False) -> dict[str, Any]:
    """The first request of build_templates or build_corrections, and the cost of all of them; sends nothing.

    With `fresh`, existing templates are requested again, unless the ledger has them.

    Raises DataError for corrections before there are attempts.
    """
    from sclite.data.attempts import deduplicate
    from sclite.data.corrections import correction_jobs, count_pending_corrections, split_usable
    from sclite.data.templates import template_jobs
    from sclite.grading.grader import Grader
    from sclite.teacher.client import CHARACTERS_PER_TOKEN

    config, run = context.config, context.run
    with Grader() as grader, context.teacher() as teacher:
        if part == "corrections":
            hint = "run without --dry-run: it samples the attempts first, then shows what the rest will cost"
            attempts = deduplicate(run.require("attempts.jsonl", Attempt, hint))
            wrong = split_usable(attempts)[0] if count_pending_corrections(config, run) else []
            known = {problem.id for problem in run.rows("problems.jsonl", Problem)}
            wrong = [attempt for attempt in wrong if attempt.id in known]
            # a correction is half as long again as the attempt
            tokens = 1.5 * sum(len(row.trace) for row in wrong) / max(1, len(wrong)) / CHARACTERS_PER_TOKEN
            return teacher.preview(correction_jobs(config, run, grader, wrong), tokens, part)
        split = pipeline.divided_problems(context, reread=True)
        rows = () if fresh else run.rows("templates.jsonl", Template, whole=False)
        existing = {row.id for row in rows}
        missing = [problem for problem in (*split.sft, *split.stage2) if problem.id not in existing]
        solutions = sum(len(problem.solution or problem.answer) for problem in missing)
        # a template is half as long again as the solution, and its tags and rule are about 120 tokens
        tokens = 120 + 1.5 * solutions / max(1, len(missing)) / CHARACTERS_PER_TOKEN
        return teacher.preview(template_jobs(config, missing, grader), tokens, part)


def plan_run(context: Context) -> dict[str, Any]:
    """`plan_training`, plus the "templates" left to request and the corrections for problems not read yet.

    Writes and sends nothing.
    """
    from sclite.inspect.plan import plan_training

    with context.display.wait("planning the run"):
        plan = plan_training(context)
    found: dict[str, Any] = {"requests": 0, "cost_usd": 0.0}
    if not context.run.is_imported("templates", "templates.jsonl"):
        dry = replace(context, dry=True, display=ProgressDisplay(quiet=True))
        with context.display.wait("estimating the cost of the teacher"):
            found = estimate_cost(dry)
        teacher = plan["teacher"]
        if teacher["cost_usd"] is None:  # a correction is about as long as a template
            if (teacher["requests"] is None or teacher["at_most"]) and not context.config.attempts.source:
                most = len(pipeline.unseen(dry)) * context.config.attempts.samples
                teacher |= {"requests": most, "at_most": True}
            if None not in (teacher["requests"], found["cost_usd"]) and found["requests"]:
                teacher["cost_usd"] = round(teacher["requests"] * found["cost_usd"] / found["requests"], 4)
    plan["templates"] = {name: found[name] for name in ("requests", "cost_usd")}
    return plan
