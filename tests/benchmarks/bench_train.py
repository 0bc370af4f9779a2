"""Training on a card: speed beside a script of Unsloth and TRL and beside the plain path, peaks beside the memory model.

    python -m tests.benchmarks.bench_train --models FOLDER --out FILE            everything, one table
    python -m tests.benchmarks.bench_train --models FOLDER --only speed|memory   a part of it
    python -m tests.benchmarks.bench_train --embedded RUN --adapters FOLDER      a quickstart's three trainings on the card

Models are random ones of real geometry, written into FOLDER once. Each measurement is a process of its own within 24 GB.
The last form takes the rows of a quickstart's run folder; evaluate its adapters where llama.cpp is.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

CAP_BYTES = 24e9
RANK, BATCH, LONGEST = 32, 8, 2048
SIDES = ("ours", "script", "plain")
SPEED = [("sft", side) for side in SIDES] + [("dpo", side) for side in ("ours", "plain")]
MEMORY = [
    *(("qwen2.5-math-7b", "sft", micro, LONGEST, "ours") for micro in (1, 2, 4)),
    ("qwen2.5-math-7b", "dpo", 1, LONGEST, "ours"),
    ("qwen2.5-math-7b", "dpo", 2, LONGEST, "ours"),
    ("qwen2.5-math-7b", "sft", 1, 4096, "ours"),
    ("qwen2.5-math-7b", "sft", 2, LONGEST, "plain"),
    ("llama-3.1-8b", "sft", 2, LONGEST, "ours"),
    ("llama-3.1-8b", "dpo", 2, LONGEST, "ours"),
]
"""(geometry, stage, micro-batch, tokens a row, side) beside the memory model."""


# -- rows ----------------------------------------------------------------------------------------------------------


def lengths(count: int, full: bool, longest: int) -> list[int]:
    """Tokens of rows as worked problems have them: a few hundred mostly, some long; or all the longest."""
    draw = random.Random(0)
    if full:
        return [longest] * count
    return [max(96, min(longest, int(draw.lognormvariate(6.1, 0.5)))) for _ in range(count)]


def solved_rows(count: int, full: bool, longest: int) -> list[Any]:
    """Rows of random ids; loss on the second two thirds, on nine tenths where all are full (as the memory model has it)."""
    from sclite.student.encode import Encoded

    draw, rows = random.Random(1), []
    for length in lengths(count, full, longest):
        prompt = length // (10 if full else 3)
        ids = [draw.randrange(3, 1000) for _ in range(length - 1)] + [2]
        rows.append(Encoded(ids, [0.0] * prompt + [1.0] * (length - prompt)))
    return rows


def bundles(count: int, full: bool, longest: int) -> list[Any]:
    """Pairs as DPO trains them: decisions in the middle, a content of 15 % at the end, a solved row beside them."""
    from sclite.student.encode import Encoded
    from sclite.train.bundle import Bundle

    draw, made = random.Random(2), []
    solved = solved_rows(count, full, longest)
    for number, length in enumerate(lengths(count, full, longest)):
        head = length - round(0.15 * length)
        sides = []
        shared = [draw.randrange(3, 1000) for _ in range(head)]
        for _ in range(2):
            ids = shared + [draw.randrange(3, 1000) for _ in range(length - head)]
            sides.append(Encoded(ids, [0.0] * head + [1.0] * (length - head)))
        marks = tuple(range(head - 8, head))
        review = Encoded(sides[0].ids, sides[0].weights, marks, tuple(m == marks[-1] for m in marks))
        made.append(Bundle(f"p{number}/0", review, sides[1], solved[number]))
    return made


# -- one measurement, in a process of its own ----------------------------------------------------------------------


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The figures of one side of one stage."""
    import torch

    torch.cuda.set_per_process_memory_fraction(min(1.0, CAP_BYTES / torch.cuda.mem_get_info()[1]))
    folder = model_folder(options.models, options.geometry)
    work = {"ours": ours, "plain": ours, "script": script}[options.side]
    torch.cuda.reset_peak_memory_stats()
    figures = work(options, folder)
    figures |= {"reserved_gb": torch.cuda.max_memory_reserved() / 1e9}
    if options.side != "script":
        figures |= modelled(options)
    return figures


def model_folder(models: Path, name: str) -> Path:
    """The random model of a geometry, written once."""
    from tests.gpu.models import random_model
    from tests.train.geometries import RECIPES

    folder = models / name
    if not (folder / "model.safetensors.index.json").is_file():
        random_model(folder, RECIPES[name], "cuda")
    return folder


