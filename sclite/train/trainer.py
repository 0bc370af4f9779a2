"""Train an adapter: Hugging Face's trainer over rows in a fixed order, with losses that do not depend on the micro-batch.

The denominators of a task's loss are those of the whole optimizer step, known in advance from the order, so that
halving the micro-batch and doubling the accumulation does not change any gradient.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sclite.config import TrainingStage
from sclite.errors import GpuMemoryError, ScliteError, UsageError
from sclite.progress import Progress, no_progress
from sclite.student.adapters import load_adapter
from sclite.student.cuda_memory import is_out_of_memory, return_freed_memory
from sclite.student.log_probs import mixed_precision
from sclite.train.checkpoints import Checkpoints
from sclite.train.losses import LossTerm, weighted_loss
from sclite.train.metrics_logger import MetricsLogger

if TYPE_CHECKING:
    from peft import PeftModel

FEW_STEPS = 10
EVAL_ROWS = 200  # at most; more would add little
WINDOW = 50  # optimizer steps whose rows are sorted by length together


@dataclass(frozen=True)
class TrainingTask:
    """What a stage trains on. `lengths` are tokens per row, `counts` what each row adds to the denominators, by name.

    `collate` makes a batch of row numbers, `losses` are computed from the model and a batch, and `held_out` are the
    numbers of the rows for the evaluation loss.
    """

    phase: str
    lengths: Sequence[int]
    counts: Sequence[Mapping[str, int]]
    collate: Callable[[Sequence[int]], Any]
    losses: Callable[[Any, Any], dict[str, LossTerm]]
    held_out: Sequence[int] = ()

    def totals(self, numbers: Sequence[int]) -> Counter[str]:
        """The denominators of these rows together."""
        return sum((Counter(self.counts[number]) for number in numbers), Counter[str]())

    def order(self, settings: TrainingStage, seed: int) -> list[int]:
        """The numbers of the rows that are trained, in order (`training_order`)."""
        held_out = set(self.held_out)
        rows = [number for number in range(len(self.lengths)) if number not in held_out]
        lengths = [self.lengths[number] for number in rows]
        order = training_order(lengths, settings.batch_size, settings.num_train_epochs, seed)
        return [rows[place] for place in order]


def training_order(lengths: Sequence[int], batch: int, epochs: float, seed: int) -> list[int]:
    """Row numbers, `batch` for each optimizer step, over `epochs` epochs; the last step may be smaller.

    The order depends only on the seed: a step has the same rows whatever the micro-batch, and a resumed training
    continues at the exact row. Rows of similar length (in tokens) share a step, to minimize padding. The step with the
    longest row comes first: running out of memory shows at once, not after an hour.
    """
    draw = random.Random(seed)
    wanted = max(1, round(epochs * len(lengths))) if lengths and epochs > 0 else 0
    numbers: list[int] = []
    while len(numbers) < wanted:
        epoch = list(range(len(lengths)))
        draw.shuffle(epoch)
        numbers += epoch
    numbers = numbers[:wanted]
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


def train_adapter(
    model: PeftModel,
    task: TrainingTask,
    settings: TrainingStage,
    checkpoints: Checkpoints,
    metrics: Path,
    *,
    seed: int,
    micro_batch: int,
    progress: Progress = no_progress,
) -> tuple[int, int | None, list[str]]:
    """Train the model's adapter in place, from its last complete checkpoint if there is one; logs steps to `metrics`.

    Returns (steps, the step whose weights are kept or None without an evaluation, warnings). Raises GpuMemoryError,
    ScliteError if nothing was learned, KeyboardInterrupt after Ctrl-C, once a checkpoint is saved.
    """
    from transformers import EarlyStoppingCallback

    phase, order, size = task.phase, task.order(settings, seed), settings.batch_size
    lengths = [task.lengths[number] for number in order]
    tokens = [sum(lengths[start : start + size]) for start in range(0, len(order), size)]
    step = checkpoints.step()
    logger = MetricsLogger(metrics, phase, progress, resumed_from=step, tokens=tokens)
    arguments = training_arguments(
        model, task, settings, checkpoints.folder, rows=len(order), micro_batch=micro_batch, seed=seed
    )
    trainer = build_trainer(model, task, arguments, order, logger, checkpoints)
    if task.held_out and settings.early_stopping_patience:
        trainer.add_callback(EarlyStoppingCallback(settings.early_stopping_patience))
    if (steps := len(tokens)) < FEW_STEPS:
        remedy = f"raise {phase}.num_train_epochs, lower {phase}.batch_size, or add problems"
        plural = "s" * (steps != 1)
        logger.warn(f"{phase}: only {steps} optimizer step{plural}, too few to learn much: {remedy}")
    before = _weights_hash(model)
    with catch_out_of_memory(phase, micro_batch), logger.handle_interrupts():
        trainer.train(resume_from_checkpoint=str(checkpoints.path(step)) if step else None)
    if logger.interrupted:
        raise KeyboardInterrupt
    last, best = trainer.state.global_step, trainer.state.best_global_step  # None without an evaluation
    if best and best != last:
        if checkpoints.path(best).is_dir():
            load_adapter(model, checkpoints.path(best))
        else:
            logger.warn(f"the best checkpoint (step {best}) was damaged: keeping the last step")
            best = last
    finite = _is_finite(model)
    if finite and _weights_hash(model) != before:
        return last, best, logger.warnings
    reason, change = "training did not change the adapter", "raise"
    if not finite:
        reason, change = "weights of the adapter are NaN or infinite after the last step", "lower"
    checkpoints.delete()  # they are just as useless, and the next run would resume from them
    rate = f"{phase}.learning_rate (now {settings.learning_rate:g})"
    raise ScliteError(f"{phase}: {reason}", f"{change} {rate} and re-run")


def training_arguments(
    model: PeftModel,
    task: TrainingTask,
    settings: TrainingStage,
    out: Path,
    *,
    rows: int,
    micro_batch: int,
    seed: int,
) -> dict[str, Any]:
    """transformers' TrainingArguments. `rows` are those of all epochs together; checkpoints go to `out`.

    TensorBoard's files, if it is enabled, go to tensorboard/ next to it.
    """
    import torch

    if settings.tensorboard:
        if not any(importlib.util.find_spec(name) for name in ("tensorboard", "tensorboardX")):
            raise UsageError(
                "tensorboard is enabled but not installed",
                "pip install tensorboard, or disable it: metrics.jsonl is written either way",
            )
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(out.with_name("tensorboard"))
    cuda, evaluates = torch.cuda.is_available(), bool(task.held_out)
    dtype = mixed_precision(model)
    assert settings.batch_size % micro_batch == 0, f"{micro_batch} does not divide {settings.batch_size}"
    every = math.ceil(math.ceil(rows / settings.batch_size) / settings.checkpoints)
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
        "seed": seed,
        "data_seed": seed,
    }


def _is_finite(model: PeftModel) -> bool:
    """Whether no trainable weight is NaN or infinite."""
    return all(bool(p.isfinite().all()) for p in model.parameters() if p.requires_grad)


def _weights_hash(model: PeftModel) -> str:
    """A hash of the trainable weights."""
    found = hashlib.sha256()
    for parameter in model.parameters():
        if parameter.requires_grad:
            found.update(parameter.detach().cpu().numpy().tobytes())
    return found.hexdigest()


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
    arguments: dict[str, Any],
    order: Sequence[int],
    logger: MetricsLogger,
    checkpoints: Checkpoints,
) -> Any:
    """transformers' Trainer whose rows, losses and order come from a task.

    `order` has the row numbers, one optimizer step after another.
    """
    import torch
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    batch = arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"]
    totals = [task.totals(order[start : start + batch]) for start in range(0, len(order), batch)]

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
            size, rows, found = self.args.per_device_train_batch_size, task.held_out, {"eval_loss": 0.0}
            was_training = model.training
            model.eval()
            for start in range(0, len(rows), size):
                part = task.collate(rows[start : start + size])
                with torch.no_grad(), self.accelerator.autocast():
                    loss, _ = weighted_loss(task.losses(model, part), task.totals(rows))
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
                return_freed_memory()
            if not _is_finite(model):  # before a checkpoint with such weights replaces a good one
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
        eval_dataset=list(task.held_out),
        data_collator=lambda numbers: {"numbers": numbers, "batch": task.collate(numbers)},
        callbacks=[StepCallback()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
