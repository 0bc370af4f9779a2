"""`sclite train --plan`: memory of each stage, what fits, tokens, steps, hours, disk, and the cost of corrections.

Unknown values are None: lengths without rows, hours before the run has timed a step, costs before its first paid reply.
"""

import statistics
from collections.abc import Mapping
from dataclasses import replace
from math import ceil
from typing import Any

from sclite import console
from sclite.config import Config
from sclite.data.corrections import count_pending_corrections
from sclite.records import Pair, Problem, Review, Template
from sclite.run import Run
from sclite.student.loader import model_name
from sclite.student.tokenization import Encoded
from sclite.teacher.ledger import FILE as LEDGER
from sclite.teacher.ledger import Ledger
from sclite.train.bundle import build_bundles
from sclite.train.dpo import with_replay
from sclite.train.memory import (
    Architecture,
    choose,
    estimate,
    estimate_on_cpu,
    largest_length,
    optimizer_bytes,
    read_architecture,
    wanted_setting,
)
from sclite.train.metrics_logger import read_metrics
from sclite.train.order import training_order
from sclite.train.sft import replay_templates, solve_rows
from sclite.train.trainer import held_out_rows
from sclite.train.warmup_rows import mixed_rows

STAGES = ("sft", "warmup", "dpo")
GB = 1_000_000_000
CHECKPOINTS = 3  # on disk at once: two are kept while a third is written
BITS = {
    **{
        "f32": 32,
        "f16": 16,
        "bf16": 16,
        "q8_0": 8.5,
        "q6_k": 6.57,
        "q5_k_m": 5.70,
        "q5_k_s": 5.57,
        "q5_0": 5.57,
    },
    **{"q4_k_m": 4.90, "q4_k_s": 4.67, "q4_0": 4.64, "q3_k_m": 4.0, "q2_k": 3.16},
}
"""Bits per weight of llama.cpp's quantizations, from its own table of an 8B model."""
PARTS = ("weights", "adapter", "gradients", "optimizer", "activations", "logits", "layer", "allowance")


