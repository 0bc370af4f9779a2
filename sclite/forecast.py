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
            known = {problem.id for problem in run.rows("problems.jsonl", Problem)}
            wrong = [attempt for attempt in split_usable(attempts)[0] if attempt.id in known]
            if not count_pending_corrections(config, run):
                wrong = []
            # a correction is half as long again as the attempt
            tokens = 1.5 * sum(len(row.trace) for row in wrong) / max(1, len(wrong)) / CHARACTERS_PER_TOKEN
            return teacher.preview(correction_jobs(config, run, grader, wrong), tokens, part)
        split = pipeline.divided_problems(context, reread=True)
        existing = () if fresh else {row.id for row in run.rows("templates.jsonl", Template, whole=False)}
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

    attempts, dry = context.config.attempts, replace(context, dry=True, display=ProgressDisplay(quiet=True))
    with context.display.wait("planning the run"):
        plan = plan_training(context)
        corrections, plan["templates"] = plan["teacher"], {"requests": 0, "cost_usd": 0.0}
        if context.run.is_imported("templates", "templates.jsonl"):
            return plan
        found = estimate_cost(dry)
        requests, cost_usd = found["requests"], found["cost_usd"]
        plan["templates"] = {"requests": requests, "cost_usd": cost_usd}
        if corrections["cost_usd"] is None:  # a correction is about as long as a template
            if (corrections["requests"] is None or corrections["at_most"]) and not attempts.source:
                most = len(pipeline.unseen(dry)) * attempts.samples
                corrections |= {"requests": most, "at_most": True}
            if corrections["requests"] is not None and cost_usd is not None and requests:
                corrections["cost_usd"] = round(corrections["requests"] * cost_usd / requests, 4)
    return plan
