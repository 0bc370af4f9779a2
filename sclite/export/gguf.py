"""A Hugging Face folder into a GGUF, with the converter of the very llama.cpp that will run it.

The converter lies in the source distribution of llama-cpp-python: it is fetched once, for the installed version, and kept
in the cache folder. `SCLITE_LLAMA_CPP` points at a llama.cpp checkout instead.
"""

import math
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path, PurePosixPath

from sclite.errors import DataError, NetworkError, ScliteError, UsageError
from sclite.export import gguf_writer
from sclite.export.merge import Adapter, BaseWeights, copy_settings
from sclite.export.tensors import Tensors

SCRIPT = "convert_hf_to_gguf.py"
WANTED = (SCRIPT, "convert_lora_to_gguf.py", "conversion", "gguf-py", "LICENSE")
OUTTYPES = ("f32", "f16", "bf16")
SMALL = 50_000_000
"""Models of fewer parameters, where `direct` knows them, need no converter."""


def convert(folder: Path, out: Path, *, outtype: str = "f16") -> Path:
    """Write the model in `folder` as the GGUF `out` (f32, f16 or bf16). Returns `out`, which appears whole or not at all.

    Small Llamas with a tokenizer.model are written directly, and larger ones too where the converter cannot be had.
    Raises UsageFault (outtype), DataFault (the converter refuses the model), NetworkFault (no converter and no network).
    """
    if outtype not in OUTTYPES:
        raise UsageError(f"outtype is {outtype!r}", f"use one of {', '.join(OUTTYPES)}")
    simple = gguf_writer.can_write(folder)
    tensors = Tensors(folder)
    if simple and sum(math.prod(tensors.shape(name)) for name in tensors) < SMALL:
        return gguf_writer.write(folder, out, outtype=outtype)
    try:
        source = converter()
    except NetworkError:
        if not simple:
            raise
        return gguf_writer.write(folder, out, outtype=outtype)
    return run_converter(source, folder, out, outtype=outtype)


def run_converter(source: Path, folder: Path, out: Path, *, outtype: str = "f16") -> Path:
    """Run convert_hf_to_gguf.py of the llama.cpp sources in `source`. Returns `out`."""
    return _run(source, SCRIPT, [str(folder), "--outtype", outtype], out, f"the model in {folder}")


def convert_lora(adapter: Path, base: Path, out: Path, *, outtype: str = "f16") -> Path:
    """Write a PEFT LoRA folder as a GGUF adapter for the GGUF of `base` (a model folder). Returns `out`."""
    Adapter(adapter, BaseWeights(base, adapter))  # refuses what PEFT would load differently
    with tempfile.TemporaryDirectory() as place:
        copy_settings(base, Path(place))  # the converter would run the code of a model folder
        arguments = [str(adapter), "--base", place, "--outtype", outtype]
        return _run(converter(), "convert_lora_to_gguf.py", arguments, out, f"the adapter in {adapter}")


def _run(source: Path, script: str, arguments: list[str], out: Path, what: str) -> Path:
    part = out.with_name(out.name + ".part")
    command = [sys.executable, str(source / script), *arguments, "--outfile", str(part)]
    # nothing is fetched: a configuration could name code on the Hub
    environment = {**os.environ, "PYTHONPATH": str(source / "gguf-py"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        env=environment,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    if done.returncode != 0 or not part.is_file():
        part.unlink(missing_ok=True)
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1] if lines else "no reason given"
        if reason == "AssertionError":
            reason = lines[-2]
        raise DataError(
            f"llama.cpp's converter cannot convert {what}: {reason}",
            f"see it fail: PYTHONPATH={source / 'gguf-py'} {shlex.join(command)}",
        )
    return part.replace(out)


def converter() -> Path:
    """Folder with convert_hf_to_gguf.py and its gguf-py; fetched on the first call.

    Raises UsageFault when SCLITE_LLAMA_CPP points at something else, NetworkFault when it cannot be fetched.
    """
    named = os.environ.get("SCLITE_LLAMA_CPP")
    if named:
        if not (Path(named) / SCRIPT).is_file():
            raise UsageError(
                f"SCLITE_LLAMA_CPP is {named}, where there is no {SCRIPT}", "name a llama.cpp checkout"
            )
        return Path(named)
    folder = cache_folder()
    if not (folder / SCRIPT).is_file():
        _fetch(folder)
    return folder


def cache_folder() -> Path:
    """Where the converter for the installed llama-cpp-python is kept."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "sclite" / f"llama.cpp-{version('llama_cpp_python')}"


def _fetch(folder: Path) -> None:
    package = f"llama-cpp-python=={version('llama_cpp_python')}"
    arguments = ["download", "--no-deps", "--no-binary", "llama-cpp-python", package]
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "pip", *arguments, "--dest", place]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        found = sorted(Path(place).glob("*.tar.gz"))
        if done.returncode != 0 or not found:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise NetworkError(
                f"cannot fetch llama.cpp's converter: {lines[-1] if lines else 'pip gave no reason'}",
                f"on a machine with a network: pip {' '.join(arguments)}; unpack it here and set SCLITE_LLAMA_CPP to "
                "its folder vendor/llama.cpp (any llama.cpp checkout will do)",
            )
        unpack(found[0], folder)


def unpack(sdist: Path, folder: Path) -> Path:
    """Extract the converter from llama-cpp-python's source distribution into `folder`, by rename. Returns `folder`."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    with tarfile.open(sdist) as archive:
        for member in archive:
            parts = PurePosixPath(member.name).parts  # <package>/vendor/llama.cpp/..
            if (
                member.isfile()
                and parts[1:3] == ("vendor", "llama.cpp")
                and len(parts) > 3
                and parts[3] in WANTED
            ):
                member.name = "/".join(parts[3:])
                archive.extract(member, part, filter="data")
    if not (part / SCRIPT).is_file():
        raise ScliteError(f"{sdist} holds no {SCRIPT}", "set SCLITE_LLAMA_CPP to a llama.cpp checkout")
    shutil.rmtree(folder, ignore_errors=True)
    return part.replace(folder)
