"""A GGUF into a smaller one, by llama.cpp's own quantiser."""

import os
import shutil
from pathlib import Path

from sclite.errors import DataError, UsageError
from sclite.student.llama_cpp.engine import last_errors, llama


def quantisations() -> dict[str, int]:
    """Names that `quantize` knows (q4_k_m, q8_0, f16 ..) and llama.cpp's numbers for them."""
    api = llama()
    names = {}
    for constant in dir(api):
        for prefix in ("LLAMA_FTYPE_MOSTLY_", "LLAMA_FTYPE_ALL_"):
            if constant.startswith(prefix):
                names[constant.removeprefix(prefix).lower()] = getattr(api, constant)
    return names


def known_quantisation(name: str) -> int:
    """llama.cpp's number for a quantisation; raises UsageFault for an unknown name, with those that there are."""
    known = quantisations()
    number = known.get(name.lower())
    if number is None:
        raise UsageError(f"unknown quantisation {name!r}", f"use one of {', '.join(sorted(known))}")
    return number


def quantize(source: Path, out: Path, name: str, *, threads: int | None = None) -> Path:
    """Write the GGUF `source` (f32, f16 or bf16) as `out`, quantised as `name` says. Returns `out`.

    A file that has that type already is copied. The result appears whole or not at all. K-quants need rows divisible by
    256; llama.cpp takes a larger type where they are not. Raises UsageFault for an unknown name, DataFault when llama.cpp
    refuses.
    """
    number = known_quantisation(name)
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
            f"llama.cpp cannot quantise {source} to {name}: {last_errors()}",
            "check the free disk space, or choose another --quant",
        )
    return part.replace(out)


def _file_type(path: Path) -> int | None:
    """llama.cpp's number for the type of most tensors, as the file says."""
    from gguf import GGUFReader

    try:
        field = GGUFReader(path).get_field("general.file_type")
    except ValueError as error:
        raise DataError(
            f"{path} is not a GGUF file: {error}", "write it again with `sclite export`"
        ) from error
    return int(field.contents()) if field else None
