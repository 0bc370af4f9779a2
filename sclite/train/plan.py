"""What a training will take, before it begins: memory by stage, tokens, steps, hours, disk, and the teacher's corrections.

Read from the configuration, the student's geometry and the files of the run alone. What cannot be known yet is None:
lengths before there are templates, hours before a step was timed on this run, costs before a reply was paid for.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sclite.config import Config
from sclite.records import Review, Template
from sclite.run import Run
from sclite.student.load import model_name
from sclite.teacher.ledger import FILE as LEDGER
from sclite.teacher.ledger import Ledger
from sclite.train.forecast import forecast, lengths, measure_of
from sclite.train.geometry import Geometry
from sclite.train.memory import (
    Estimate,
    Setting,
    adapter_bytes,
    choose,
    estimate,
    largest_length,
    layer_bytes,
    optimizer_bytes,
)

STAGES = ("sft", "warm", "dpo")
GB = 1_000_000_000
CHECKPOINTS = 3  # on disk at once in a stage: two are kept, and a third is being written
BITS = {
    "f32": 32,
    "f16": 16,
    "bf16": 16,
    "q8_0": 8.5,
    "q6_k": 6.57,
    "q5_k_m": 5.70,
    "q5_k_s": 5.57,
    "q5_0": 5.57,
    "q4_k_m": 4.90,
    "q4_k_s": 4.67,
    "q4_0": 4.64,
    "q3_k_m": 4.0,
    "q2_k": 3.16,
}
"""Bits per weight of llama.cpp's quantisations, as its own table gives the sizes of an 8B model."""


def plan(
    config: Config,
    geometry: Geometry,
    run: Run,
    *,
    card: Mapping[str, Any] | None,
    tokenizer: Any = None,
    unseen: frozenset[str] | None = None,
    backend: str = "unsloth",
    at_once: Mapping[str, int] | None = None,
    left: int | None = None,
) -> dict[str, Any]:
    """The whole plan, ready for JSON. `card` is what `machine.card_facts` gives; None: no card, nothing is said to fit.

    `unseen` are the ids of the problems kept for stage 2, None where they are unknown. Without a tokenizer, lengths are
    characters divided by four. `at_once` are the rows of a forward pass by stage, as `fit.micro_batch` gives them to the
    training; without it those that the configuration asks for. `left` corrections are still to be asked for, as far as
    that is known from attempts.
    """
    at_once = at_once or {stage: wanted(config, stage, backend).micro_batch for stage in STAGES}
    measure = measure_of(tokenizer)
    rows = {stage: lengths(config, run, stage, measure, unseen or frozenset()) for stage in STAGES}
    stages = {
        stage: {
            **memory_plan(config, geometry, stage, card, backend, at_once[stage]),
            **forecast(config, run, stage, rows[stage]),
        }
        for stage in STAGES
    }
    hours = [stage["hours"] for stage in stages.values()]
    return {
        "student": model_name(config.student),
        "parameters": geometry.parameters,
        "bits": 32 if card is None else 4 if config.student.load_in_4bit else 16,
        "backend": backend,
        "rough": geometry.rough or None,
        "card": dict(card) if card else None,
        "lengths": "tokenizer" if tokenizer is not None else "characters",
        "stages": stages,
        "hours": None if None in hours else round(sum(hours), 2),
        "disk_gb": disk(config, geometry),
        "teacher": corrections_cost(config, run, unseen, left),
    }


# -- memory --------------------------------------------------------------------------------------------------------


def wanted(config: Config, stage: str, backend: str = "unsloth") -> Setting:
    """A stage's setting as the configuration asks for it; the whole batch at once where it names no micro-batch."""
    settings = config.sft if stage == "sft" else config.dpo
    return Setting(
        stage=stage,
        micro_batch=min(settings.micro_batch or settings.batch, settings.batch),
        length=settings.max_length,
        rank=config.sft.rank,  # stage 2 goes on from the adapter of SFT
        replay=config.dpo.replay_share > 0,
        four_bit=config.student.load_in_4bit,
        backend=backend,
    )


