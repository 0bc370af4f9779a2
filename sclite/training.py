"""`sclite train`: SFT, the student's mistakes and their corrections, warm-up, pairs and DPO, each on a card that is free.

On a CUDA card each stage that needs it runs in a process of its own (`world.apart`). Where the card's memory does not
suffice, the stage goes on from its last checkpoint with half as many rows at once.
"""

from collections.abc import Callable
from typing import Any

from sclite import pipeline
from sclite.config import Config
from sclite.context import LIBRARIES, World
from sclite.errors import DataFault, DeviceFault, MemoryFault, NetworkFault, UsageFault
from sclite.isolation import apart
from sclite.run import Report, Run
from sclite.student.cuda_memory import free_memory
from sclite.train.memory import divisor, micro_batch, what_fits

Stage = Callable[..., Report]


def train(world: World, only: str | None = None, fresh: bool = False) -> list[Report]:
    """All of it, or one half (`only` sft or dpo). `fresh` trains anew what was trained from other inputs."""
    if only not in (None, "sft", "dpo"):
        raise UsageFault(f"--only {only}: no such stage", "use --only sft or --only dpo")
    data = {name: world.run.path(f"{name}.jsonl").is_file() for name in ("templates", "reviews", "pairs")}
    ready = data["templates"] and not (data["reviews"] or data["pairs"])
    if only != "sft" and ready and not world.config.teacher.model:
        raise UsageFault(  # said before hours of SFT, not after
            "teacher.model is not set, and stage 2 needs a teacher for its corrections",
            "add a LiteLLM model, as in --set teacher.model=openai/gpt-4.1, or use --only sft",
        )
    if only is None:
        _tell_corrections(world)
    if only != "dpo":
        train_sft(world, fresh)
    if only != "sft":
        pipeline.require_sft(world)
        if data["reviews"] or not pipeline.pairs_brought(world):
            pipeline.build_corrections(world)
        train_warmup(world, fresh)
        pipeline.build_pairs(world)
        train_dpo(world, fresh)
    return world.reports


def _tell_corrections(world: World) -> None:
    """One line on what the teacher's corrections will cost, where that is known and not nothing."""
    from sclite.data.corrections import left_to_ask, reckon_corrections
    from sclite.inspect.plan import corrections_cost

    config, run = world.config, world.run
    found = corrections_cost(config, run, pipeline.unseen(world), left_to_ask(config, run))
    cost = found["cost_usd"]
    if cost is None and found["requests"]:
        with world.teacher() as teacher:
            cost = reckon_corrections(config, run, teacher, found["requests"])
    if not cost:
        return
    most = "at most " if found["at_most"] else ""
    text = f"corrections after SFT: {most}{found['requests']:,} by {config.teacher.model}, about ${cost:.2f}"
    limit, spent = config.teacher.max_cost, found["spent_usd"] or 0.0
    over = limit is not None and spent + cost > limit
    world.screen.tell(f"{text}; teacher.max_cost is ${limit:g}, ${spent:.2f} is spent" if over else text)


def plan(world: World) -> dict[str, Any]:
    """The plan of a training, from the configuration, the GPU and the run's files; nothing is started or written."""
    from sclite.data.problems import divide
    from sclite.doctor import card_facts
    from sclite.inspect import plan as look
    from sclite.records import Problem
    from sclite.student.loader import load_tokenizer, model_name

    config = world.config
    found = list(world.run.rows("problems.jsonl", Problem))
    try:
        tokenizer = load_tokenizer(model_name(config.student))
    except (DataFault, NetworkFault):
        tokenizer = None
    return look.plan(
        config,
        world.run,
        gpu=card_facts(),
        tokenizer=tokenizer,
        unseen=frozenset(p.id for p in divide(config, found)[1]) if found else None,
        micro_batches={stage: micro_batch(config, stage) for stage in look.STAGES},
    )


def train_sft(world: World, fresh: bool = False) -> Report:
    report = _stage(world, "sft", "sft: the student learns the templates", sft, fresh)
    counts = report.counts
    text = f"sft: {counts.get('rows', 0)} rows, {counts.get('steps', 0)} steps{pipeline.drops(report)}"
    if layers := report.figures.get("lora"):
        text += f"; LoRA on {', '.join(layers)}"
    return world.add(report, "sft: an adapter was brought along" if "brought_along" in counts else text)


def train_warmup(world: World, fresh: bool = False) -> Report:
    report = _stage(world, "warmup", "warm-up: the student learns what a review looks like", warmup, fresh)
    counts = report.counts
    text = f"warm-up: {counts.get('rows', 0)} rows, {counts.get('steps', 0)} steps{pipeline.drops(report)}"
    return world.add(report, text)


def train_dpo(world: World, fresh: bool = False) -> Report:
    report = _stage(world, "dpo", "dpo: the student prefers right reviews", dpo, fresh)
    counts = report.counts
    text = f"dpo: {counts.get('pairs', 0)} pairs, {counts.get('steps', 0)} steps{pipeline.drops(report)}"
    return world.add(report, text)


def sft(config: Config, run: Run, unseen: frozenset[str], fresh: bool, *, progress: Any) -> Report:
    from sclite.train.sft import train_sft as stage

    return stage(config, run, unseen=unseen, fresh=fresh, progress=progress)


def warmup(config: Config, run: Run, unseen: frozenset[str], fresh: bool, *, progress: Any) -> Report:
    from sclite.train.warmup import train_warmup as stage

    return stage(config, run, unseen=unseen, fresh=fresh, progress=progress)


def dpo(config: Config, run: Run, unseen: frozenset[str], fresh: bool, *, progress: Any) -> Report:
    from sclite.train.dpo import train_dpo as stage

    return stage(config, run, unseen=unseen, fresh=fresh, progress=progress)


def _stage(world: World, name: str, text: str, stage: Stage, fresh: bool) -> Report:
    """Run a training stage; with half the rows at once after each time that the memory does not suffice."""
    config, unseen, report = world.config, pipeline.unseen(world), None
    with world.screen.stage(name, text) as progress:
        while report is None:
            given = (config, world.run, unseen, fresh)
            try:
                if world.apart:
                    report = apart(stage, *given, progress=progress, log=world.run.path(LIBRARIES))
                else:
                    report = stage(*given, progress=progress)
            except MemoryFault as fault:
                if fault.micro_batch == 1:
                    raise _told(fault, config, name) from fault
                config = halved(config, fault)
                now = config.stage(name).per_device_train_batch_size
                told = f"out of memory with {fault.micro_batch} rows at once: {name} goes on with {now}"
                progress(0, 0, warning=told)
            if report is None and not world.apart:
                free_memory()  # here, where no traceback holds the model any more
    return report


def _told(fault: MemoryFault, config: Config, name: str) -> DeviceFault:
    """The fault with the largest setting that would fit, where there is a card to tell."""
    fits = what_fits(config, name)
    return DeviceFault(fault.message, f"{fault.hint}{f'. By the memory model {fits}' if fits else ''}")


def halved(config: Config, fault: MemoryFault) -> Config:
    """The configuration with about half the micro-batch size for a stage; the accumulation follows."""
    settings = config.stage(fault.stage)
    size = divisor(settings.batch_size, fault.micro_batch // 2)
    smaller = settings.model_copy(update={"per_device_train_batch_size": size})
    return config.model_copy(update={fault.stage: smaller})
