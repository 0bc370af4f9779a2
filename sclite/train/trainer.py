"""Train an adapter: Hugging Face's trainer over rows in a fixed order, with losses that do not depend on the micro-batch.

The denominators of a task's loss are those of the whole optimizer step, known in advance from the order, so that
halving the micro-batch and doubling the accumulation does not change any gradient.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import math
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sclite.config import TrainingStage
from sclite.errors import GpuMemoryError, ScliteError, UsageError
from sclite.files import sync, write_text
from sclite.progress import Progress, no_progress
from sclite.student.adapters import load_adapter
from sclite.student.cuda_memory import is_out_of_memory
from sclite.student.log_probs import mixed_precision
from sclite.train.losses import LossTerm, weighted_loss
from sclite.train.metrics_logger import MetricsLogger

if TYPE_CHECKING:
    from peft import PeftModel

EVAL_ROWS = 200  # at most; more would add little
MARK = "whole.json"
FEW_STEPS = 10
WINDOW = 50  # optimizer steps whose rows are sorted by length together


@dataclass(frozen=True)
class TrainingTask:
    """What a stage trains on. `lengths` are tokens per row, `counts` what each row adds to the denominators, by name.

    `collate` makes a batch of row numbers, and `losses` are computed from the model and a batch.
    """

    phase: str
    settings: TrainingStage
    seed: int
    lengths: Sequence[int]
    counts: Sequence[Mapping[str, int]]
    collate: Callable[[Sequence[int]], Any]
    losses: Callable[[Any, Any], dict[str, LossTerm]]

    def totals(self, numbers: Sequence[int]) -> Counter[str]:
        """The denominators of these rows together."""
        return sum((Counter(self.counts[number]) for number in numbers), Counter[str]())


def training_order(
    lengths: Sequence[int], batch: int, epochs: float, seed: int, held_out: Sequence[int] = ()
) -> list[int]:
    """Row numbers, `batch` for each optimizer step, over `epochs` epochs; the last step may be smaller.

    The order depends only on the seed: a step has the same rows whatever the micro-batch, and a resumed training
    continues at the exact row. Rows of similar length (in tokens) share a step, to minimize padding. The step with the
    longest row comes first: running out of memory shows at once, not after an hour.
    """
    draw, rows = random.Random(seed), sorted({*range(len(lengths))} - {*held_out})
    wanted = max(1, round(epochs * len(rows))) if rows and epochs > 0 else 0
    numbers: list[int] = []
    while len(numbers) < wanted:
        epoch = [*rows]
        draw.shuffle(epoch)
        numbers += epoch
    del numbers[wanted:]
    steps: list[list[int]] = []
    for start in range(0, wanted, WINDOW * batch):
        window = sorted(numbers[start : start + WINDOW * batch], key=lambda i: -lengths[i])
        cut = [window[i : i + batch] for i in range(0, len(window), batch)]
        partial = [cut.pop()] if len(cut[-1]) < batch else []
        draw.shuffle(cut)
        steps += [*cut, *partial]
    if len(steps) > 1:
        full = range(len(steps) - (len(steps[-1]) < batch))
        steps.insert(0, steps.pop(max(full, key=lambda s: lengths[steps[s][0]])))
    return [number for step in steps for number in step]


def held_out_rows(count: int, share: float, seed: int) -> list[int]:
    """Numbers of the rows held out for the evaluation loss; none if there would be fewer than four."""
    wanted = min(EVAL_ROWS, int(share * count))
    return sorted(random.Random(seed).sample(range(count), wanted)) if wanted >= 4 else []


class Checkpoints:
    """The checkpoints of one training: folder/checkpoint-STEP.

    The trainer writes a checkpoint file by file, so a kill can leave half of one. A complete one gets a mark, written last:
    the inputs of the training. Others are never resumed from.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.inputs: Mapping[str, Any] = {}

    def path(self, step: int) -> Path:
        """The folder of the checkpoint of a step."""
        return self.folder / f"checkpoint-{step}"

    def step(self) -> int:
        """The step of the last complete checkpoint, 0 without one."""
        marks = self.folder.glob(f"checkpoint-*/{MARK}")
        return max((int(mark.parent.name.partition("-")[2]) for mark in marks), default=0)

    def recorded_inputs(self) -> dict[str, Any] | None:
        """The inputs of the training that these checkpoints belong to; None without a complete one."""
        path = self.path(self.step()) / MARK
        return json.loads(path.read_text(encoding="utf-8"))["inputs"] if path.is_file() else None

    def prepare(self, inputs: Mapping[str, Any]) -> None:
        """Remove checkpoints that are incomplete or have other inputs."""
        self.inputs = inputs
        if self.recorded_inputs() != inputs:
            self.delete()
        for path in self.folder.glob("checkpoint-*"):
            if not (path / MARK).is_file():
                shutil.rmtree(path)

    def mark(self, step: int) -> None:
        """Record that the checkpoint of this step is complete, once its files are on disk."""
        sync_folder(self.path(step))
        write_text(self.path(step) / MARK, json.dumps({"inputs": self.inputs}) + "\n")

    def delete(self) -> None:
        """Remove all checkpoints."""
        shutil.rmtree(self.folder, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Flush every file of a folder, and the entries of the folder and its parent, to disk."""
    for path in [*folder.rglob("*"), folder, folder.parent]:
        sync(path)


def train_adapter(
    model: PeftModel,
    task: TrainingTask,
    checkpoints: Checkpoints,
    metrics: Path,
    micro_batch: int,
    progress: Progress = no_progress,
) -> int:
    """Train the model's adapter in place, from its last complete checkpoint if there is one; logs steps to `metrics`.

    Returns the number of steps; the weights are those of the best one, if there is an evaluation. Raises GpuMemoryError,
    ScliteError if weights are no numbers, KeyboardInterrupt after Ctrl-C, once a checkpoint is saved.
    """
    from transformers import EarlyStoppingCallback

    phase, settings, step = task.phase, task.settings, checkpoints.step()
    held_out = held_out_rows(len(task.lengths), settings.eval_share, task.seed)
    batch, epochs = settings.batch_size, settings.num_train_epochs
    order = training_order(task.lengths, batch, epochs, task.seed, held_out)
    logger = MetricsLogger(metrics, phase, progress, resumed_from=step)
    trainer = build_trainer(model, task, order, held_out, micro_batch, logger, checkpoints)
    if held_out and settings.early_stopping_patience:
        trainer.add_callback(EarlyStoppingCallback(settings.early_stopping_patience))
    if (steps := math.ceil(len(order) / batch)) < FEW_STEPS:
        remedy = f"raise {phase}.num_train_epochs, lower {phase}.batch_size, or add problems"
        progress(0, 0, warning=f"{phase}: only {steps} optimizer steps, too few to learn much: {remedy}")
    with catch_out_of_memory(phase, micro_batch), logger.handle_interrupts():
        trainer.train(resume_from_checkpoint=str(checkpoints.path(step)) if step else None)
    if logger.interrupted:
        raise KeyboardInterrupt
    last, best = trainer.state.global_step, trainer.state.best_global_step
    if best and best != last:
        load_adapter(model, checkpoints.path(best))
    if not all(bool(p.isfinite().all()) for p in model.parameters() if p.requires_grad):
        checkpoints.delete()  # they are just as useless, and the next run would resume from them
        rate = f"{phase}.learning_rate (now {settings.learning_rate:g})"
        message = f"{phase}: weights of the adapter are NaN or infinite after the last step"
        raise ScliteError(message, f"lower {rate} and re-run")
    return last


def training_arguments(
    model: PeftModel, task: TrainingTask, out: Path, steps: int, evaluates: bool, micro_batch: int
) -> dict[str, Any]:
    """transformers' TrainingArguments. Checkpoints go to `out`, TensorBoard's files to tensorboard/ next to it."""
    import torch

    installed = any(importlib.util.find_spec(name) for name in ("tensorboard", "tensorboardX"))
    if task.settings.tensorboard and not installed:
        hint = "pip install tensorboard, or disable it: metrics.jsonl is written either way"
        raise UsageError("tensorboard is enabled but not installed", hint)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(out.with_name("tensorboard"))
    cuda, dtype = torch.cuda.is_available(), mixed_precision(model)
    settings, every = task.settings, math.ceil(steps / task.settings.checkpoints)
    return {
        "output_dir": str(out),
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": settings.batch_size // micro_batch,
        "learning_rate": settings.learning_rate,
        "num_train_epochs": 1,  # the order already contains all epochs
        "train_sampling_strategy": "sequential",
        "warmup_steps": settings.warmup_ratio,
        "max_grad_norm": settings.max_grad_norm,
        "weight_decay": 0.0,
        "optim": "adamw_8bit" if cuda else "adamw_torch",
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "use_cpu": not cuda,
        "gradient_checkpointing": cuda,
        "logging_steps": 1,
        "save_steps": every,
        "restore_callback_states_from_checkpoint": True,  # the count of early stopping
        # besides the best, the older one is kept until the newer one is known to be complete
        "save_total_limit": 3 if evaluates else 2,
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": every if evaluates else None,
        "metric_for_best_model": "eval_loss" if evaluates else None,
        "report_to": ["tensorboard"] if settings.tensorboard else [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "seed": task.seed,
        "data_seed": task.seed,
    }


@contextmanager
def catch_out_of_memory(phase: str, micro_batch: int) -> Iterator[None]:
    """Raise GpuMemoryError for whatever the libraries raise when the GPU runs out of memory."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise GpuMemoryError(phase, micro_batch) from error
        raise


def build_trainer(
    model: PeftModel,
    task: TrainingTask,
    order: Sequence[int],
    held_out: Sequence[int],
    micro_batch: int,
    logger: MetricsLogger,
    checkpoints: Checkpoints,
) -> Any:
    """transformers' Trainer whose rows, losses and order come from a task.

    `order` has the row numbers, one optimizer step after another; `held_out` those for the evaluation loss.
    """
    import torch
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    batch, out = task.settings.batch_size, checkpoints.folder
    totals = [task.totals(order[start : start + batch]) for start in range(0, len(order), batch)]
    arguments = training_arguments(model, task, out, len(totals), bool(held_out), micro_batch)

    class AdapterTrainer(Trainer):
        def create_scheduler(self, num_training_steps, optimizer=None):
            """transformers' cosine with warm-up, but the warm-up counts from 1: no step has a rate of 0."""
            warmup = self.args.get_warmup_steps(num_training_steps)

            def factor(step):
                if step < warmup:
                    return (step + 1) / warmup
                return (1 + math.cos(math.pi * (step - warmup) / max(1, num_training_steps - warmup))) / 2

            if self.lr_scheduler is None:
                self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
            return self.lr_scheduler

        def get_batch_samples(self, epoch_iterator, num_batches, device):
            """Unsloth's would count labels, which these batches do not have."""
            return list(islice(epoch_iterator, num_batches)), None

        def training_step(self, model, inputs, num_items_in_batch=None):
            model.train()
            with self.accelerator.autocast():
                terms = task.losses(model, inputs["batch"])
                loss, figures = weighted_loss(terms, totals[self.state.global_step])
            self.accelerator.backward(loss)
            figures["loss"] = loss.detach()  # where it is NaN, the trainer logs 0
            logger.add(figures, sum(task.lengths[number] for number in inputs["numbers"]))
            return loss.detach()

        def evaluate(self, *_, **__):
            found = {"eval_loss": 0.0}
            was_training = model.training
            model.eval()
            for start in range(0, len(held_out), micro_batch):
                part = task.collate(held_out[start : start + micro_batch])
                with torch.no_grad(), self.accelerator.autocast():
                    loss, _ = weighted_loss(task.losses(model, part), task.totals(held_out))
                found["eval_loss"] += float(loss)
            model.train(was_training)
            self.log(dict(found))
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
            return found

        def log(self, logs, start_time=None):
            if self.args.fp16 and not math.isfinite(logs.get("grad_norm", 0.0)):
                del logs["grad_norm"]  # the gradient scaler skipped this step, to lower its scale
            super().log(logger.log_step(logs, self.state.global_step, self.state.max_steps))

    class StepCallback(TrainerCallback):
        """Saves and stops after Ctrl-C, stops at NaN, evaluates the last step, and marks complete checkpoints."""

        def on_train_begin(self, args, state, control, **_):
            state.compute_steps(args, state.max_steps)  # a checkpoint restores those of its own settings

        def on_step_end(self, args, state, control, model, **_):
            if model.device.type == "cpu":
                # return freed heap memory to the system, or the heap grows with every new row length; a lower mmap threshold
                # keeps it smaller still, but costs 10 % more CPU time in page faults
                ctypes.CDLL(None).malloc_trim(0)
            trained = (p for p in model.parameters() if p.requires_grad)
            # before a checkpoint with such weights replaces a good one
            if not all(bool(p.isfinite().all()) for p in trained):
                control.should_training_stop = True
                control.should_save = control.should_evaluate = False
            elif logger.interrupted:
                control.should_save = control.should_training_stop = True
            elif state.global_step >= state.max_steps and args.eval_strategy != "no":
                control.should_evaluate = True

        def on_save(self, args, state, control, **_):
            checkpoints.mark(state.global_step)

    if arguments["gradient_checkpointing"]:
        model.enable_input_require_grads()
    trainer = AdapterTrainer(
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=list(order),
        eval_dataset=list(held_out),
        data_collator=lambda numbers: {"numbers": numbers, "batch": task.collate(numbers)},
        callbacks=[StepCallback()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