def ours(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Our trainer, through Unsloth or on the plain path."""
    from tempfile import TemporaryDirectory

    import torch

    from sclite.config import Config
    from sclite.student.load import load_student
    from sclite.train.bundle import reference_log_probs
    from sclite.train.checkpoints import Checkpoints
    from sclite.train.common import quiet
    from sclite.train.dpo import preferences
    from sclite.train.sft import supervised
    from sclite.train.trainer import train_adapter
    from sclite.train.watch import read_metrics

    lora = {"batch": BATCH, "max_length": options.length, "eval_share": 0, "checkpoints": 1}
    backend = "unsloth" if options.side == "ours" else "plain"
    config = Config.model_validate(
        {"student": {"model": str(folder), "backend": backend}, "sft": {**lora, "rank": RANK}, "dpo": lora}
    )
    quiet(config.student)
    model, tokenizer = load_student(config.student, config.sft, train=True)
    count = options.steps * BATCH
    if options.stage == "sft":
        rows = solved_rows(count, options.full, options.length)
        lesson = supervised("sft", rows, tokenizer.pad_token_id, 0, 0)
    else:
        pairs = bundles(count, options.full, options.length)
        reference = reference_log_probs(model, pairs, tokenizer, options.micro)
        lesson = preferences(config.dpo, pairs, reference, tokenizer, 0)
    torch.cuda.reset_peak_memory_stats()
    seen = {"peak": 0.0}
    with TemporaryDirectory() as place:
        train_adapter(
            model, tokenizer, lesson, config.sft, Checkpoints(Path(place) / "checkpoints"),
            Path(place) / "metrics.jsonl", rate=1e-5, epochs=1, seed=0, micro_batch=options.micro,
        )  # fmt: skip
        found = read_metrics(Path(place) / "metrics.jsonl")
    seen["peak"] = max(row["memory_gb"] for row in found)
    figures = {"tokens_per_second": statistics.median(row["tokens_per_second"] for row in found[2:])}
    figures |= {"peak_gb": seen["peak"], "steps": len(found)}
    return figures | ({"first_dpo_loss": found[0]["dpo_loss"]} if options.stage == "dpo" else {})


def script(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What a careful notebook does: Unsloth's loader, TRL's SFTTrainer on tokenised rows in the same order."""
    from tempfile import TemporaryDirectory

    import datasets
    import torch
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer
    from unsloth import FastLanguageModel  # before trl

    from sclite.student.load import LINEAR_LAYERS
    from sclite.train.order import training_order

    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=options.length, load_in_4bit=True
    )
    model = FastLanguageModel.get_peft_model(
        model, r=RANK, lora_alpha=64, target_modules=list(LINEAR_LAYERS), lora_dropout=0.0, bias="none",
        use_gradient_checkpointing="unsloth", random_state=0,
    )  # fmt: skip
    rows = solved_rows(options.steps * BATCH, options.full, options.length)
    rows = [rows[i] for i in training_order([len(row.ids) for row in rows], BATCH, 1, 0)]
    data = datasets.Dataset.from_dict(
        {
            "input_ids": [row.ids for row in rows],
            "labels": [[i if w else -100 for i, w in zip(row.ids, row.weights, strict=True)] for row in rows],
        }
    )
    tokens = [sum(len(row.ids) for row in rows[s : s + BATCH]) for s in range(0, len(rows), BATCH)]
    speeds, began = [], [0.0]

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            torch.cuda.synchronize()
            began[0] = time.monotonic()

        def on_step_end(self, args, state, control, **_):
            torch.cuda.synchronize()
            speeds.append(tokens[state.global_step - 1] / (time.monotonic() - began[0]))

    with TemporaryDirectory() as place:
        settings = SFTConfig(
            output_dir=place, per_device_train_batch_size=options.micro,
            gradient_accumulation_steps=BATCH // options.micro, learning_rate=1e-5, num_train_epochs=1,
            optim="adamw_8bit", bf16=True, max_length=options.length, logging_steps=1, save_strategy="no",
            report_to="none", train_sampling_strategy="sequential", seed=0, disable_tqdm=True,
        )  # fmt: skip
        trainer = SFTTrainer(model=model, args=settings, train_dataset=data, processing_class=tokenizer)
        trainer.add_callback(Clock())
        torch.cuda.reset_peak_memory_stats()
        trainer.train()
    return {
        "tokens_per_second": statistics.median(speeds[2:]),
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
        "steps": len(speeds),
    }


def modelled(options: argparse.Namespace) -> dict[str, Any]:
    """What the memory model says of this measurement."""
    from sclite.train.geometry import geometry
    from sclite.train.memory import Setting, estimate, largest_length
    from tests.train.geometries import RECIPES

    found = geometry(RECIPES[options.geometry])
    backend = "unsloth" if options.side == "ours" else "plain"
    setting = Setting(options.stage, options.micro, options.length, RANK, backend=backend)
    made = estimate(found, setting)
    longest = largest_length(found, replace(setting, micro_batch=1), int(CAP_BYTES))
    return {
        "modelled_gb": made.allocated / 1e9,
        "modelled_reserved_gb": made.total / 1e9,
        "largest_length": longest,
    }


# -- all of them ---------------------------------------------------------------------------------------------------


