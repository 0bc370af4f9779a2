"""Checkpoints that are known to be complete and to have the same inputs; an interrupted stage resumes from the last one.

Hugging Face's trainer writes a checkpoint file by file, so a kill can leave a folder that only looks like one, and a disk
can damage one later. Each complete checkpoint gets a mark, written last: its inputs and a hash of every file. A checkpoint
without a mark, or with other files, is removed and never resumed from.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sclite.run import sync, write_text

if TYPE_CHECKING:
    from peft import PeftModel

MARK = "whole.json"


class Checkpoints:
    """The checkpoints of one training: folder/checkpoint-STEP."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.inputs: Mapping[str, Any] = {}

    def prepare(self, inputs: Mapping[str, Any]) -> str:
        """Remove checkpoints that are incomplete, damaged or of other inputs; return a warning of the damaged ones."""
        self.inputs = inputs
        recorded = self.recorded_inputs()
        if recorded is not None and recorded != inputs:
            self.delete()
        damaged = []
        for found in self._folders():
            marked, reason = (found / MARK).is_file(), _damage(found)
            if reason:
                shutil.rmtree(found)
            if reason and marked:
                damaged.append(f"{found.name} ({reason})")
        if not damaged:
            return ""
        step = self.step()
        start = f"training resumes from step {step}" if step else "training starts over"
        return f"damaged in {self.folder}: {', '.join(damaged)}; {start}"

    def recorded_inputs(self) -> dict[str, Any] | None:
        """The inputs of the training that these checkpoints belong to; None without a checkpoint."""
        marks = (_read_mark(found) for found in self._folders())
        return next((mark["inputs"] for mark in marks if mark is not None), None)

    def _folders(self) -> list[Path]:
        """The checkpoints, the latest first."""
        found = [path for path in self.folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
        return sorted(found, key=_step_of, reverse=True)

    def step(self) -> int:
        """The step of the last checkpoint with a mark, 0 without one."""
        return next((_step_of(found) for found in self._folders() if _read_mark(found) is not None), 0)

    def last(self) -> str | None:
        """The folder of the last checkpoint with a mark."""
        step = self.step()
        return str(self.folder / f"checkpoint-{step}") if step else None

    def mark(self, step: int) -> None:
        """Record that the checkpoint of this step is complete, once its files are on disk."""
        folder = self.folder / f"checkpoint-{step}"
        sync_folder(folder)
        content = {"step": step, "inputs": self.inputs, "files": _hashes(folder)}
        write_text(folder / MARK, json.dumps(content) + "\n")

    def load(self, step: int, model: PeftModel) -> bool:
        """Load the adapter weights of a step into the model; False if that checkpoint is gone."""
        from sclite.student.adapters import load_adapter

        folder = self.folder / f"checkpoint-{step}"
        if not folder.is_dir():
            return False
        load_adapter(model, folder)
        return True

    def delete(self) -> None:
        """Remove all checkpoints."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _damage(folder: Path) -> str:
    """Why a checkpoint cannot be used; empty if it can."""
    mark = _read_mark(folder)
    if mark is None:
        return f"{MARK} is damaged" if (folder / MARK).is_file() else "incomplete"
    now = _hashes(folder)
    wrong = [name for name, value in mark["files"].items() if now.get(name) != value]
    return f"{wrong[0]} is {'damaged' if wrong[0] in now else 'missing'}" if wrong else ""


def _read_mark(folder: Path) -> dict[str, Any] | None:
    try:
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    valid = isinstance(mark, dict) and all(isinstance(mark.get(key), dict) for key in ("inputs", "files"))
    return mark if valid else None


def _step_of(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def _hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file but the mark, by relative path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MARK:
            with open(path, "rb") as file:
                found[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def sync_folder(folder: Path) -> None:
    """Force every file of a folder, and the names in it and in its parent, to disk."""
    for path in [*folder.rglob("*"), folder, folder.parent]:
        sync(path)
