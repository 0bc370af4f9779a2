"""Training an adapter: Hugging Face's trainer over rows in a fixed order, with losses that no micro-batch changes.

The trainer brings the optimizer, its schedule, gradient clipping, mixed precision and checkpoints. What a stage brings is
a `Lesson`. The denominators of its loss are those of the whole optimizer step, known from the order beforehand, so that
halving the micro-batch and doubling the accumulation leaves every gradient as it was.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from sclite.config import TrainingStage
from sclite.errors import GpuMemoryError, ScliteError
from sclite.student.cuda_memory import is_out_of_memory
from sclite.train.arguments import arguments
from sclite.train.checkpoints import Checkpoints
from sclite.train.losses import LossTerm, weighted_loss
from sclite.train.metrics_logger import MetricsLogger, Progress
from sclite.train.order import training_order

FEW_STEPS = 20
EVAL_ROWS = 200  # at most; more would tell little more


@dataclass(frozen=True)
class Lesson:
    """What a stage trains on. `lengths` are tokens per row, `counts` what each row adds to the denominators, by name.

    `held_out` are the numbers of the rows for the evaluation loss.
    """

    phase: str
    lengths: Sequence[int]
    counts: Sequence[Mapping[str, int]]
    collate: Callable[[Sequence[int]], Any]
    losses: Callable[[Any, Any], dict[str, LossTerm]]
    held_out: Sequence[int] = ()


@dataclass
class Outcome:
    """How a training went. `best` is the step whose weights are kept, None where no evaluation chose it."""

    steps: int
    best: int | None = None
    warnings: list[str] = field(default_factory=list)


def held_out_rows(count: int, share: float, seed: int) -> list[int]:
    """Numbers of the rows that are kept for the evaluation loss: none where the share makes fewer than four."""
    import random

    wanted = min(EVAL_ROWS, int(share * count))
    return sorted(random.Random(seed).sample(range(count), wanted)) if wanted >= 4 else []


def train_adapter(
    model: Any,
    tokenizer: Any,
    lesson: Lesson,
    settings: TrainingStage,
    checkpoints: Checkpoints,
    metrics: Path,
    *,
    seed: int,
    micro_batch: int,
    progress: Progress | None = None,
) -> Outcome:
    """Train the model's adapter in place, from its last whole checkpoint where there is one.

    Figures of each step are appended to `metrics`. Raises MemoryFault where the card has too little memory,
    KeyboardInterrupt after Ctrl-C, once a checkpoint is saved.
    """
    kept = set(lesson.held_out)
    rows = [i for i in range(len(lesson.lengths)) if i not in kept]
    order = [
        rows[i]
        for i in training_order(
            [lesson.lengths[i] for i in rows], settings.batch_size, settings.num_train_epochs, seed
        )
    ]
    logger = MetricsLogger(metrics, lesson.phase, progress)
    logger.resume(checkpoints.step())
    given = arguments(checkpoints.folder, settings, seed, micro_batch, len(order), bool(kept))
    trainer = _build(model, tokenizer, lesson, given, numbered(order, settings.batch_size))
    trainer.lesson, trainer.logger, trainer.held_out = lesson, logger, sorted(kept)
    trainer.totals = [
        _total(lesson, order[s : s + settings.batch_size]) for s in range(0, len(order), settings.batch_size)
    ]
    for callback in _callbacks(checkpoints, logger, settings.early_stopping_patience if kept else 0):
        trainer.add_callback(callback)
    steps = len(trainer.totals)
    if steps < FEW_STEPS:
        logger.warn(_few_steps(lesson.phase, steps))
    before = _fingerprint(model)
    with catch_out_of_memory(lesson.phase, micro_batch), logger.interruptions():
        trainer.train(resume_from_checkpoint=checkpoints.last())
    if logger.interrupted:
        raise KeyboardInterrupt
    best = trainer.state.best_global_step if kept else None
    if best and best != trainer.state.global_step and not checkpoints.load(best, model):
        logger.warn(f"the checkpoint of step {best}, the best one, was damaged: the last step is kept")
        best = trainer.state.global_step
    _refuse_untrained(model, before, lesson.phase, settings.learning_rate, checkpoints)
    return Outcome(trainer.state.global_step, best or None, logger.warnings)


def _few_steps(phase: str, steps: int) -> str:
    times = f"only {steps} optimizer step{'s' * (steps != 1)}"
    return f"{phase}: {times}, which teaches little: raise {phase}.num_train_epochs, lower {phase}.batch_size, or add problems"


def _fingerprint(model: Any) -> str:
    """A hash of the trainable weights."""
    found = hashlib.sha256()
    for parameter in model.parameters():
        if parameter.requires_grad:
            found.update(parameter.detach().cpu().numpy().tobytes())
    return found.hexdigest()


def _refuse_untrained(model: Any, before: str, phase: str, rate: float, checkpoints: Checkpoints) -> None:
    """Raise ScliteError where training has left the adapter as it was, or with weights that are not numbers."""
    if not all(bool(p.isfinite().all()) for p in model.parameters() if p.requires_grad):
        reason, change = "weights of the adapter are not numbers after the last step", "lower"
    elif _fingerprint(model) == before:
        reason, change = "no weight of the adapter has changed in training", "raise"
    else:
        return
    checkpoints.forget()  # they are as useless, and the next run would resume from them
    raise ScliteError(
        f"{phase}: {reason}", f"{change} {phase}.learning_rate (now {rate:g}) and run the command again"
    )


@contextmanager
def catch_out_of_memory(phase: str, micro_batch: int) -> Iterator[None]:
    """Turn what libraries raise when the card's memory is used up into a MemoryFault."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise GpuMemoryError(phase, micro_batch) from error
        raise


