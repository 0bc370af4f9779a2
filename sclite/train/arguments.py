"""A stage's settings as the TrainingArguments of Hugging Face's trainer."""

import importlib.util
import os
from pathlib import Path
from typing import Any

from sclite.config import TrainingStage
from sclite.errors import UsageError


def training_arguments(
    folder: Path,
    settings: TrainingStage,
    *,
    seed: int,
    micro_batch: int,
    rows: int,
    evaluates: bool = False,
    bf16_on_cpu: bool = False,
) -> dict[str, Any]:
    """Arguments for SFTConfig and DPOConfig. `rows` are those of all epochs together; a GPU decides on bfloat16 itself.

    TensorBoard's files, if it is enabled, go to tensorboard/ beside the checkpoints.
    """
    import torch

    if settings.tensorboard:
        if not any(importlib.util.find_spec(name) for name in ("tensorboard", "tensorboardX")):
            raise UsageError(
                "tensorboard is enabled but not installed",
                "pip install tensorboard, or disable it: metrics.jsonl is written either way",
            )
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder.with_name("tensorboard"))
    cuda = torch.cuda.is_available()
    assert settings.batch_size % micro_batch == 0, f"{micro_batch} does not divide {settings.batch_size}"
    every = max(1, -(-rows // settings.batch_size) // settings.checkpoints)
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": settings.batch_size // micro_batch,
        "learning_rate": settings.learning_rate,
        "num_train_epochs": 1,  # the order contains all epochs already
        "train_sampling_strategy": "sequential",
        "warmup_steps": settings.warmup_ratio,
        "max_grad_norm": settings.max_grad_norm,
        "weight_decay": 0.0,  # Unsloth's trainers have another default
        "optim": "adamw_8bit" if cuda else "adamw_torch",
        "bf16": torch.cuda.is_bf16_supported() if cuda else bf16_on_cpu,
        "fp16": cuda and not torch.cuda.is_bf16_supported(),
        "use_cpu": not cuda,
        "gradient_checkpointing": cuda,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": every,
        "restore_callback_states_from_checkpoint": True,  # the count of early stopping
        "save_total_limit": 2,  # the older one stays until the newer one is known to be complete
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": every if evaluates else None,
        "metric_for_best_model": "eval_loss" if evaluates else None,
        "greater_is_better": False,
        "report_to": ["tensorboard"] if settings.tensorboard else [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "seed": seed,
        "data_seed": seed,
        "max_length": None,
    }
