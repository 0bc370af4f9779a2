"""`sclite train --plan`: memory of each stage, what fits, tokens, steps, hours, disk, and the cost of corrections.

Unknown values are None: lengths without rows, hours before every stage has run a step, costs before its first paid reply.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil
from typing import TYPE_CHECKING, Any

from sclite import console
from sclite.config import Config
from sclite.console import escape, format_duration
from sclite.data.corrections import count_pending_corrections
from sclite.errors import DeviceError
from sclite.export.gguf import estimate_bytes
from sclite.export.reference import format_size
from sclite.records import Attempt, Pair, Problem, Review, Template
from sclite.run import Run
from sclite.student.cuda_memory import available_ram
from sclite.student.loader import model_name, read_config
from sclite.student.tokenization import TrainingSequence
from sclite.teacher.ledger import FILE as LEDGER
from sclite.teacher.ledger import Ledger
from sclite.train.dpo import build_bundles, with_replay
from sclite.train.memory import (
    Architecture,
    architecture,
    choose,
    cpu_micro_batch,
    estimate,
    estimate_on_cpu,
    largest_length,
    wanted_setting,
)
from sclite.train.metrics_logger import read_metrics
from sclite.train.sft import replay_templates, solve_rows
from sclite.train.trainer import held_out_rows, training_order
from sclite.train.warmup import mixed_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

    from sclite.context import Context
    from sclite.data.problems import Split

STAGES = ("sft", "warmup", "dpo")
GB = 1_000_000_000
SETTINGS = ("batch", "micro_batch", "accumulation", "length", "largest_length")
FORECAST = ("rows", "too_long", "epochs", "tokens", "steps", "tokens_per_second")
CHECKPOINTS = 4  # on disk at once with held-out rows: three are kept while a fourth is written


def plan_training(context: "Context") -> dict[str, Any]:
    """The plan of a training on this machine, from the configuration and the run's files; starts and writes nothing."""
    from sclite.data.problems import split_problems, trainable_problems
    from sclite.doctor import gpu_processes, list_gpus, probe_torch
    from sclite.student.loader import load_tokenizer

    # the process that starts those of the stages must not hold GPU memory
    config, gpus = context.config, probe_torch()["gpus"] if context.isolated else list_gpus()
    split = split_problems(config, problems) if (problems := trainable_problems(context.run)) else None
    gpu = {**gpus[0], "processes": gpu_processes()} if gpus else None
    tokenizer = load_tokenizer(model_name(config.student))
    return plan(config, context.run, gpu=gpu, tokenizer=tokenizer, split=split)


def plan(
    config: Config, run: Run, *, gpu: Mapping[str, Any] | None, tokenizer: "Tokenizer", split: "Split | None"
) -> dict[str, Any]:
    """The plan as JSON values. `gpu` comes from `doctor`, with its processes; None: the CPU, where `fits` is about RAM.

    `split` has the run's problems by use, None if it has none yet.
    """
    unseen = None if split is None else frozenset(problem.id for problem in split.stage2)
    fit = frozenset() if split is None else frozenset(problem.id for problem in split.fit)
    model = architecture(read_config(model_name(config.student)), config.lora.target_modules)
    backend = "plain" if gpu is None or config.student.backend == "plain" else "unsloth"
    stages = {}
    for stage in STAGES:
        wanted, batch = wanted_setting(config, stage, backend), config.stage(stage).batch_size
        hidden = (unseen or frozenset()) | (fit if stage == "sft" else frozenset())
        forecast = _forecast(config, run, stage, tokenizer, hidden)
        if gpu is None:
            wanted = replace(wanted, length=forecast["longest"] or wanted.length)
            if not config.stage(stage).per_device_train_batch_size:
                wanted = replace(wanted, micro_batch=cpu_micro_batch(model, wanted, batch))
        free = None if gpu is None else round(gpu["free_gb"] * GB)
        choice = choose(model, wanted, batch, free, available_ram())
        setting = choice.setting or wanted
        memory = estimate_on_cpu(model, setting) if gpu is None else estimate(model, setting)
        fits, verdict = choice.fits, choice.verdict
        if gpu is None and (ram := available_ram()):
            fits = memory.total <= ram
            verdict = f"{memory.total / GB:.1f} GB of RAM needed, {ram / GB:.1f} GB available"
        stages[stage] = {
            "fits": fits,
            "verdict": verdict,
            "batch": batch,
            "micro_batch": setting.micro_batch,
            "accumulation": ceil(batch / setting.micro_batch),
            "length": setting.length,
            "memory_gb": {name: size / GB for name, size in memory.parts.items()},
            "total_gb": memory.total / GB,
            "largest_length": free and largest_length(model, replace(wanted, micro_batch=1), free),
            **forecast,
        }
    hours = [stage["hours"] for stage in stages.values()]
    bits = (4 if config.student.load_in_4bit else 16) if gpu else 16 if model.bf16_on_cpu else 32
    return {
        "student": model_name(config.student),
        "parameters": model.parameters,
        "bits": bits,
        "backend": backend,
        "rough": model.rough or None,
        "gpu": dict(gpu) if gpu else None,
        "stages": stages,
        "hours": None if None in hours else sum(hours),
        "disk_gb": _disk_gb(config, model),
        "teacher": corrections_cost(config, run, unseen),
    }


