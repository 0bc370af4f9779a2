"""The commands that build data and train: build-data, train and run."""

from typing import Annotated, Literal

from sclite import console
from sclite.options import Common, FreshOption, argument, common_options, flag, option

GpuOption = Annotated[int | None, option("N", "The CUDA GPU (default: the first, or the CPU).", min=0)]
ProblemsArgument = Annotated[
    str | None, argument("PROBLEMS", "A file or a Hub ID (default: problems.source).")
]
LimitOption = Annotated[int | None, option("N", "Only the first N problems (default: all).", min=1)]
MaxCostOption = Annotated[float | None, option("USD", "Spending limit for the whole run.", min=0)]
YesOption = Annotated[bool, flag("--yes", "Do not ask to confirm the cost.")]


@common_options
def build_data(
    problems: ProblemsArgument = None,
    limit: LimitOption = None,
    only: Annotated[
        Literal["templates", "corrections"] | None, option("PART", "Build only this part.")
    ] = None,
    fresh: Annotated[
        bool, flag("--fresh", "Discard replies from another teacher or prompt; pay again.")
    ] = False,
    max_cost: MaxCostOption = None,
    yes: YesOption = False,
    dry_run: Annotated[bool, flag("--dry-run", "Show the first request and the cost; send nothing.")] = False,
    *,
    common: Common,
) -> None:
    """Build thought templates and corrections with the teacher.

    Corrections need a student after SFT, or attempts.student.
    """
    from sclite import forecast, pipeline
    from sclite.inspect import summaries
    from sclite.inspect.status import STALE, read_status

    chosen = {"problems.source": problems, "problems.limit": limit, "teacher.max_cost": max_cost}
    context = common.context(chosen)
    pipeline.check_sources(context, student=only != "templates")
    if dry_run:
        context.dry = True
        with console.spinner("estimating"):
            found = forecast.estimate_cost(context, only or "templates", fresh)
        if common.json:
            console.print_json(found)
        elif request := found["first_request"]:
            settings = (f"{name} {value}" for name, value in request.items() if name != "messages")
            console.print(console.escape(", ".join(settings)))
            for message in request["messages"]:
                console.print(f"\n[bold]{message['role']}[/]\n{console.escape(message['content'])}")
            cost = "unknown cost" if found["cost_usd"] is None else f"about ${found['cost_usd']:.4f}"
            console.print(
                f"\n{found['requests']} requests plus repairs: about {found['prompt_tokens']:,} prompt tokens, "
                f"{found['completion_tokens']:,} completion tokens, {cost}. Nothing was sent."
            )
        else:
            console.print(f"No requests for {only or 'templates'} left to send.")
        return
    context.ask_before_paying = not yes
    with context.run.recording(context.config):
        if pipeline.has_problems(context):
            pipeline.divided_problems(context, reread=only != "corrections")
        if only != "corrections":
            pipeline.build_templates(context, fresh)
        # corrections need a student to make attempts
        both = only is None and bool("sft" in context.students() or context.config.attempts.student)
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
    only: Annotated[Literal["sft", "dpo"] | None, option("STAGE", "Run only sft or dpo.")] = None,
    fresh: FreshOption = False,
    plan: Annotated[bool, flag("--plan", "Show memory, disk, cost and known times; train nothing.")] = False,
    *,
    common: Common,
) -> None:
    """Train the student, export it and fit its review threshold."""
    from sclite import pipeline
    from sclite.inspect import summaries
    from sclite.student.loader import model_name, select_gpu

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
    summaries.print_train(context, common.json)


@common_options
def run(
    problems: ProblemsArgument = None,
    limit: LimitOption = None,
    gpu: GpuOption = None,
    fresh: FreshOption = False,
    max_cost: MaxCostOption = None,
    yes: YesOption = False,
    plan: Annotated[bool, flag("--plan", "Show memory, disk, cost and known times; start nothing.")] = False,
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
    summaries.print_train(context, common.json, summary)