def _total(lesson: Lesson, numbers: Sequence[int]) -> Counter[str]:
    total: Counter[str] = Counter()
    for number in numbers:
        total.update(lesson.counts[number])
    return total


def _callbacks(checkpoints: Checkpoints, logger: MetricsLogger, patience: int) -> list[Any]:
    """What the trainer tells of: a step that may be the last, and a checkpoint that is whole."""
    from transformers import EarlyStoppingCallback, TrainerCallback

    class Keeper(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if logger.interrupted:
                control.should_save = control.should_training_stop = True
            elif state.global_step >= state.max_steps and args.eval_strategy != "no":
                control.should_evaluate = True

        def on_save(self, args, state, control, **_):
            checkpoints.mark(state.global_step)

    return [Keeper(), *([EarlyStoppingCallback(patience)] if patience else [])]


def _build(model: Any, tokenizer: Any, lesson: Lesson, settings: dict[str, Any], order: Any) -> Any:
    """TRL's trainer of the stage, with what its making changes in the model undone."""
    from transformers import PrinterCallback
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    prefers = lesson.phase == "dpo"
    base, config = (DPOTrainer, DPOConfig) if prefers else (SFTTrainer, SFTConfig)
    with trainable_as_they_are(model):
        trainer = _trainer_class(base)(
            model=model,
            args=config(**settings, **({} if prefers else {"loss_type": "nll"})),
            train_dataset=order,
            eval_dataset=order if settings["eval_strategy"] != "no" else None,
            data_collator=_collator(lesson),
            processing_class=tokenizer,
        )
    trainer.args._n_gpu = 1  # else the trainer splits every micro-batch over all cards it sees
    trainer.remove_callback(PrinterCallback)
    if "ref" in model.peft_config:  # TRL's copy of the adapter; our reference is kept in the run
        model.delete_adapter("ref")
    return trainer


@contextmanager
def trainable_as_they_are(model: Any) -> Iterator[None]:
    """Undo what building a trainer does to trainable weights: trl rounds them to bfloat16 on 4-bit models."""
    kept = {name: p.detach().clone().float() for name, p in model.named_parameters() if p.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        if name in kept:
            parameter.data = kept[name]


def numbered(order: Sequence[int], batch: int) -> Any:
    """A data set of row numbers and optimizer steps: TRL wants one of its own kind, our rows are tokenised already."""
    import datasets

    steps = [place // batch for place in range(len(order))]
    return datasets.Dataset.from_dict({"number": list(order), "step": steps})


def _collator(lesson: Lesson) -> Callable[[Sequence[Mapping[str, int]]], dict[str, Any]]:
    """From items of `numbered` to a micro-batch, its optimizer step, and its tokens without padding."""

    def collate(items: Sequence[Mapping[str, int]]) -> dict[str, Any]:
        numbers = [item["number"] for item in items]
        tokens = sum(lesson.lengths[number] for number in numbers)
        return {"batch": lesson.collate(numbers), "step": items[0]["step"], "tokens": tokens}

    return collate


def _trainer_class(base: type) -> type:
    """A trainer of TRL's that knows nothing of rows, losses and order but what its lesson says."""
    import torch
    from transformers import Trainer

    class AdapterTrainer(base):
        lesson: Lesson
        logger: MetricsLogger
        held_out: Sequence[int]
        totals: Sequence[Mapping[str, int]]

        def _prepare_dataset(self, dataset, *_, **__):
            return dataset

        def create_scheduler(self, num_training_steps, optimizer=None):
            """Cosine with warm-up as transformers has it, but warm-up counts from 1: no step has a rate of 0."""
            warmup = self.args.get_warmup_steps(num_training_steps)

            def factor(step):
                if step < warmup:
                    return (step + 1) / warmup
                return (1 + math.cos(math.pi * (step - warmup) / max(1, num_training_steps - warmup))) / 2

            if self.lr_scheduler is None:
                self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
            return self.lr_scheduler

        def get_batch_samples(self, epoch_iterator, num_batches, device):
            return list(islice(epoch_iterator, num_batches)), None

        def training_step(self, model, inputs, num_items_in_batch=None):
            model.train()
            loss, figures = self._loss(model, inputs["batch"], self.totals[inputs["step"]])
            self.accelerator.backward(loss)
            self.logger.add(figures, inputs["tokens"])
            return loss.detach()

        def _loss(self, model, batch, totals):
            with self.accelerator.autocast():
                return weighted_loss(self.lesson.losses(model, batch), totals)

        def evaluate(self, *_, **__):
            model, size = self.model, self.args.per_device_train_batch_size
            totals, found = _total(self.lesson, self.held_out), Counter()
            was_training = model.training
            model.eval()
            for start in range(0, len(self.held_out), size):
                batch = self.lesson.collate(self.held_out[start : start + size])
                with torch.no_grad():
                    found["eval_loss"] += float(self._loss(model, batch, totals)[0])
            model.train(was_training)
            self.log(dict(found))
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, dict(found))
            return dict(found)

        def log(self, logs, start_time=None):
            Trainer.log(self, self.logger.row(logs, self.state.global_step, self.state.max_steps))

        def _save_checkpoint(self, model, trial):
            Trainer._save_checkpoint(self, model, trial)

    return AdapterTrainer