def _disk_gb(config: Config, model: Architecture) -> dict[str, float]:
    """Disk space by use, and in total; `merged` and `full_gguf` are temporary."""
    adapter, sixteen = 4 * model.lora_weights(config.lora.r), 2 * model.parameters
    sizes = {
        "adapters": len(STAGES) * adapter,
        "checkpoints": len(STAGES) * CHECKPOINTS * adapter * 3 // 2,  # with two optimizer states of 8 bits
        "merged": sixteen,
        "full_gguf": sixteen * (2 if "f32" in config.export.types else 1),
        "gguf": sum(estimate_bytes(model.parameters, quant) for quant in config.export.types),
    }
    return {name: size / GB for name, size in [*sizes.items(), ("total", sum(sizes.values()))]}


def _forecast(
    config: Config, run: Run, stage: str, tokenizer: "Tokenizer", unseen: frozenset[str]
) -> dict[str, Any]:
    """Rows, tokens over all epochs, optimizer steps and hours, in the order that training takes them.

    The speed is the median over this stage's steps in the run so far; the warm-up falls back to SFT's.
    """
    settings, folder = config.stage(stage), config.prompts.folder
    phases = ("warmup", "sft") if stage == "warmup" else (stage,)
    logs = (read_metrics(run.path(f"{phase}/metrics.jsonl")) for phase in phases)
    speeds = ([row["tokens_per_second"] for row in log if row.get("tokens_per_second")] for log in logs)
    speed = next((round(statistics.median(found), 1) for found in speeds if found), None)
    known = {"epochs": settings.num_train_epochs, "tokens_per_second": speed}

    templates = run.read("templates.jsonl", Template)
    replayed = replay_templates(templates, unseen)
    questions = {row.id: row.question for row in run.read("problems.jsonl", Problem)}
    rows: Sequence[Sequence[TrainingSequence]]  # the sequences of each row
    if stage == "sft":
        taught = [row for row in templates if row.id not in unseen]
        rows = [[row] for row in solve_rows(tokenizer, taught, folder)]
    elif stage == "warmup":
        # the file may still hold reviews of replaced attempts
        works = {(row.id, row.sample) for row in run.rows("attempts.jsonl", Attempt)}
        reviews = [
            review
            for review in run.read("reviews.jsonl", Review)
            if (review.id, review.sample) in works and review.id in questions
        ]
        rows = [[row] for row in mixed_rows(tokenizer, run, reviews, replayed, config)[1]]
    else:
        pairs = [pair for pair in run.read("pairs.jsonl", Pair) if pair.id in questions]
        bundles = build_bundles(tokenizer, pairs, questions, folder)
        solved = solve_rows(tokenizer, replayed, folder) if pairs else []
        solved = [row for row in solved if len(row.ids) <= settings.max_length]
        rows = [bundle.sides for bundle in with_replay(bundles, solved, config.dpo.replay_share)]
    if not rows:
        unknown = ("rows", "too_long", "longest", "tokens", "steps", "hours")
        return {**dict.fromkeys(unknown), **known}

    fit = [row for row in rows if max(len(side.ids) for side in row) <= settings.max_length]
    once = [sum(len(side.ids) for side in row) for row in fit]
    held_out = set(held_out_rows(len(fit), settings.eval_share, config.seed))
    trained = [tokens for number, tokens in enumerate(once) if number not in held_out]
    order = training_order(trained, settings.batch_size, settings.num_train_epochs, config.seed)
    tokens = sum(trained[number] for number in order)
    return {
        "rows": len(fit),
        "too_long": len(rows) - len(fit),
        "longest": max((len(side.ids) for row in fit for side in row), default=None),
        "tokens": tokens,
        "steps": ceil(len(order) / settings.batch_size),
        "hours": None if speed is None else tokens / speed / 3600,
        **known,
    }


def correction_cost_text(config: Config, run: Run, unseen: frozenset[str]) -> str:
    """What the pending corrections will cost, and whether that exceeds the spending limit; "" if it is unknown or zero."""
    found = corrections_cost(config, run, unseen)
    if not (cost := found["cost_usd"]):
        return ""
    most = "at most " if found["at_most"] else ""
    text = f"corrections: {most}{found['requests']:,} by {config.teacher.model}, about ${cost:.2f}"
    limit, spent = config.teacher.max_cost, found["spent_usd"] or 0.0
    if limit is not None and spent + cost > limit:
        text += f"; teacher.max_cost is ${limit:g}, of which ${spent:.2f} is spent"
    return text