def run_side(options: argparse.Namespace, **chosen: Any) -> dict[str, Any]:
    """One measurement in a new process; its figures, or what it died of."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_train", "--models", str(options.models)]
    for name, value in chosen.items():
        command += [f"--{name}"] if value is True else [f"--{name}", str(value)] if value is not False else []
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        figures = {"error": (done.stderr.strip().splitlines() or ["no word"])[-1][:300]}
    else:
        figures = json.loads(lines[-1])
    row = {**chosen, **figures, "seconds": round(time.monotonic() - began, 1)}
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def speed(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every side in turn, `--rounds` times; ratios of medians."""
    rows = []
    for _ in range(options.rounds):
        for stage, side in SPEED:
            micro = 4 if stage == "sft" else 2
            rows.append(
                run_side(
                    options,
                    side=side,
                    stage=stage,
                    geometry=options.geometry,
                    micro=micro,
                    steps=options.steps,
                )
            )
    for stage in ("sft", "dpo"):
        medians = {
            side: statistics.median(found)
            for side in SIDES
            if (
                found := [
                    r["tokens_per_second"]
                    for r in rows
                    if (r["stage"], r["side"]) == (stage, side) and "error" not in r
                ]
            )
        }
        for side in ("script", "plain"):
            if side in medians and "ours" in medians:
                ratio = medians["ours"] / medians[side]
                print(
                    f"{stage}: ours {medians['ours']:,.0f} tokens/s, {side} {medians[side]:,.0f}: {ratio:.2f}"
                )
    for row in rows:
        if "first_dpo_loss" in row:
            print(f"dpo_loss of the first step, {row['side']}: {row['first_dpo_loss']:.4f}")
    return rows


def memory(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Peaks beside the memory model."""
    rows = []
    for geometry, stage, micro, length, side in MEMORY:
        chosen = {"side": side, "stage": stage, "geometry": geometry, "micro": micro, "length": length}
        rows.append(run_side(options, **chosen, steps=3, full=True))
    print(
        f"{'geometry':<18}{'stage':<6}{'side':<7}{'micro':>6}{'length':>8}{'peak GB':>9}{'model GB':>10}{'off by':>8}{'longest':>9}"
    )
    for row in rows:
        start = f"{row['geometry']:<18}{row['stage']:<6}{row['side']:<7}{row['micro']:>6}{row['length']:>8}"
        if "error" in row:
            print(start, row["error"])
            continue
        off = row["modelled_gb"] / row["peak_gb"] - 1
        print(
            f"{start}{row['peak_gb']:>9.2f}{row['modelled_gb']:>10.2f}{100 * off:>7.0f}%{row['largest_length']:>9,}"
        )
    return rows


def embedded(run_folder: Path, adapters: Path) -> None:
    """Train the embedded student's three stages on the card from a quickstart's rows; copy its adapters."""
    import shutil
    import tomllib

    from sclite.config import Config
    from sclite.records import Problem
    from sclite.run import Run
    from sclite.train.dpo import train_dpo
    from sclite.train.sft import train_sft
    from sclite.train.warm import train_warm

    run = Run(adapters / "run")
    run.folder.mkdir(parents=True, exist_ok=True)
    for name in ("problems", "templates", "attempts", "reviews", "pairs"):
        shutil.copy(run_folder / f"{name}.jsonl", run.path(f"{name}.jsonl"))
    given = tomllib.loads((run_folder / "run.toml").read_text(encoding="utf-8"))
    given["student"] |= {"backend": "unsloth", "load_in_4bit": False}
    config = Config.model_validate(given)
    problems = run.read("problems.jsonl", Problem)
    unseen = frozenset(p.id for p in problems[len(problems) // 2 :])
    for stage in (train_sft, train_warm, train_dpo):
        print(json.dumps(stage(config, run, unseen=unseen).as_dict()))
    for name in ("sft", "dpo"):
        shutil.copytree(run.path(f"{name}/adapter"), adapters / name, dirs_exist_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--out", type=Path, help="also write every figure there, as JSON")
    parser.add_argument("--only", choices=("speed", "memory"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--geometry", default="qwen2.5-math-7b")
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--side", choices=SIDES)
    parser.add_argument("--stage", choices=("sft", "dpo"), default="sft")
    parser.add_argument("--micro", type=int, default=2)
    parser.add_argument("--length", type=int, default=LONGEST)
    parser.add_argument("--full", action="store_true", help="every row as long as the longest")
    parser.add_argument("--embedded", type=Path, metavar="RUN")
    parser.add_argument("--adapters", type=Path, default=Path("adapters"))
    options = parser.parse_args()
    if options.embedded:
        embedded(options.embedded, options.adapters)
    elif options.side:
        print(json.dumps(measure(options)))
    else:
        found = [] if options.only == "memory" else speed(options)
        found += [] if options.only == "speed" else memory(options)
        if options.out:
            options.out.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
