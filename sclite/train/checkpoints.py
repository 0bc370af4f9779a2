"""Where a broken training stage goes on: checkpoints that are known to be whole, and of the same inputs.

Hugging Face's trainer writes a checkpoint file by file, so a kill can leave a folder that looks like one. Each whole one
gets a mark of its own, written last; what has none is removed and never resumed from.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sclite.errors import UsageFault
from sclite.run import Run, write_text
from sclite.signature import brought_up, differences

WHOLE, BEGUN = "whole.json", "begun.json"


class Checkpoints:
    """The checkpoints of one training: folder/checkpoint-STEP, and in folder/begun.json what they are made from."""

    def __init__(self, folder: Path):
        self.folder = folder

    def begin(self, inputs: Mapping[str, Any]) -> None:
        """Make the folder ready for a training from these inputs: those of others and broken ones are removed."""
        begun = self.begun_from()
        if begun is None or brought_up(begun, inputs) != inputs:
            self.forget()
        for found in self.folder.glob("checkpoint-*"):
            if not (found / WHOLE).is_file():
                shutil.rmtree(found)
        write_text(self.folder / BEGUN, json.dumps(inputs) + "\n")

    def begun_from(self) -> dict[str, Any] | None:
        """The inputs of the training that was begun here; None where there is none."""
        path = self.folder / BEGUN
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def step(self) -> int:
        """The step of the last whole checkpoint, 0 without one."""
        steps = [
            int(found.parent.name.rpartition("-")[2]) for found in self.folder.glob(f"checkpoint-*/{WHOLE}")
        ]
        return max(steps, default=0)

    def last(self) -> str | None:
        """The folder of the last whole checkpoint."""
        step = self.step()
        return str(self.folder / f"checkpoint-{step}") if step else None

    def mark(self, step: int) -> None:
        """Note that the checkpoint of this step is whole."""
        write_text(self.folder / f"checkpoint-{step}" / WHOLE, json.dumps({"step": step}) + "\n")

    def load(self, step: int, model: Any) -> None:
        """Give the model the adapter weights of a step."""
        from sclite.student.adapters import put_adapter

        put_adapter(model, self.folder / f"checkpoint-{step}")

    def forget(self) -> None:
        """Remove them all."""
        shutil.rmtree(self.folder, ignore_errors=True)


def refuse_other_inputs(run: Run, stage: str, folder: Path, inputs: Mapping[str, Any], fresh: bool) -> None:
    """Raise UsageFault where this stage was trained, or begun, from other inputs and `fresh` does not allow a new start.

    Training costs hours: nothing that it has made is thrown away unasked.
    """
    begun = Checkpoints(folder)
    if fresh or (begun.step() and begun.begun_from() == inputs):  # the second: begun afresh, and broken off
        return
    manifest = run.finished(stage)
    before, what = (manifest["inputs"], "trained") if manifest else (None, "")
    if before is None and begun.step():
        before, what = begun.begun_from(), "begun"
    before = None if before is None else brought_up(before, inputs)
    if before is not None and before != inputs:
        changes = "; ".join(differences(before, inputs))
        raise UsageFault(
            f"{stage} was {what} from other inputs: {changes}",
            f"set them back to go on with what is there, or add --fresh to train {stage} anew",
        )