def plan(
    config: Config,
    run: Run,
    *,
    gpu: Mapping[str, Any] | None,
    tokenizer: Any = None,
    unseen: frozenset[str] | None = None,
    micro_batches: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """The plan as JSON values. `gpu` is from `doctor.describe_gpu`; without one (None) `fits` is unknown.

    `unseen` are ids of the problems kept for stage 2 (None: unknown), `micro_batches` the rows of a forward pass by stage
    (default: as configured). Without a tokenizer the forecast is unknown.
    """
    model = read_architecture(config.student, config.lora.target_modules)
    backend = "plain" if gpu is None or config.student.backend == "plain" else "unsloth"
    stages = {}
    for stage in STAGES:
        setting = wanted_setting(config, stage, backend)
        setting = replace(setting, micro_batch=(micro_batches or {}).get(stage, setting.micro_batch))
        rows = None if tokenizer is None else _sequences(config, run, stage, tokenizer, unseen or frozenset())
        stages[stage] = {**_memory(config, model, setting, gpu), **_forecast(config, run, stage, rows)}
    hours = [stage["hours"] for stage in stages.values()]
    return {
        "student": model_name(config.student),
        "parameters": model.parameters,
        "bits": 32 if gpu is None else 4 if config.student.load_in_4bit else 16,
        "backend": backend,
        "rough": model.rough or None,
        "gpu": dict(gpu) if gpu else None,
        "stages": stages,
        "hours": None if None in hours else round(sum(hours), 2),
        "disk_gb": _disk(config, model),
        "teacher": corrections_cost(config, run, unseen, count_pending_corrections(config, run)),
    }


def _memory(
    config: Config, model: Architecture, wanted: Any, gpu: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The setting for the free memory, its bytes by part, and the longest row that fits alone."""
    batch = config.stage(wanted.stage).batch_size
    free = None if gpu is None else round(gpu["free_gb"] * GB)
    choice = choose(model, wanted, batch, free)
    setting = choice.setting or wanted
    found = estimate_on_cpu(model, setting) if gpu is None else estimate(model, setting)
    return {
        "fits": choice.fits,
        "verdict": choice.verdict,
        "batch": batch,
        "micro_batch": setting.micro_batch,
        "accumulation": ceil(batch / setting.micro_batch),
        "length": setting.length,
        "rank": setting.rank,
        "memory_gb": {name: round(size / GB, 3) for name, size in found.parts.items()},
        "total_gb": round(found.total / GB, 3),
        "host_gb": round(found.host / GB, 3),
        "largest_length": None
        if free is None
        else largest_length(model, replace(wanted, micro_batch=1), free),
    }


# -- tokens, steps and hours ---------------------------------------------------------------------------------------


def _sequences(
    config: Config, run: Run, stage: str, tokenizer: Any, unseen: frozenset[str]
) -> list[list[Encoded]] | None:
    """The sequences of every row that a stage trains on; None if its files do not exist yet."""
    folder, templates = config.prompts.folder, run.read("templates.jsonl", Template)
    if stage == "sft":
        chosen = [row for row in templates if row.id not in unseen]
        return [[row] for row in solve_rows(tokenizer, chosen, folder)] or None
    replayed = replay_templates(templates, unseen)
    if stage == "warmup":
        reviews = run.read("reviews.jsonl", Review)
        return [[row] for row in mixed_rows(tokenizer, run, reviews, replayed, config)[1]] or None
    questions = {row.id: row.question for row in run.read("problems.jsonl", Problem)}
    pairs = [pair for pair in run.read("pairs.jsonl", Pair) if pair.id in questions]
    if not pairs:
        return None
    solved = solve_rows(tokenizer, replayed, folder)
    bundles = with_replay(build_bundles(tokenizer, pairs, questions, folder), solved, config.dpo.replay_share)
    return [[side for side in (b.review, b.rejected, b.replay) if side is not None] for b in bundles]


def _forecast(config: Config, run: Run, stage: str, rows: list[list[Encoded]] | None) -> dict[str, Any]:
    """Rows, tokens over all epochs, optimizer steps and hours, in the order that training takes them."""
    settings = config.stage(stage)
    speed = tokens_per_second(run, stage)
    unknown = dict.fromkeys(("rows", "too_long", "tokens", "loss_share", "steps", "hours"))
    if rows is None:
        return {**unknown, "epochs": settings.num_train_epochs, "tokens_per_second": speed}
    fit = [row for row in rows if max(len(side.ids) for side in row) <= settings.max_length]
    once = [sum(len(side.ids) for side in row) for row in fit]
    carried = sum(weight > 0 for row in fit for side in row for weight in side.weights)
    held_out = set(held_out_rows(len(fit), settings.eval_share, config.seed))
    trained = [tokens for number, tokens in enumerate(once) if number not in held_out]
    order = training_order(trained, settings.batch_size, settings.num_train_epochs, config.seed)
    tokens = sum(trained[number] for number in order)
    return {
        "rows": len(fit),
        "too_long": len(rows) - len(fit),
        "tokens": tokens,
        "loss_share": round(carried / sum(once), 4) if fit else None,
        "steps": ceil(len(order) / settings.batch_size),
        "hours": None if speed is None else round(tokens / speed / 3600, 3),
        "epochs": settings.num_train_epochs,
        "tokens_per_second": speed,
    }


def tokens_per_second(run: Run, stage: str) -> float | None:
    """The median over the steps of this stage that the run has timed; the warm-up may take SFT's."""
    found: dict[str, list[float]] = {}
    for name in STAGES:
        for row in read_metrics(run.path(f"{name}/metrics.jsonl")):
            if row.get("tokens_per_second"):
                found.setdefault(row["phase"], []).append(row["tokens_per_second"])
    same = found.get(stage) or (found.get("sft") if stage == "warmup" else None)
    return round(statistics.median(same), 1) if same else None


# -- disk and money ------------------------------------------------------------------------------------------------


def _disk(config: Config, model: Architecture) -> dict[str, float | None]:
    """GB that a whole run writes; None for a quantization of unknown size. `merged` and `full_gguf` are temporary."""
    tensors = model.lora_tensors(config.lora.r)
    adapter, states = 4 * sum(tensors), optimizer_bytes(tensors, 8)
    bits, sixteen = BITS.get(config.export.quant.lower()), 2 * model.parameters
    sizes = {
        "adapters": len(STAGES) * adapter,
        "checkpoints": len(STAGES) * CHECKPOINTS * (adapter + states),
        "merged": sixteen,
        "full_gguf": sixteen * (2 if config.export.quant == "f32" else 1),
        "gguf": None if bits is None else model.parameters * bits / 8,
    }
    found = {name: None if size is None else round(size / GB, 2) for name, size in sizes.items()}
    return {**found, "total": round(sum(size for size in found.values() if size is not None), 2)}


def corrections_cost(
    config: Config, run: Run, unseen: frozenset[str] | None, left: int | None
) -> dict[str, Any]:
    """What the teacher's corrections will cost, at the mean cost of a row of this run so far, repairs included.

    `requests`: the `left` ones for the attempts that are there; before there are any (None), at most one for each that
    will be sampled (`at_most`).
    """
    requests = left
    if left is None and unseen is not None:
        requests = len(unseen) * config.attempts.samples
    each, spent = _cost_so_far(run)
    cost = None if requests is None or (each is None and requests) else round(requests * (each or 0.0), 4)
    return {
        "requests": requests,
        "at_most": left is None and bool(requests),
        "cost_usd": cost,
        "spent_usd": spent,
    }


def _cost_so_far(run: Run) -> tuple[float | None, float | None]:
    """(US dollars per row, in total): of corrections if there are any, else of templates."""
    if not run.path(LEDGER).is_file():
        return None, None
    rows = {
        "corrections": sum(row.requests > 0 for row in run.rows("reviews.jsonl", Review)),
        "templates": sum(1 for _ in run.rows("templates.jsonl", Template)),
    }
    with Ledger.reading(run.path(LEDGER)) as ledger:
        paid = {stage: ledger.totals(stage) for stage, count in rows.items() if count}
        spent = ledger.totals()["cost_usd"]
    for stage, totals in paid.items():
        if totals["requests"]:
            return None if totals["unpriced"] else totals["cost_usd"] / rows[stage], spent
    return None, spent


# -- the terminal --------------------------------------------------------------------------------------------------


def print_plan_tables(plan: Mapping[str, Any]) -> None:
    """The plan as tables on stdout."""
    size, stages = plan["parameters"], plan["stages"]
    count = f"{size / 1e9:.2f}B" if size >= 5e8 else f"{size / 1e6:.1f}M"
    console.print(
        console.escape(f"{plan['student']}: {count} parameters in {plan['bits']} bits, {plan['backend']}")
    )
    if plan["rough"]:
        console.print(f"[yellow]Rough estimate:[/] {console.escape(plan['rough'])}")
    _show_gpu(plan["gpu"])
    memory = [
        (name, *(f"{stage['memory_gb'][part]:.2f}" for part in PARTS), f"{stage['total_gb']:.2f}", f"{stage['host_gb']:.2f}")
        for name, stage in stages.items()
    ]  # fmt: skip
    console.print_table("Memory at the peak of a step, GB", ("stage", *PARTS, "total", "host RAM"), memory)
    fits = {True: "[green]yes[/]", False: "[red]no[/]", None: "unknown"}
    columns = ("batch", "micro_batch", "accumulation", "length", "largest_length", "rank")
    rows = [
        (name, fits[stage["fits"]], *(_number(stage[key]) for key in columns))
        for name, stage in stages.items()
    ]
    header = (
        "stage",
        "fits",
        "batch",
        "micro-batch",
        "accumulation",
        "max length",
        "longest that fits",
        "rank",
    )
    console.print_table("Settings", header, rows, texts=2)
    for name, stage in stages.items():
        if stage["fits"] is False:
            console.print(f"[red]{name} does not fit:[/] {console.escape(stage['verdict'])}")
    keys = ("rows", "too_long", "epochs", "tokens", "steps", "tokens_per_second")
    header = ("stage", "rows", "too long", "epochs", "tokens", "steps", "tokens/s", "time")
    rows = [
        (name, *(_number(stage[key]) for key in keys), _time(stage["hours"]) or "–")
        for name, stage in stages.items()
    ]
    console.print_table("Forecast", header, rows)
    console.print(f"Training time: {_time(plan['hours']) or 'unknown until this run has timed a step'}")
    disk = plan["disk_gb"]
    parts = [
        f"{name.replace('_', ' ')} {'?' if size is None else _size(size)}" for name, size in disk.items()
    ]
    console.print(f"Disk: about {_size(disk['total'])} ({', '.join(parts[:-1])})")
    console.print(f"Corrections by the teacher: {_corrections(plan['teacher'])}")


def _show_gpu(gpu: Mapping[str, Any] | None) -> None:
    if gpu is None:
        console.print("No CUDA GPU: the memory is host RAM, roughly estimated.")
        return
    console.print(f"{console.escape(gpu['name'])}: {gpu['free_gb']:.1f} of {gpu['total_gb']:.1f} GB free")
    if gpu["processes"] is None:
        console.print("  other processes: unknown, nvidia-smi is not available")
    for process in gpu["processes"] or ():
        size = "an unknown amount" if process["gb"] is None else f"{process['gb']:.1f} GB"
        console.print(f"  {size} used by {console.escape(process['name'])} (PID {process['pid']})")


def _corrections(teacher: Mapping[str, Any]) -> str:
    if teacher["requests"] is None:
        return "unknown without problems for stage 2"
    if not teacher["requests"]:
        spent = f"; the run has cost ${teacher['spent_usd']:.2f}" if teacher["spent_usd"] else ""
        return f"none left to request{spent}"
    most = "at most " if teacher["at_most"] else ""
    cost = "price unknown" if teacher["cost_usd"] is None else f"about ${teacher['cost_usd']:.2f}"
    return f"{most}{teacher['requests']:,}, {cost}"


def _time(hours: float | None) -> str:
    return "" if hours is None else f"about {console.format_duration(3600 * hours)}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"


def _size(gigabytes: float) -> str:
    """56 GB, 5.7 GB, 40 MB."""
    if gigabytes < 0.1:
        return f"{1000 * gigabytes:.2g} MB"
    return f"{gigabytes:.0f} GB" if gigabytes >= 10 else f"{gigabytes:.1f} GB"
