"""What the training stages share: an adapter saved whole, and quiet libraries."""

import shutil
from pathlib import Path
from typing import Any


def save_adapter(model: Any, folder: Path) -> None:
    """Save a model's adapter beside and rename, so that the folder is never there half written."""
    beside = folder.with_name(f".{folder.name}")
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside)
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)


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
