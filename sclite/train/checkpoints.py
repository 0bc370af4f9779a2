"""Where an interrupted training stage resumes: checkpoints that are known to be whole, and of the same inputs.

Hugging Face's trainer writes a checkpoint file by file, so a kill can leave a folder that only looks like one, and a disk
can damage one later. Each whole checkpoint gets a mark, written last: its inputs and a hash of every file. One without a
mark, or with other files, is removed and never resumed from.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sclite.errors import UsageError
from sclite.run import Run, sync, write_text
from sclite.signature import differences
from sclite.train.metrics_logger import Progress

WHOLE = "whole.json"


class Checkpoints:
    """The checkpoints of one training: folder/checkpoint-STEP."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.inputs: Mapping[str, Any] = {}

    def begin(self, inputs: Mapping[str, Any], progress: Progress | None = None) -> None:
        """Remove checkpoints that are unfinished, damaged or of other inputs; damaged ones are named as a warning."""
        self.inputs = inputs
        begun = self.begun_from()
        if begun is not None and begun != inputs:
            self.forget()
        damaged = []
        for found in self._folders():
            marked, reason = (found / WHOLE).is_file(), _damage(found)
            if reason:
                shutil.rmtree(found)
            if reason and marked:
                damaged.append(f"{found.name} ({reason})")
        if damaged and progress is not None:
            step = self.step()
            start = f"training resumes from step {step}" if step else "training starts from its first step"
            lost = f"damaged in {self.folder}: {', '.join(damaged)}; {start}"
            progress(0, 0, warning=lost)

    def begun_from(self) -> dict[str, Any] | None:
        """The inputs of the training that was begun here; None where there is no checkpoint."""
        marks = (_mark_of(found) for found in self._folders())
        return next((mark["inputs"] for mark in marks if mark is not None), None)

    def _folders(self) -> list[Path]:
        """The checkpoints, the latest first."""
        found = [path for path in self.folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
        return sorted(found, key=_step_of, reverse=True)

    def step(self) -> int:
        """The step of the last checkpoint with a mark, 0 without one."""
        return next((_step_of(found) for found in self._folders() if _mark_of(found) is not None), 0)

    def last(self) -> str | None:
        """The folder of the last checkpoint with a mark."""
        step = self.step()
        return str(self.folder / f"checkpoint-{step}") if step else None

    def mark(self, step: int) -> None:
        """Note that the checkpoint of this step is whole; its files are forced to disk first."""
        folder = self.folder / f"checkpoint-{step}"
        sync_folder(folder)
        content = {"step": step, "inputs": self.inputs, "files": _hashes(folder)}
        write_text(folder / WHOLE, json.dumps(content) + "\n")

    def load(self, step: int, model: Any) -> bool:
        """Give the model the adapter weights of a step; False where there is no such checkpoint any more."""
        from sclite.student.adapters import load_adapter

        folder = self.folder / f"checkpoint-{step}"
        if not folder.is_dir():
            return False
        load_adapter(model, folder)
        return True

    def forget(self) -> None:
        """Remove them all."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _damage(folder: Path) -> str:
    """Why a checkpoint cannot be used; empty where it can."""
    mark = _mark_of(folder)
    if mark is None:
        return f"{WHOLE} is damaged" if (folder / WHOLE).is_file() else "unfinished"
    now = _hashes(folder)
    wrong = [name for name, value in mark["files"].items() if now.get(name) != value]
    return f"{wrong[0]} is {'damaged' if wrong[0] in now else 'missing'}" if wrong else ""


def _mark_of(folder: Path) -> dict[str, Any] | None:
    try:
        mark = json.loads((folder / WHOLE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = isinstance(mark, dict) and all(isinstance(mark.get(key), dict) for key in ("inputs", "files"))
    return mark if whole else None


def _step_of(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def _hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hash_of(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != WHOLE
    }


def hash_of(path: Path) -> str:
    """The SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Force every file of a folder, and the names in it and in its parent, to disk."""
    for path in [*folder.rglob("*"), folder, folder.parent]:
        sync(path)


def refuse_other_inputs(run: Run, stage: str, folder: Path, inputs: Mapping[str, Any], fresh: bool) -> None:
    """Raise UsageFault where this stage was trained, or begun, from other inputs and `fresh` does not allow a new start.

    Training costs hours: nothing that it has made is thrown away unasked.
    """
    begun = Checkpoints(folder)
    if fresh or (begun.step() and begun.begun_from() == inputs):  # the second: begun afresh, and broken off
        return
    manifest = run.manifest(stage)
    before, what = (manifest["inputs"], "trained") if manifest else (None, "")
    if before is None and begun.step():
        before, what = begun.begun_from(), "begun"
    if before is not None and before != inputs:
        changes = "; ".join(differences(before, inputs))
        raise UsageError(
            f"{stage} was {what} from other inputs: {changes}",
            f"set them back to go on with what is there, or add --fresh to train {stage} anew",
        )
