"""The commands that build data and train: build-data, train and run."""

from typing import Annotated

import typer

from sclite import console
from sclite.errors import UsageError
from sclite.options import Common, FreshOption, common_options

GpuOption = Annotated[
    int | None, typer.Option(metavar="N", min=0, help="The CUDA GPU (default: the first, or the CPU).")
]
ProblemsArgument = Annotated[
    str | None, typer.Argument(metavar="PROBLEMS", help="A file or a Hub ID (default: problems.source).")
]
LimitOption = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Only the first N problems (default: all).")
]
MaxCostOption = Annotated[
    float | None, typer.Option(metavar="USD", min=0, help="Spending limit for the whole run.")
]
YesOption = Annotated[bool, typer.Option("--yes", help="Do not ask to confirm the cost.")]


@common_options
def build_data(
    problems: ProblemsArgument = None,
    limit: LimitOption = None,
    only: Annotated[
        str | None, typer.Option(metavar="PART", help="Build only templates or corrections.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Discard replies from another teacher or prompt; pay again.")
    ] = False,
    max_cost: MaxCostOption = None,
    yes: YesOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the first request and the cost; send nothing.")
    ] = False,
    *,
    common: Common,
) -> None:
    """Build thought templates and corrections with the teacher.

    Corrections need a student after SFT, or attempts.student.
    """
    from sclite import forecast, pipeline
    from sclite.inspect import summaries
    from sclite.inspect.plan import correction_cost_text
    from sclite.inspect.status import STALE, read_status

    if only not in (None, "templates", "corrections"):
        raise UsageError(f"invalid value for --only: {only}", "use --only templates or --only corrections")
    chosen = {"problems.source": problems, "problems.limit": limit, "teacher.max_cost": max_cost}
    context = common.context(chosen)
    pipeline.check_sources(context, student=only != "templates")
    # corrections need a student to make attempts
    both = only is None and bool("sft" in context.students() or context.config.attempts.student)
    if dry_run:
        context.dry = True
        with console.spinner("estimating"):
            found, later = forecast.estimate_cost(context, only or "templates", fresh), ""
            if both and not common.json:
                later = correction_cost_text(context, pipeline.unseen(context))
        request = found["first_request"]
        if common.json:
            console.print_json(found)
        elif request is None:
            console.print(f"No requests for {only or 'templates'} left to send.")
        else:
            settings = [f"{name} {value}" for name, value in request.items() if name != "messages"]
            console.print(console.escape(", ".join(settings)))
            for message in request["messages"]:
                role, content = console.escape(message["role"]), console.escape(message["content"])
                console.print(f"\n[bold]{role}[/]\n{content}")
            cost = "unknown cost" if found["cost_usd"] is None else f"about ${found['cost_usd']:.4f}"
            tokens = (
                f"{found['prompt_tokens']:,} prompt tokens, {found['completion_tokens']:,} completion tokens"
            )
            requests = f"{found['requests']} requests plus repairs"
            console.print(f"\n{requests}: about {tokens}, {cost}. Nothing was sent.")
        if later:
            console.print(console.escape(later))
        return
    context.ask_before_paying = not yes
    with context.run.recording(context.config):
        if pipeline.has_problems(context):
            named = problems is not None or limit is not None
            pipeline.divided_problems(context, reread=only != "corrections" or named)
        if only != "corrections":
            pipeline.build_templates(context, fresh)
        sft = both and read_status(context.config, context.run)["stages"]["sft"]
        if sft and sft["state"] == STALE and context.config.attempts.kind == "trained":
            # retraining it would discard its attempts and their corrections
            retrain = "`sclite train --fresh` retrains it and corrects its new attempts"
            context.display.print(f"corrections: skipped, SFT is stale ({'; '.join(sft['why'])}); {retrain}")
        elif both or only == "corrections":
            pipeline.build_corrections(context, fresh, alone=True)
    summaries.print_build_data(context, only, common.json)


@common_options
def train(
    gpu: GpuOption = None,
    only: Annotated[str | None, typer.Option(metavar="STAGE", help="Run only sft or dpo.")] = None,
    fresh: FreshOption = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Show memory, disk, cost and known times; train nothing.")
    ] = False,
    *,
    common: Common,
) -> None:
    """Train the student, export it and fit its review threshold."""
    from sclite import pipeline
    from sclite.inspect import summaries
    from sclite.student.loader import model_name, select_gpu

    if only not in (None, "sft", "dpo"):
        raise UsageError(f"--only {only}: no such stage", "use --only sft or --only dpo")
    context = common.context()
    model_name(context.config.student)
    with console.spinner("loading torch"):
        select_gpu(gpu)
    if plan:
        from sclite.inspect.plan import plan_training, print_plan

        with console.spinner("planning the training"):
            planned = plan_training(context)
        print_plan(planned, common.json)
        return
    with context.run.recording(context.config):
        pipeline.train(context, only, fresh)
    summaries.print_train(context, only, common.json)


@common_options
def run(
    problems: ProblemsArgument = None,
    limit: LimitOption = None,
    gpu: GpuOption = None,
    fresh: FreshOption = False,
    max_cost: MaxCostOption = None,
    yes: YesOption = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Show memory, disk, cost and known times; start nothing.")
    ] = False,
    *,
    common: Common,
) -> None:
    """Build data, train, export and evaluate.

    Shows the plan first. Evaluates only if eval.source is set. Re-run to resume.
    """
    from sclite import exports, forecast, pipeline
    from sclite.inspect import summaries
    from sclite.inspect.plan import check_fit, print_plan
    from sclite.student.loader import model_name, select_gpu

    chosen = {"problems.source": problems, "problems.limit": limit, "teacher.max_cost": max_cost}
    context = common.context(chosen)
    model_name(context.config.student)
    pipeline.check_sources(context)
    with console.spinner("loading torch"):
        select_gpu(gpu)
    planned = forecast.plan_run(context)
    if plan or not common.json:
        print_plan(planned, common.json)
    else:
        check_fit(planned)
    if plan:
        return
    exports.check_chat_template(context)
    context.ask_before_paying = not yes
    with context.run.recording(context.config):
        if pipeline.has_problems(context):
            pipeline.divided_problems(context, reread=True, fresh=fresh)
        pipeline.build_templates(context, fresh)
        pipeline.train(context, fresh=fresh)
        summary = None
        if context.config.eval.source:
            summary = pipeline.evaluate_students(context, context.students())
    summaries.print_train(context, None, common.json, summary)
