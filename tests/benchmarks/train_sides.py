"""What bench_train measures, in a separate process: one case after another, each side as its users would run it.

    python -m tests.benchmarks.train_sides --model FOLDER --geometry NAME --backend unsloth|plain --cases JSON

A line of JSON for each case, as it comes. With --turns there is one case, and each step waits for a line on stdin.
"""

import importlib
import json
import random
import statistics
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.benchmarks.turns import Turn, argument_parser

CAP_BYTES = 24e9
RANK, LONGEST = 32, 2048
FREE = 4
"""Steps before the first turn: kernels are compiled and tried there."""


@dataclass(frozen=True)
class Case:
    """One measurement. `side`: ours, through Unsloth; script, by Unsloth and TRL alone; plain, ours without Unsloth.

    With `full` every row is as long as the longest; else a few hundred tokens mostly, as worked problems are.
    """

    side: str
    stage: str
    micro: int
    length: int = LONGEST
    full: bool = False
    batch: int = 8
    steps: int = 8


def peak(side: str, stage: str, micro: int, length: int = LONGEST) -> Case:
    """A case with only full-length rows: the peak of memory."""
    return Case(side, stage, micro, length, full=True, batch=max(4, micro), steps=3)


# -- rows ----------------------------------------------------------------------------------------------------------


def lengths(count: int, full: bool, longest: int) -> list[int]:
    """Row lengths in tokens, as for worked problems: mostly a few hundred, some long; or all of maximum length."""
    draw = random.Random(0)
    if full:
        return [longest] * count
    return [max(96, min(longest, int(draw.lognormvariate(6.1, 0.5)))) for _ in range(count)]


def solved_rows(count: int, full: bool, longest: int) -> list[Any]:
    """Rows of random ids; loss on the second two thirds, on nine tenths where all are full (as the memory model has it)."""
    from sclite.student.tokenization import TrainingSequence

    draw, rows = random.Random(1), []
    for length in lengths(count, full, longest):
        prompt = length // (10 if full else 3)
        ids = [draw.randrange(3, 1000) for _ in range(length - 1)] + [2]
        rows.append(TrainingSequence(ids, [0.0] * prompt + [1.0] * (length - prompt)))
    return rows


def bundles(count: int, full: bool, longest: int) -> list[Any]:
    """Pairs as DPO trains them: decisions in the middle, the last 15 % as the content, and a solved row each."""
    from sclite.student.tokenization import TrainingSequence
    from sclite.train.dpo import Bundle

    draw, made = random.Random(2), []
    solved = solved_rows(count, full, longest)
    for number, length in enumerate(lengths(count, full, longest)):
        head = length - round(0.15 * length)
        sides = []
        shared = [draw.randrange(3, 1000) for _ in range(head)]
        for _ in range(2):
            ids = shared + [draw.randrange(3, 1000) for _ in range(length - head)]
            sides.append(TrainingSequence(ids, [0.0] * head + [1.0] * (length - head)))
        marks = tuple(range(head - 8, head))
        review = TrainingSequence(sides[0].ids, sides[0].weights, marks, tuple(m == marks[-1] for m in marks))
        made.append(Bundle(f"p{number}/0", review, sides[1], solved[number]))
    return made


# -- a session: a process that loads its student once ---------------------------------------------------------------


def session(
    folder: Path, geometry: str, backend: str, cases: Sequence[Case], turn: Turn | None = None
) -> Iterator[dict[str, Any]]:
    """The figures of each case, one after another."""
    import torch

    from sclite.student.cuda_memory import free_memory

    torch.cuda.set_per_process_memory_fraction(min(1.0, CAP_BYTES / torch.cuda.mem_get_info()[1]))
    began = time.monotonic()
    from sclite.config import Config
    from sclite.train.stage import quiet_libraries

    config = Config.model_validate({"student": {"model": str(folder), "backend": backend}})
    quiet_libraries(config.student)
    students: dict[bool, Any] = {}
    for case in cases:
        by_script = case.side == "script"
        if by_script not in students:
            students[by_script] = load_by_script(folder) if by_script else load_ours(config, case)
        free_memory()
        torch.cuda.reset_peak_memory_stats()
        try:
            figures = (script if by_script else ours)(*students[by_script], config, case, turn)
        except Exception as error:  # noqa: BLE001 - the other cases are worth having
            traceback.print_exc()
            figures = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        free, total = torch.cuda.mem_get_info()
        figures |= {
            "reserved_gb": torch.cuda.max_memory_reserved() / 1e9,
            "outside_gb": (total - free - torch.cuda.memory_reserved()) / 1e9,  # of all processes on the GPU
            "seconds": round(time.monotonic() - began, 1),
        }
        began = time.monotonic()
        modelled = {} if by_script else in_the_model(geometry, backend, case)
        yield {"geometry": geometry, **asdict(case), **figures, **modelled}


def case_config(config: Any, case: Case) -> Any:
    """The configuration with the settings of a case."""
    from sclite.config import Config

    stage = {"batch_size": case.batch, "max_length": case.length, "eval_share": 0, "checkpoints": 1}
    stage |= {"learning_rate": 1e-5, "num_train_epochs": 1}
    tree = config.model_dump() | {"lora": {"r": RANK}, case.stage: stage}
    return Config.model_validate(tree)


def load_ours(config: Any, case: Case) -> tuple[Any, Any]:
    """(model, tokenizer) as our stages load them."""
    from sclite.student.loader import load_student

    return load_student(case_config(config, case), case.stage, train=True)


