"""Quantize a GGUF with llama.cpp's own quantizer."""

import os
import shutil
from pathlib import Path

from sclite.errors import DataError, UsageError
from sclite.student.llama_cpp.engine import last_errors, llama


def quantization_types() -> dict[str, int]:
    """The types that `quantize` supports (q4_k_m, q8_0, f16 ..), each with llama.cpp's number for it."""
    api, types = llama(), {}
    for constant in dir(api):
        for prefix in ("LLAMA_FTYPE_MOSTLY_", "LLAMA_FTYPE_ALL_"):
            if constant.startswith(prefix):
                types[constant.removeprefix(prefix).lower()] = getattr(api, constant)
    return types


def quantization_type(name: str) -> int:
    """llama.cpp's number for a quantization type; raises UsageError for an unknown name and lists the known ones."""
    types = quantization_types()
    if name.lower() not in types:
        raise UsageError(f"unknown quantization type {name!r}", f"use one of {', '.join(sorted(types))}")
    return types[name.lower()]


def quantize(source: Path, out: Path, name: str, *, threads: int | None = None) -> Path:
    """Write the GGUF `source` (f32, f16 or bf16) as `out`, quantized to the type `name`. Returns `out`.

    A file that already has that type is copied. `out` is complete or absent. K-quants need rows divisible by 256; llama.cpp
    falls back to a larger type for other rows. Raises UsageError for an unknown name, DataError if llama.cpp fails.
    """
    number = quantization_type(name)
    if not source.is_file():
        raise DataError(f"{source} does not exist", "run `sclite export` first")
    part = out.with_name(out.name + ".part")
    if _file_type(source) == number:
        shutil.copyfile(source, part)
        return part.replace(out)
    api = llama()
    parameters = api.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = number, threads or os.cpu_count() or 1
    code = api.llama_model_quantize(os.fsencode(source), os.fsencode(part), parameters)
    if code != 0:
        part.unlink(missing_ok=True)
        raise DataError(
            f"llama.cpp cannot quantize {source} to {name}: {last_errors()}",
            "check the free disk space, or choose another --quant",
        )
    return part.replace(out)


def _file_type(path: Path) -> int | None:
    """llama.cpp's number for the type of most tensors, as stored in the file."""
    from gguf import GGUFReader

    try:
        field = GGUFReader(path).get_field("general.file_type")
    except ValueError as error:
        raise DataError(f"{path} is not a GGUF file: {error}", "run `sclite export` again") from error
    return int(field.contents()) if field else None
