"""Checkpoints known to be complete and to have the same inputs; an interrupted stage resumes from the latest.

The trainer writes a checkpoint file by file, so a kill can leave half of one, and a disk can damage one later. A
complete checkpoint gets a mark, written last: its inputs and a hash of every file. Others are never resumed from.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sclite.errors import DeviceError
from sclite.files import file_digest
from sclite.run import sync, write_text

MARK = "whole.json"


class Checkpoints:
    """The checkpoints of one training: folder/checkpoint-STEP."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.inputs: Mapping[str, Any] = {}
        self.device = "cpu"

    def _marks(self) -> dict[int, dict[str, Any] | None]:
        """The mark of each checkpoint by its step, the latest first; None without a readable one."""
        steps = [path.name.removeprefix("checkpoint-") for path in self.folder.glob("checkpoint-*")]
        found: dict[int, dict[str, Any] | None] = {}
        for step in sorted((int(step) for step in steps if step.isdigit()), reverse=True):
            found[step] = None
            try:
                mark = json.loads((self.path(step) / MARK).read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            if isinstance(mark, dict) and all(isinstance(mark.get(key), dict) for key in ("inputs", "files")):
                found[step] = mark
        return found

    def path(self, step: int) -> Path:
        """The folder of the checkpoint of a step."""
        return self.folder / f"checkpoint-{step}"

    def prepare(self, inputs: Mapping[str, Any], device: str = "cpu") -> str:
        """Remove checkpoints that are incomplete, damaged or have other inputs; return a warning about the damaged ones.

        Raises DeviceError if the rest was trained on another kind of device, which has another optimizer.
        """
        self.inputs, self.device = inputs, device
        if self.recorded_inputs() not in (None, inputs):
            self.delete()
        damaged = []
        before = next((mark.get("device", device) for mark in self._marks().values() if mark), device)
        if before != device:
            message = f"the checkpoints in {self.folder} are from training on {before}, not on {device}"
            raise DeviceError(message, "resume on the same device, or delete that folder to start over")
        for step, mark in self._marks().items():
            path = self.path(step)
            now, files = _hashes(path), mark["files"] if mark else {MARK: ""}
            wrong = next((name for name, value in files.items() if now.get(name) != value), "")
            if not wrong:
                continue
            if mark or (path / MARK).is_file():
                harm = "damaged" if (path / wrong).is_file() else "missing"
                damaged.append(f"{path.name} ({wrong} is {harm})")
            shutil.rmtree(path)
        if not damaged:
            return ""
        start = f"training resumes from step {self.step()}" if self.step() else "training starts over"
        return f"damaged in {self.folder}: {', '.join(damaged)}; {start}"

    def recorded_inputs(self) -> dict[str, Any] | None:
        """The inputs of the training that these checkpoints belong to; None without a checkpoint."""
        return next((mark["inputs"] for mark in self._marks().values() if mark), None)

    def step(self) -> int:
        """The step of the last checkpoint with a mark, 0 without one."""
        return next((step for step, mark in self._marks().items() if mark), 0)

    def mark(self, step: int) -> None:
        """Record that the checkpoint of this step is complete, once its files are on disk."""
        sync_folder(self.path(step))
        content = {"step": step, "inputs": self.inputs, "device": self.device}
        content["files"] = _hashes(self.path(step))
        write_text(self.path(step) / MARK, json.dumps(content) + "\n")

    def delete(self) -> None:
        """Remove all checkpoints."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _hashes(folder: Path) -> dict[str, str]:
    """A hash of every file but the mark, by relative path."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MARK)
    return {str(path.relative_to(folder)): file_digest(path) for path in files}


def sync_folder(folder: Path) -> None:
    """Flush every file of a folder, and the entries of the folder and its parent, to disk."""
    for path in [*folder.rglob("*"), folder, folder.parent]:
        sync(path)
