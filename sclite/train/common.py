"""What both training stages share: the label check, the trainer's arguments, and metrics written as they come."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sclite.config import Lora
from sclite.errors import DataFault
from sclite.records import Drop
from sclite.run import Run, write_text
from sclite.student.encode import Encoded

Progress = Callable[[int, int], None]


def too_long(rows: Sequence[Encoded], limit: int) -> list[int]:
    """The numbers of the rows that have more than `limit` tokens; nothing is ever cut in silence."""
    return [i for i, row in enumerate(rows) if len(row.ids) > limit]


def check_labels(rows: Sequence[Encoded], end: int) -> dict[str, float]:
    """Refuse rows that would teach nothing or never end; return what share of the tokens carries loss.

    Every whole row needs loss on its last token, which is the end of turn, and none on its first, which is prompt.
    """
    if not rows:
        raise DataFault(
            "there is nothing to train on: no row is left", "dropped.jsonl in the run folder tells why"
        )
    for number, row in enumerate(rows, 1):
        if not any(row.weights):
            raise DataFault(
                f"training row {number}: every label is masked", "this row would teach nothing; report it"
            )
        if row.weights[0]:
            raise DataFault(
                f"training row {number}: the prompt carries loss", "check the chat template of the student"
            )
        if row.ids[-1] != end or not row.weights[-1]:
            raise DataFault(
                f"training row {number}: the end-of-turn token carries no loss", "check the chat template"
            )
    tokens = sum(len(row.ids) for row in rows)
    trained = sum(weight > 0 for row in rows for weight in row.weights)
    return {"rows": len(rows), "tokens": tokens, "trained_share": round(trained / tokens, 4)}


def arguments(folder: Path, lora: Lora, rate: float, epochs: float, seed: int) -> dict[str, Any]:
    """What TRL's configurations are given; the card decides on bfloat16."""
    import torch

    cuda = torch.cuda.is_available()
    micro = min(lora.micro_batch, lora.batch)
    return {
        "output_dir": str(folder / "checkpoints"),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": max(1, lora.batch // micro),
        "learning_rate": rate,
        "num_train_epochs": epochs,
        "lr_scheduler_type": "cosine",
        "warmup_steps": lora.warmup,
        "max_grad_norm": lora.max_grad_norm,
        "optim": "adamw_8bit" if cuda else "adamw_torch",
        "bf16": cuda,
        "use_cpu": not cuda,
        "gradient_checkpointing": cuda,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "train_sampling_strategy": "group_by_length",
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": cuda,
        "seed": seed,
        "data_seed": seed,
    }


def numbered(lengths: Sequence[int]) -> Any:
    """A data set of row numbers and lengths in tokens: trl wants one of its own kind, our rows are tokenised already."""
    import datasets

    return datasets.Dataset.from_dict({"number": list(range(len(lengths))), "length": list(lengths)})


def forget_metrics(path: Path, phase: str) -> None:
    """Take the rows of a phase out of metrics.jsonl before it is trained again."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        write_text(path, "".join(line for line in lines if json.loads(line)["phase"] != phase))


def metrics_writer(path: Path, phase: str, progress: Progress | None) -> Any:
    """A trainer callback that appends each step's figures to metrics.jsonl and reports progress."""
    from transformers import TrainerCallback

    class Writer(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            if not logs or "loss" not in logs:
                return
            row = {"phase": phase, "step": state.global_step}
            row |= {
                key: round(float(value), 6) for key, value in logs.items() if isinstance(value, int | float)
            }
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

        def on_step_end(self, args, state, control, **_):
            if progress is not None:
                progress(state.global_step, state.max_steps)

    return Writer()


def save_adapter(model: Any, folder: Path) -> None:
    """Save a model's adapter beside and rename, so that the folder is never there half written."""
    beside = folder.with_name(f".{folder.name}")
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside)
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)


@contextmanager
def trainable_as_they_are(model: Any) -> Iterator[None]:
    """Undo what building a trainer does to trainable weights: trl rounds them to bfloat16 on 4-bit models."""
    kept = {name: p.detach().clone().float() for name, p in model.named_parameters() if p.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        if name in kept:
            parameter.data = kept[name]


def left_out(run: Run, stage: str, names: Sequence[str], rows: Sequence[Encoded], limit: int) -> list[int]:
    """The numbers of the rows that are too long, each noted in dropped.jsonl under its name."""
    numbers = too_long(rows, limit)
    drops = [
        Drop(
            stage=stage,
            id=names[i],
            reason="longer_than_max_length",
            detail=f"{len(rows[i].ids)} tokens, {limit} fit",
        )
        for i in numbers
    ]
    run.replace_drops({stage}, drops)
    return numbers


def quiet() -> None:
    """Keep the libraries' own progress bars and notices off the terminal, and import Unsloth first where it is used."""
    import importlib.util

    import torch

    if torch.cuda.is_available() and importlib.util.find_spec("unsloth"):
        importlib.import_module(
            "unsloth"
        )  # it patches transformers, trl and peft, so it must come before them
    import logging
    import warnings

    for name in ("trl", "accelerate", "peft", "torch.distributed", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", module="(trl|peft|transformers|torch).*")


def free_memory() -> None:
    """Give back what a model has left behind, on the card too."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
