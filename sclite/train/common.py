"""What the training stages share: an adapter saved whole, and quiet libraries."""

import importlib
import os
import shutil
from pathlib import Path
from typing import Any

from sclite.config import Config, Student
from sclite.errors import DataError
from sclite.run import Run
from sclite.student.loader import EMBEDDED, fetch_model, model_name, select_backend
from sclite.student.origin import record_origin
from sclite.train.checkpoints import sync_folder


def save_adapter(model: Any, run: Run, stage: str, name: str) -> None:
    """Save a model's adapter as the folder `name` of the run, beside and then by rename, so that it is never half there.

    An older manifest of the stage goes first: it signs another adapter.
    """
    folder = run.path(name)
    run.mark_started(stage)
    run.path(f"done/{stage}.json").unlink(missing_ok=True)
    beside = folder.with_name(f".{folder.name}")
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside)
    record_origin(model, fetch_model(model.config.name_or_path), beside)
    sync_folder(beside)
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)
    sync_folder(folder)


def done(run: Run, stage: str, inputs: dict[str, Any], adapter: str, fresh: bool) -> dict[str, Any] | None:
    """The manifest of a stage that was finished from these inputs, None where it is to be trained.

    Raises DataFault where the adapter is not the one that the stage wrote, unless `fresh` allows to train it again.
    """
    manifest = run.done(stage, inputs, adapter)
    if manifest is None or manifest["figures"].get("adapter") in (None, run.file_digest(adapter)):
        return manifest
    if fresh:
        return None
    raise DataError(
        f"{run.path(adapter)} is not the adapter that {stage} wrote: it is damaged, or was replaced",
        "restore it from a copy, or train it again with --fresh",
    )


def written(run: Run, adapter: str) -> dict[str, str]:
    """The figure by which `done` knows the adapter of a stage again."""
    return {"adapter": run.file_digest(adapter)}


def student_inputs(config: Config) -> dict[str, Any]:
    """What of the student decides the result of a training; the embedded one is the same wherever sclite is installed."""
    name = EMBEDDED if config.student.model == EMBEDDED else model_name(config.student)
    return {"student.model": name, "student.load_in_4bit": config.student.load_in_4bit}


def quiet(student: Student | None = None) -> None:
    """Keep the libraries' own progress bars and notices off the terminal; import Unsloth first where it trains `student`."""
    if student is not None and select_backend(student) == "unsloth":
        os.environ.setdefault(
            "UNSLOTH_DISABLE_STATISTICS", "1"
        )  # it asks a server, and shortens every later time-out
        os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(Path.home() / ".cache/sclite/unsloth"))
        os.environ.setdefault("HF_HUB_ENABLE_HF_TRANSFER", "0")
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
