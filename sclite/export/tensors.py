"""Read the tensors of a Hugging Face model folder or of a GGUF one at a time."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sclite.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from safetensors import safe_open


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises DataError if the file is missing or malformed."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing", "use a complete model folder") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}", "copy or download the folder again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is not a JSON object", "copy or download the folder again")
    return content


def open_tensors(path: Path, hint: str = "download or save it again") -> safe_open:
    """Open a safetensors file. Raises DataError with `hint` if it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise DataError(f"{path} is damaged: {error}", hint) from error


class Tensors:
    """The tensors in a folder's safetensors files, sharded or not, by name. Each is read when it is accessed."""

    def __init__(self, folder: Path):
        """Raises DataError if the folder has no safetensors weights or a shard is missing."""
        index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise DataError(f"{index} has no weight_map", "download the model again")
            self._file = {name: folder / str(file) for name, file in weight_map.items()}
            missing = sorted({path.name for path in self._file.values() if not path.is_file()})
            if missing:
                raise DataError(f"{', '.join(missing)} missing in {folder}", "download the model again")
        elif single.is_file():
            with open_tensors(single) as weights:
                self._file = dict.fromkeys(weights.keys(), single)
        else:
            hint = "load the model with transformers and call save_pretrained(), which writes safetensors"
            raise DataError(f"{folder} has no model.safetensors", hint)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file)

    def __contains__(self, name: str) -> bool:
        return name in self._file

    def __getitem__(self, name: str) -> torch.Tensor:
        """The tensor on the CPU, in its stored type."""
        with open_tensors(self._file[name]) as weights:
            return weights.get_tensor(name)

    def size(self, name: str) -> int:
        """The number of values of a tensor, without reading them."""
        with open_tensors(self._file[name]) as weights:
            return math.prod(weights.get_slice(name).get_shape())


class GgufTensor(NamedTuple):
    """A tensor of a GGUF: its type (gguf.GGMLQuantizationType), its shape, rows first in length; its bytes by rows, mapped."""

    type: int
    shape: tuple[int, ...]
    rows: np.ndarray


NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""The codes in `struct` of the types of numbers in a GGUF. The other types are 8, a text, and 9, an array."""


def read_gguf(path: Path) -> tuple[dict[str, float], dict[str, GgufTensor]]:
    """The numbers in the header of a GGUF, and its tensors, by name. Raises DataError if the file is damaged.

    Texts and arrays are skipped: gguf's own reader makes an object of each token, which takes seconds for a large vocabulary.
    """
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    numbers: dict[str, float] = {}
    tensors: dict[str, GgufTensor] = {}
    infos, place = [], 0

    def read(codes: str) -> tuple[Any, ...]:
        nonlocal place
        found = struct.unpack_from(f"<{codes}", data, place)
        place += struct.calcsize(f"<{codes}")
        return found

    def read_text() -> str:
        nonlocal place
        (length,) = read("Q")
        place += length
        return bytes(data[place - length : place]).decode()

    try:
        data = np.memmap(path, mode="r").data
        magic, _, tensor_count, entry_count = read("4sIQQ")
        if magic != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        for _ in range(entry_count):
            key, (kind,) = read_text(), read("I")
            if kind in NUMBERS:
                (numbers[key],) = read(NUMBERS[kind])
                continue
            kind, count = read("IQ") if kind == 9 else (kind, 1)
            if kind == 8:
                for _ in range(count):
                    (length,) = read("Q")
                    place += length
            else:
                place += struct.calcsize(NUMBERS[kind]) * count
        for _ in range(tensor_count):
            name, (dimensions,) = read_text(), read("I")
            infos.append((name, read(f"{dimensions}Q"), *read("IQ")))
        alignment = int(numbers.get("general.alignment", 32))
        start = -(-place // alignment) * alignment
        for name, shape, kind, offset in infos:
            values, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            row, begin = shape[0] // values * size, start + offset
            rows = np.frombuffer(data[begin : begin + row * math.prod(shape[1:])], np.uint8).reshape(-1, row)
            tensors[name] = GgufTensor(kind, shape, rows)
    except (struct.error, LookupError, ValueError, ArithmeticError) as error:
        raise DataError(f"{path} is not a GGUF file: {error}", "run `sclite export` again") from error
    return numbers, tensors