def memory_plan(
    config: Config,
    geometry: Geometry,
    stage: str,
    card: Mapping[str, Any] | None,
    backend: str,
    at_once: int,
) -> dict[str, Any]:
    """What is chosen for the card's free memory, its bytes by part, and the longest row that fits alone.

    `at_once` rows are what training begins with; where they do not fit, it goes on with the largest part that does.
    """
    asked = replace(wanted(config, stage, backend), micro_batch=at_once)
    batch = (config.sft if stage == "sft" else config.dpo).batch
    free = None if card is None else round(card["free_gb"] * GB)
    chosen = choose(geometry, asked, batch, free)
    if free is None or estimate(geometry, asked).total <= free:
        chosen = replace(chosen, setting=asked, accumulation=max(1, batch // at_once))
    setting = chosen.setting or asked
    found = on_cpu(geometry, setting) if card is None else estimate(geometry, setting)
    longest = None if free is None else largest_length(geometry, replace(setting, micro_batch=1), free)
    return {
        "fits": chosen.fits,
        "verdict": chosen.verdict,
        "batch": batch,
        "micro_batch": setting.micro_batch,
        "accumulation": chosen.accumulation,
        "length": setting.length,
        "rank": setting.rank,
        "memory_gb": {name: round(size / GB, 3) for name, size in found.parts.items()},
        "total_gb": round(found.total / GB, 3),
        "host_gb": round(found.host / GB, 3),
        "largest_length": longest,
    }


def on_cpu(geometry: Geometry, setting: Setting) -> Estimate:
    """What a step takes of the machine's memory without a card: float32 throughout, and what every layer keeps.

    A rough figure: AdamW's states are whole, nothing is computed again in the backward pass, and no CUDA context is there.
    """
    plain = replace(setting, four_bit=False, backend="plain", optimizer_bits=32)
    parts = dict(estimate(geometry, plain).parts)
    layers = sum(layer_bytes(geometry, tokens, False, "plain") for tokens, _ in plain.forwards())
    parts |= {
        "weights": 4 * geometry.parameters,
        "activations": 2 * (parts["activations"] + geometry.layers * layers),
        "layer": 0,
        "allowance": 0,
    }
    return Estimate(parts)


# -- disk and money ------------------------------------------------------------------------------------------------


def disk(config: Config, geometry: Geometry) -> dict[str, float | None]:
    """GB of what a whole run leaves or needs for a while; None for a quantisation whose size is unknown.

    `merged` and `full_gguf` are made one after the other at export, and removed after it.
    """
    adapter = adapter_bytes(geometry, config.sft.rank)
    states = optimizer_bytes(geometry.lora_tensors(config.sft.rank), 8)
    bits = BITS.get(config.export.quant.lower())
    sixteen = 2 * geometry.parameters
    sizes = {
        "adapters": len(STAGES) * adapter,
        "checkpoints": len(STAGES) * CHECKPOINTS * (adapter + states),
        "merged": sixteen,
        "full_gguf": sixteen * (2 if config.export.quant == "f32" else 1),
        "gguf": None if bits is None else geometry.parameters * bits / 8,
    }
    found = {name: None if size is None else round(size / GB, 2) for name, size in sizes.items()}
    return {**found, "total": round(sum(size for size in found.values() if size is not None), 2)}


def corrections_cost(
    config: Config, run: Run, unseen: frozenset[str] | None, left: int | None
) -> dict[str, Any]:
    """What the teacher's corrections will cost, at the mean of what a row of this run has cost so far.

    `requests`: those `left` for the attempts that are there; before there are any (None), at most one for each that will
    be sampled (`at_most`). None where that, or the price, is unknown; repairs are in the mean.
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
    """(US dollars a row with its repairs, in all): of corrections where there are any, else of templates."""
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
