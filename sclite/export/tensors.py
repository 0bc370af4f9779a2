"""Read the tensors of a Hugging Face model folder or of a GGUF one at a time."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sclite.errors import DataError
from sclite.student.loader import check_quantization
from sclite.student.origin import Origin, fingerprint, read_origin

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader
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
    """The tensors in a folder's safetensors files, sharded or not, by name. Each is read on access."""

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


class BaseWeights:
    """The base model's tensors by name, dequantized, and rounded to NF4 if the adapter was trained on NF4 weights."""

    def __init__(self, folder: Path, adapter: Path | None = None):
        self.folder, self._tensors = folder, Tensors(folder)
        config = read_json(folder / "config.json")
        check_quantization(config.get("quantization_config"), folder)
        self._states: dict[str, list[str]] = {}
        for name in self._tensors:
            owner = re.match(r"(.+\.weight)\.(absmax|quant_map|nested_|quant_state)", name)
            if owner:
                self._states.setdefault(owner[1], []).append(name)
        self._parts = {part for parts in self._states.values() for part in parts}
        self.tied = bool(config.get("tie_word_embeddings")) or "lm_head.weight" not in self
        self._origin = read_origin(adapter) if adapter else Origin()
        if self._origin.weights and self._origin.weights != fingerprint(folder):
            message = f"the adapter {adapter} was not trained on the weights in {folder}"
            hint = "set student.model to the base model of the adapter, or train again with `sclite train --fresh`"
            raise DataError(message, hint)
        trained_in_nf4 = {self.find(f"{module}.weight", "training") for module in self._origin.nf4}
        self._nf4 = trained_in_nf4 - set(self._states)

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._tensors if name not in self._parts)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors and name not in self._parts

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._states and name not in self._nf4:
            return self._tensors[name]
        import bitsandbytes.functional as bnb
        import torch

        if name in self._nf4:  # as training in NF4 sees it: quantized as in `nf4_config`, then dequantized
            device = "cuda" if torch.cuda.is_available() else "cpu"
            weight = self._tensors[name].to(device, getattr(torch, self._origin.dtype))
            packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
            return bnb.dequantize_4bit(packed, state).cpu()
        parts = {part: self._tensors[part] for part in self._states[name]}
        state = bnb.QuantState.from_dict(parts, device=torch.device("cpu"))
        return bnb.dequantize_4bit(self._tensors[name], state)

    def count_parameters(self) -> int:
        """The number of values of all tensors; a byte of packed weights holds two."""
        return sum(self._tensors.size(name) * (2 if name in self._states else 1) for name in self)

    def find(self, name: str, who: str) -> str:
        """`name`, or the only tensor whose name has the same ending (multimodal models add prefixes)."""
        if name in self:
            return name
        tail = re.sub(r"^(model\.|language_model\.)+", "", name)
        # Qwen3.5's layers for multi-token prediction have names like the first ones
        own = (other for other in self if "vision" not in other and not other.startswith("mtp."))
        alike = [other for other in own if other.endswith("." + tail)]
        if len(alike) == 1:
            return alike[0]
        hint = "set student.model to the base model of the adapter"
        raise DataError(f"{who} changes {name}, which {self.folder} does not have", hint)


def read_gguf(path: Path) -> GGUFReader:
    """The header and the mapped tensors of a GGUF, without arrays. Raises DataError if the file is damaged."""
    import numpy as np
    from gguf import GGUFReader, GGUFValueType

    class Reader(GGUFReader):
        """Skips arrays: an object for each token took 2.2 seconds for a vocabulary of 49,000, without them 0.03."""

        def _get_field_parts(
            self, orig_offs: int, raw_type: int
        ) -> tuple[int, list[Any], list[int], list[GGUFValueType]]:
            if raw_type != GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            data: Any = self.data
            kind, count = struct.unpack_from("<IQ", data, orig_offs)
            end = orig_offs + 12
            if kind != GGUFValueType.STRING:
                end += count * np.dtype(self.gguf_scalar_to_np[kind]).itemsize
            else:
                for _ in range(count):
                    end += 8 + struct.unpack_from("<Q", data, end)[0]
            return end - orig_offs, [], [], [GGUFValueType.ARRAY]

    try:
        return Reader(path)
    except (struct.error, LookupError, ValueError, ArithmeticError) as error:
        raise DataError(f"{path} is not a GGUF file: {error}", "run `sclite export` again") from error