def ours(model: Any, tokenizer: Any, config: Any, case: Case, turn: Turn | None = None) -> dict[str, Any]:
    """Our trainer, through Unsloth or on the plain path."""
    from sclite.train.dpo import preference_task
    from sclite.train.losses import reference_log_probs
    from sclite.train.metrics_logger import read_metrics
    from sclite.train.sft import supervised_task
    from sclite.train.trainer import Checkpoints, train_adapter

    settings, count = case_config(config, case).stage(case.stage), case.steps * case.batch
    if case.stage == "sft":
        rows = solved_rows(count, case.full, case.length)
        task = supervised_task("sft", settings, 0, rows, tokenizer.pad_token_id)
    else:
        pairs = bundles(count, case.full, case.length)
        reference = reference_log_probs(model, pairs, tokenizer, case.micro)
        task = preference_task(settings, 0, pairs, reference, tokenizer)
    with TemporaryDirectory() as place:
        metrics = Path(place) / "metrics.jsonl"
        train_adapter(
            model, task, Checkpoints(Path(place) / "checkpoints"), metrics, case.micro,
            progress=lambda _, steps, **__: turn.step_done() if turn and steps else None,
        )  # fmt: skip
        found = read_metrics(metrics)
    figures = speed_figures([row["tokens_per_second"] for row in found], turn)
    figures["tokens"] = [row["tokens"] for row in found]
    figures |= {"peak_gb": max(row["memory_gb"] for row in found), "steps": len(found)}
    return figures | ({"first_dpo_loss": found[0]["dpo_loss"]} if case.stage == "dpo" else {})


def speed_figures(speeds: Sequence[float], turn: Turn | None) -> dict[str, Any]:
    """Tokens per second of each step, and their median without the first two if there are more; none in turns."""
    median = statistics.median(speeds[2:] or speeds)
    return {} if turn else {"tokens_per_second": median, "speeds": [round(value, 1) for value in speeds]}


def load_by_script(folder: Path) -> tuple[Any, Any]:
    """(model, tokenizer) as in a notebook, from Unsloth's loader."""
    fast = importlib.import_module("unsloth").FastLanguageModel
    from sclite.student.adapters import lora_targets

    model, tokenizer = fast.from_pretrained(str(folder), max_seq_length=LONGEST, load_in_4bit=True)
    model = fast.get_peft_model(
        model, r=RANK, lora_alpha=64, target_modules=lora_targets(model), lora_dropout=0.0, bias="none",
        use_gradient_checkpointing="unsloth", random_state=0,
    )  # fmt: skip
    return model, tokenizer


def script(model: Any, tokenizer: Any, _: Any, case: Case, turn: Turn | None = None) -> dict[str, Any]:
    """What a careful notebook does: TRL's SFTTrainer on tokenized rows, the same in the same order."""
    import datasets
    import torch
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from sclite.train.trainer import training_order

    rows = solved_rows(case.steps * case.batch, case.full, case.length)
    rows = [rows[i] for i in training_order([len(row.ids) for row in rows], case.batch, 1, 0)]
    labels = [[i if w else -100 for i, w in zip(row.ids, row.weights, strict=True)] for row in rows]
    data = datasets.Dataset.from_dict({"input_ids": [row.ids for row in rows], "labels": labels})
    sizes = [sum(len(row.ids) for row in rows[s : s + case.batch]) for s in range(0, len(rows), case.batch)]
    speeds, began = [], [0.0]

    class Clock(TrainerCallback):
        """From the end of one step to the end of the next, as ours are timed."""

        def on_train_begin(self, args, state, control, **_):
            began[0] = time.monotonic()

        def on_step_end(self, args, state, control, **_):
            torch.cuda.synchronize()
            now = time.monotonic()
            speeds.append(sizes[state.global_step - 1] / (now - began[0]))
            if turn is not None:
                turn.step_done()
            began[0] = time.monotonic()

    with TemporaryDirectory() as place:
        settings = SFTConfig(
            output_dir=place, per_device_train_batch_size=case.micro,
            gradient_accumulation_steps=case.batch // case.micro, learning_rate=1e-5, num_train_epochs=1,
            optim="adamw_8bit", bf16=True, max_length=case.length, logging_steps=1, save_strategy="no",
            report_to="none", train_sampling_strategy="sequential", seed=0, disable_tqdm=True,
        )  # fmt: skip
        trainer = SFTTrainer(model=model, args=settings, train_dataset=data, processing_class=tokenizer)
        trainer.add_callback(Clock())
        trainer.train()
    return speed_figures(speeds, turn) | {
        "tokens": sizes,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
        "steps": len(speeds),
        "trained_on": [str(next(p for p in model.parameters() if p.requires_grad).dtype)],
    }


def in_the_model(geometry_name: str, backend: str, case: Case) -> dict[str, Any]:
    """The memory model's estimate for a case."""

    from sclite.train.memory import Setting, estimate, largest_length
    from tests.train.architectures import recipe_architecture

    found = recipe_architecture(geometry_name)
    setting = Setting(case.stage, case.micro, case.length, RANK, backend=backend)
    made = estimate(found, setting)
    longest = largest_length(found, replace(setting, micro_batch=1), int(CAP_BYTES))
    return {
        "modelled_gb": (made.total - made.parts["allowance"]) / 1e9,
        "modelled_reserved_gb": made.total / 1e9,
        "parts_gb": {name: round(size / 1e9, 3) for name, size in made.parts.items()},
        "largest_length": longest,
    }


# -- as a process ----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--geometry", required=True)
    parser.add_argument("--backend", choices=("unsloth", "plain"), required=True)
    parser.add_argument("--cases", type=json.loads, required=True)
    parser.add_argument("--turns", action="store_true", help="a line on stdin before each step")
    options = parser.parse_args()
    cases = [Case(**given) for given in options.cases]
    turn = Turn(FREE - 1) if options.turns else None
    for row in session(options.model, options.geometry, options.backend, cases, turn):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
