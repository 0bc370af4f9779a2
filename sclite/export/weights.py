"""The tensors of a Hugging Face model folder, one at a time."""

import json
from collections.abc import Iterator
from pathlib import Path

from sclite.errors import DataFault


def read_json(path: Path) -> dict:
    """A JSON object from a file; DataFault when it is missing or malformed."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as fault:
        raise DataFault(f"{path} is missing", "give the folder of a whole model") from fault
    except ValueError as fault:
        raise DataFault(f"{path} is not JSON: {fault}", "copy or download the folder again") from fault
    if not isinstance(found, dict):
        raise DataFault(f"{path} holds no JSON object", "copy or download the folder again")
    return found


class Tensors:
    """Tensors by name from the safetensors files of a folder, sharded or not; each is read when it is asked for."""

    def __init__(self, folder: Path):
        """Raises DataFault when the folder has no safetensors weights or a shard is missing."""
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        single = folder / "model.safetensors"
        if index.is_file():
            self._file = {name: folder / file for name, file in read_json(index)["weight_map"].items()}
            missing = sorted({path.name for path in self._file.values() if not path.is_file()})
            if missing:
                raise DataFault(f"{folder} lacks {', '.join(missing)}", "download the model again")
        elif single.is_file():
            with self._open(single) as weights:
                self._file = dict.fromkeys(weights.keys(), single)
        else:
            raise DataFault(
                f"{folder} has no model.safetensors",
                "load the model with transformers and save_pretrained() it, which writes safetensors",
            )

    @staticmethod
    def _open(path: Path):
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(path, framework="pt")
        except SafetensorError as fault:
            raise DataFault(
                f"{path} is not a whole safetensors file: {fault}", "download or save it again"
            ) from fault

    def __iter__(self) -> Iterator[str]:
        return iter(self._file)

    def __contains__(self, name: str) -> bool:
        return name in self._file

    def __getitem__(self, name: str):
        """The tensor on the CPU, in the type it is stored in."""
        with self._open(self._file[name]) as weights:
            return weights.get_tensor(name)

    def size(self, name: str) -> int:
        """Number of elements, without reading them."""
        with self._open(self._file[name]) as weights:
            count = 1
            for length in weights.get_slice(name).get_shape():
                count *= length
            return count
