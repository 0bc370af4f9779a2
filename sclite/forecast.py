"""What a run will cost and need, before anything is sent or trained."""

from dataclasses import replace
from typing import Any

from sclite import pipeline
from sclite.context import Context
from sclite.errors import DeviceError
from sclite.progress import ProgressDisplay
from sclite.records import Attempt, Template


def estimate_cost(context: Context, part: str = "templates") -> dict[str, Any]:
    """The first request of build_templates, or of build_corrections, and the cost of all; sends nothing.

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
            # a correction is half as long again as the attempt
            tokens = 1.5 * sum(len(row.trace) for row in wrong) / max(1, len(wrong)) / CHARACTERS_PER_TOKEN
            return teacher.preview(correction_jobs(config, run, grader, wrong), tokens, part)
        split = pipeline.divided_problems(context, reread=True)
        existing = {row.id for row in run.rows("templates.jsonl", Template, whole=False)}
        missing = [problem for problem in (*split.sft, *split.stage2) if problem.id not in existing]
        solutions = sum(len(problem.solution or problem.answer) for problem in missing)
        # a template is half as long again as the solution, and its tags and rule are about 120 tokens
        tokens = 120 + 1.5 * solutions / max(1, len(missing)) / CHARACTERS_PER_TOKEN
        return teacher.preview(template_jobs(config, missing, grader), tokens, part)


def report_plan(context: Context) -> None:
    """Print what a whole run will cost, take and need, or raise DeviceError. Writes and sends nothing."""
    from sclite.inspect.plan import plan_training

    with context.display.wait("planning the run"):
        plan = plan_training(context)
    if misfits := [name for name, stage in plan["stages"].items() if stage["fits"] is False]:
        message = f"{', '.join(misfits)} will not fit in GPU memory"
        raise DeviceError(message, "`sclite train --plan` shows settings that fit")
    if not context.run.is_imported("templates", "templates.jsonl"):
        dry = replace(context, dry=True, display=ProgressDisplay(quiet=True))
        with context.display.wait("estimating the cost of the teacher"):
            found, most = estimate_cost(dry), len(pipeline.unseen(dry)) * context.config.attempts.samples
        # a correction is about as long as a template, and only wrong attempts get one
        cost, each = found["cost_usd"], (found["cost_usd"] or 0.0) / max(1, found["requests"])
        price = "unknown cost" if cost is None else f"about ${cost:.2f} and at most ${most * each:.2f}"
        paid = f"{found['requests']:,} templates and at most {most:,} corrections by {context.config.teacher.model}"
        context.display.print(f"plan: {paid}, {price}")
    needs = ", ".join(f"{name} {stage['total_gb']:.1f} GB" for name, stage in plan["stages"].items())
    where = "host RAM" if plan["gpu"] is None else f"of {plan['gpu']['free_gb']:.0f} GB GPU memory"
    hours = "unknown until the first steps" if plan["hours"] is None else f"about {plan['hours']:.1f} h"
    disk = f"about {plan['disk_gb']['total']:.1f} GB of disk"
    context.display.print(f"plan: training needs {needs} ({where}) and {disk}; time {hours}")