def corrections_cost(config: Config, run: Run, unseen: frozenset[str] | None) -> dict[str, Any]:
    """What the teacher's corrections will cost, at the mean cost of a row of this run so far, repairs included.

    The mean is that of its corrections if there are any, else of its templates. `requests`: those left for existing
    attempts; before there are any, at most one per attempt to sample (`at_most`), unknown if attempts are imported.
    """
    requests = left = count_pending_corrections(config, run)
    if left is None and unseen is not None and not config.attempts.source:
        requests = len(unseen) * config.attempts.samples
    each = spent = None
    if run.path(LEDGER).is_file():
        rows = {
            "corrections": sum(row.requests > 0 for row in run.rows("reviews.jsonl", Review)),
            "templates": sum(1 for _ in run.rows("templates.jsonl", Template)),
        }
        with Ledger.reading(run.path(LEDGER)) as ledger:
            totals = ledger.totals()
            spent = totals["cost_usd"] + totals["lost_usd"]
            for stage, count in rows.items():
                totals = ledger.totals(stage)
                if count and totals["requests"]:
                    each = None if totals["unpriced"] else totals["cost_usd"] / count
                    break
    cost = None if requests is None or (each is None and requests) else round(requests * (each or 0.0), 4)
    at_most = left is None and bool(requests)
    return {"requests": requests, "at_most": at_most, "cost_usd": cost, "spent_usd": spent}


# -- the terminal --------------------------------------------------------------------------------------------------


def check_fit(plan: Mapping[str, Any]) -> None:
    """Raise DeviceError, with the plan, if a stage does not fit on the GPU; for RAM the estimate is too rough."""
    if plan["gpu"] is not None and any(stage["fits"] is False for stage in plan["stages"].values()):
        error = DeviceError("not every stage fits on this GPU", "use the settings that the plan suggests")
        error.details = dict(plan)
        raise error


def print_plan(plan: Mapping[str, Any], json: bool = False) -> None:
    """Print the plan as tables, or as one object, and `check_fit`."""
    if json:
        check_fit(plan)
        console.print_json(plan)
        return
    stages, gpu, count = plan["stages"], plan["gpu"], f"{plan['parameters'] / 1e6:,.0f}M parameters"
    console.print(escape(f"{plan['student']}: {count} in {plan['bits']} bits, {plan['backend']}"))
    if plan["rough"]:
        console.print(f"[yellow]Rough estimate:[/] {escape(plan['rough'])}")
    if gpu is None:
        console.print("No CUDA GPU: memory is host RAM, roughly estimated.")
    else:
        console.print(f"{escape(gpu['name'])}: {gpu['free_gb']:.1f} of {gpu['total_gb']:.1f} GB free")
        for process in gpu["processes"] or ():
            used = "an unknown amount" if process["gb"] is None else f"{process['gb']:.1f} GB"
            console.print(f"  {used} used by {escape(process['name'])} (PID {process['pid']})")

    parts = stages["sft"]["memory_gb"]
    rows = [(f"{part}, GB", *(f"{s['memory_gb'][part]:.2f}" for s in stages.values())) for part in parts]
    rows.append(("total, GB", *(f"{s['total_gb']:.2f}" for s in stages.values())))
    fits = {True: "[green]yes[/]", False: "[red]no[/]", None: "unknown"}
    rows.append(("fits", *(fits[s["fits"]] for s in stages.values())))
    for key in (*SETTINGS, *FORECAST):
        values = ("–" if s[key] is None else f"{s[key]:,.10g}" for s in stages.values())
        rows.append((key.replace("_", " "), *values))
    hours = [s["hours"] for s in stages.values()]
    rows.append(("time", *("–" if h is None else f"about {format_duration(3600 * h)}" for h in hours)))
    console.print_table("Memory at the peak of a step, settings and forecast", ("", *stages), rows)
    for name, s in stages.items():
        if s["fits"] is False:
            console.print(f"[red]{name} does not fit:[/] {escape(s['verdict'])}")
    time = "unknown until every stage has run a step"
    if plan["hours"] is not None:
        time = f"about {format_duration(3600 * plan['hours'])}"
    console.print(f"Training time: {time}")
    disk = {name.replace("_", " "): format_size(1e9 * gb) for name, gb in plan["disk_gb"].items()}
    total = disk.pop("total")
    console.print(f"Disk: about {total} ({', '.join(f'{name} {gb}' for name, gb in disk.items())})")
    if templates := plan.get("templates"):
        cost = "cost unknown" if templates["cost_usd"] is None else f"about ${templates['cost_usd']:.2f}"
        console.print(f"Templates from the teacher: {templates['requests']:,}, {cost}")
    teacher = plan["teacher"]
    most, count = "at most " if teacher["at_most"] else "", teacher["requests"]
    corrections = "none left to request"
    if count is None:
        corrections = "unknown until the run has problems (and attempts, if imported)"
    elif count:
        cost = "cost unknown" if teacher["cost_usd"] is None else f"about ${teacher['cost_usd']:.2f}"
        corrections = f"{most}{count:,}, {cost}"
    spent = f"; the run has cost ${teacher['spent_usd']:.2f} so far" if teacher["spent_usd"] else ""
    console.print(f"Corrections from the teacher: {corrections}{spent}")
    check_fit(plan)
