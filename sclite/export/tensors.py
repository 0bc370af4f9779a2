"""The tensors of a Hugging Face model folder, one at a time."""

import json
from collections.abc import Iterator
from pathlib import Path

from sclite.errors import DataError


def read_json(path: Path) -> dict:
    """A JSON object from a file; DataFault when it is missing or malformed."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing", "give the folder of a whole model") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}", "copy or download the folder again") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} holds no JSON object", "copy or download the folder again")
    return found


class Tensors:
    """Tensors by name from the safetensors files of a folder, sharded or not; each is read when it is asked for."""

    def __init__(self, folder: Path):
        """Raises DataFault when the folder has no safetensors weights or a shard is missing."""
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        single = folder / "model.safetensors"
        if index.is_file():
            places = read_json(index).get("weight_map")
            if not isinstance(places, dict):
                raise DataError(f"{index} has no weight_map", "download the model again")
            self._file = {name: folder / str(file) for name, file in places.items()}
            missing = sorted({path.name for path in self._file.values() if not path.is_file()})
            if missing:
                raise DataError(f"{folder} lacks {', '.join(missing)}", "download the model again")
        elif single.is_file():
            with self.open(single) as weights:
                self._file = dict.fromkeys(weights.keys(), single)
        else:
            raise DataError(
                f"{folder} has no model.safetensors",
                "load the model with transformers and save_pretrained() it, which writes safetensors",
            )

    @staticmethod
    def open(path: Path, hint: str = "download or save it again"):
        """A safetensors file to read from; raises DataFault with `hint` where it is damaged."""
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(path, framework="pt")
        except SafetensorError as error:
            raise DataError(f"{path} is damaged: {error}", hint) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._file)

    def __contains__(self, name: str) -> bool:
        return name in self._file

    def __getitem__(self, name: str):
        """The tensor on the CPU, in the type it is stored in."""
        with self.open(self._file[name]) as weights:
            return weights.get_tensor(name)

    def shape(self, name: str) -> list[int]:
        """The tensor's shape, without reading it."""
        with self.open(self._file[name]) as weights:
            return weights.get_slice(name).get_shape()
