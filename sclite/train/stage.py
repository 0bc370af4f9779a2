"""What SFT, warm-up and DPO have in common: `run_training_stage` trains, saves and signs one adapter."""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sclite.config import Config, Student
from sclite.errors import DataError
from sclite.run import Report, Run, timed
from sclite.student.adapters import adapted_layers
from sclite.student.loader import (
    EMBEDDED,
    fetch_model,
    load_student,
    load_tokenizer,
    model_name,
    select_backend,
)
from sclite.student.origin import record_origin
from sclite.train.checkpoints import Checkpoints, refuse_other_inputs, sync_folder
from sclite.train.label_checks import check_tokenizer
from sclite.train.memory import choose_micro_batch
from sclite.train.metrics_logger import Progress
from sclite.train.trainer import Lesson, train_adapter

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

BuildLesson = Callable[["PeftModel", int], Lesson]
"""From the loaded model and the micro-batch size to the lesson."""


def run_training_stage(
    config: Config,
    run: Run,
    report: Report,
    inputs: dict[str, Any],
    prepare: Callable[[PreTrainedTokenizerBase], BuildLesson],
    *,
    start_from: str | None,
    fresh: bool,
    progress: Progress | None,
) -> Report:
    """Train the stage of `report` and save its adapter as STAGE/adapter; resume if it was interrupted.

    `prepare` tokenizes and checks the rows before the weights are loaded, which takes a minute. `start_from` is the
    folder of an adapter in the run, None for a new one. Raises UsageError if the stage was trained with other inputs and
    `fresh` is not set.
    """
    stage = report.stage
    checkpoints = Checkpoints(run.path(f"{stage}/checkpoints"))
    refuse_other_inputs(run, stage, checkpoints.folder, inputs, fresh)
    with timed(report):
        quiet_libraries(config.student)
        checkpoints.prepare(inputs, progress)
        tokenizer = load_tokenizer(model_name(config.student))
        check_tokenizer(tokenizer)
        build_lesson = prepare(tokenizer)
        micro_batch = choose_micro_batch(config, stage)
        adapter = run.path(start_from) if start_from else None
        model, tokenizer = load_student(config, stage, adapter, train=True)
        outcome = train_adapter(
            model,
            tokenizer,
            build_lesson(model, micro_batch),
            config.stage(stage),
            checkpoints,
            run.path(f"{stage}/metrics.jsonl"),
            seed=config.seed,
            micro_batch=micro_batch,
            progress=progress,
        )
        save_adapter(model, run, stage)
    report.counts["steps"] = outcome.steps
    report.figures |= {"best_step": outcome.best, "warnings": outcome.warnings}
    if adapter is None:
        report.figures["lora"] = adapted_layers(model)
    sign_adapter(run, report, inputs)
    checkpoints.delete()
    return report


def save_adapter(model: PeftModel, run: Run, stage: str) -> None:
    """Save a model's adapter as STAGE/adapter of the run, by rename, so that it is never half-written.

    Removes an older manifest of the stage first: it signs another adapter.
    """
    folder = run.path(f"{stage}/adapter")
    run.mark_started(stage)
    run.path(f"done/{stage}.json").unlink(missing_ok=True)
    temporary = folder.with_name(".adapter")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    record_origin(model, fetch_model(model.config.name_or_path), temporary)
    sync_folder(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    sync_folder(folder)


def sign_adapter(run: Run, report: Report, inputs: dict[str, Any]) -> None:
    """Write the stage's manifest, with the digest by which `finished_report` recognizes its adapter."""
    report.figures["adapter"] = run.file_digest(adapter_weights(report.stage))
    run.sign(report.stage, inputs, report)


def finished_report(run: Run, stage: str, inputs: dict[str, Any], fresh: bool) -> Report | None:
    """The report of a stage that is finished with these inputs, None if it has to be trained.

    Raises DataError if its adapter is not the one that it wrote, unless `fresh` allows training it again.
    """
    adapter = adapter_weights(stage)
    manifest = run.done(stage, inputs, adapter)
    if manifest is None or manifest["figures"].get("adapter") in (None, run.file_digest(adapter)):
        return Report.of(manifest) if manifest else None
    if fresh:
        return None
    raise DataError(
        f"{run.path(adapter)} is not the adapter that {stage} wrote: it is damaged or was replaced",
        "restore it from a backup, or add --fresh to train it again",
    )


def adapter_weights(stage: str) -> str:
    """The weights of a stage's adapter, relative to the run folder."""
    return f"{stage}/adapter/adapter_model.safetensors"


def student_inputs(config: Config) -> dict[str, Any]:
    """The student settings that decide what is trained; the embedded student is the same on every machine."""
    name = EMBEDDED if config.student.model == EMBEDDED else model_name(config.student)
    return {"student.model": name, "student.load_in_4bit": config.student.load_in_4bit}


def quiet_libraries(student: Student | None = None) -> None:
    """Silence the progress bars and notices of the training libraries; import Unsloth first if it trains `student`."""
    if student is not None and select_backend(student) == "unsloth":
        # its statistics contact a server, and shorten every later timeout
        os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
        os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(Path.home() / ".cache/sclite/unsloth"))
        os.environ.setdefault("HF_HUB_ENABLE_HF_TRANSFER", "0")
        # it patches transformers, trl and peft, so it has to be imported before them
        importlib.import_module("unsloth")
    for name in ("trl", "accelerate", "peft", "torch.distributed", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", module="(trl|peft|transformers|torch).*")
