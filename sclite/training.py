"""`sclite train`: SFT, the student's mistakes and their corrections, warm-up, pairs and DPO, each on a card that is free.

On a CUDA card each stage that needs it runs in a process of its own (`world.apart`). Where the card's memory does not
suffice, the stage goes on from its last checkpoint with half as many rows at once.
"""

from collections.abc import Callable
from typing import Any

from sclite import pipeline
from sclite.config import Config
from sclite.context import LIBRARIES, Context
from sclite.errors import DataError, DeviceError, GpuMemoryError, NetworkError, UsageError
from sclite.isolation import run_isolated
from sclite.run import Report, Run
from sclite.student.cuda_memory import free_memory
from sclite.train.memory import divisor, micro_batch, what_fits

Stage = Callable[..., Report]


def train(context: Context, only: str | None = None, fresh: bool = False) -> list[Report]:
    """All of it, or one half (`only` sft or dpo). `fresh` trains anew what was trained from other inputs."""
    if only not in (None, "sft", "dpo"):
        raise UsageError(f"--only {only}: no such stage", "use --only sft or --only dpo")
    data = {name: context.run.path(f"{name}.jsonl").is_file() for name in ("templates", "reviews", "pairs")}
    ready = data["templates"] and not (data["reviews"] or data["pairs"])
    if only != "sft" and ready and not context.config.teacher.model:
        raise UsageError(  # said before hours of SFT, not after
            "teacher.model is not set, and stage 2 needs a teacher for its corrections",
            "add a LiteLLM model, as in --set teacher.model=openai/gpt-4.1, or use --only sft",
        )
    if only is None:
        _tell_corrections(context)
    if only != "dpo":
        train_sft(context, fresh)
    if only != "sft":
        pipeline.require_sft(context)
        if data["reviews"] or not pipeline.pairs_brought(context):
            pipeline.build_corrections(context)
        train_warmup(context, fresh)
        pipeline.build_pairs(context)
        train_dpo(context, fresh)
    return context.reports


def _tell_corrections(context: Context) -> None:
    """One line on what the teacher's corrections will cost, where that is known and not nothing."""
    from sclite.data.corrections import count_pending_corrections, estimate_corrections_usd
    from sclite.inspect.plan import corrections_cost

    config, run = context.config, context.run
    found = corrections_cost(config, run, pipeline.unseen(context), count_pending_corrections(config, run))
    cost = found["cost_usd"]
    if cost is None and found["requests"]:
        with context.teacher() as teacher:
            cost = estimate_corrections_usd(config, run, teacher, found["requests"])
    if not cost:
        return
    most = "at most " if found["at_most"] else ""
    text = f"corrections after SFT: {most}{found['requests']:,} by {config.teacher.model}, about ${cost:.2f}"
    limit, spent = config.teacher.max_cost, found["spent_usd"] or 0.0
    over = limit is not None and spent + cost > limit
    context.display.print(f"{text}; teacher.max_cost is ${limit:g}, ${spent:.2f} is spent" if over else text)


def plan(context: Context) -> dict[str, Any]:
    """The plan of a training, from the configuration, the GPU and the run's files; nothing is started or written."""
    from sclite.data.problems import split_problems
    from sclite.doctor import describe_gpu
    from sclite.inspect import plan as look
    from sclite.records import Problem
    from sclite.student.loader import load_tokenizer, model_name

    config = context.config
    found = list(context.run.rows("problems.jsonl", Problem))
    try:
        tokenizer = load_tokenizer(model_name(config.student))
    except (DataError, NetworkError):
        tokenizer = None
    return look.plan(
        config,
        context.run,
        gpu=describe_gpu(),
        tokenizer=tokenizer,
        unseen=frozenset(p.id for p in split_problems(config, found)[1]) if found else None,
        micro_batches={stage: micro_batch(config, stage) for stage in look.STAGES},
    )


def train_sft(context: Context, fresh: bool = False) -> Report:
    report = _stage(context, "sft", "sft: the student learns the templates", sft, fresh)
    counts = report.counts
    text = f"sft: {counts.get('rows', 0)} rows, {counts.get('steps', 0)} steps{pipeline.drops(report)}"
    if layers := report.figures.get("lora"):
        text += f"; LoRA on {', '.join(layers)}"
    return context.add(report, "sft: an adapter was brought along" if "imported" in counts else text)


def train_warmup(context: Context, fresh: bool = False) -> Report:
    report = _stage(context, "warmup", "warm-up: the student learns what a review looks like", warmup, fresh)
    counts = report.counts
    text = f"warm-up: {counts.get('rows', 0)} rows, {counts.get('steps', 0)} steps{pipeline.drops(report)}"
    return context.add(report, text)


def train_dpo(context: Context, fresh: bool = False) -> Report:
    report = _stage(context, "dpo", "dpo: the student prefers right reviews", dpo, fresh)
    counts = report.counts
    text = f"dpo: {counts.get('pairs', 0)} pairs, {counts.get('steps', 0)} steps{pipeline.drops(report)}"
    return context.add(report, text)


def sft(config: Config, run: Run, unseen: frozenset[str], fresh: bool, *, progress: Any) -> Report:
    from sclite.train.sft import train_sft as stage

    return stage(config, run, unseen=unseen, fresh=fresh, progress=progress)


def warmup(config: Config, run: Run, unseen: frozenset[str], fresh: bool, *, progress: Any) -> Report:
    from sclite.train.warmup import train_warmup as stage

    return stage(config, run, unseen=unseen, fresh=fresh, progress=progress)


def dpo(config: Config, run: Run, unseen: frozenset[str], fresh: bool, *, progress: Any) -> Report:
    from sclite.train.dpo import train_dpo as stage

    return stage(config, run, unseen=unseen, fresh=fresh, progress=progress)


def _stage(context: Context, name: str, text: str, stage: Stage, fresh: bool) -> Report:
    """Run a training stage; with half the rows at once after each time that the memory does not suffice."""
    config, unseen, report = context.config, pipeline.unseen(context), None
    with context.display.stage(name, text) as progress:
        while report is None:
            given = (config, context.run, unseen, fresh)
            try:
                if context.apart:
                    report = run_isolated(stage, *given, progress=progress, log=context.run.path(LIBRARIES))
                else:
                    report = stage(*given, progress=progress)
            except GpuMemoryError as error:
                if error.micro_batch == 1:
                    raise _told(error, config, name) from error
                config = halved(config, error)
                now = config.stage(name).per_device_train_batch_size
                told = f"out of memory with {error.micro_batch} rows at once: {name} goes on with {now}"
                progress(0, 0, warning=told)
            if report is None and not context.apart:
                free_memory()  # here, where no traceback holds the model any more
    return report


def _told(error: GpuMemoryError, config: Config, name: str) -> DeviceError:
    """The fault with the largest setting that would fit, where there is a card to tell."""
    fits = what_fits(config, name)
    return DeviceError(error.message, f"{error.hint}{f'. By the memory model {fits}' if fits else ''}")


def halved(config: Config, error: GpuMemoryError) -> Config:
    """The configuration with about half the micro-batch size for a stage; the accumulation follows."""
    settings = config.stage(error.stage)
    size = divisor(settings.batch_size, error.micro_batch // 2)
    smaller = settings.model_copy(update={"per_device_train_batch_size": size})
    return config.model_copy(update={error.stage: smaller})
