"""Convert a Hugging Face folder to GGUF, with the converter that matches the installed llama.cpp.

The converter is part of llama-cpp-python's source distribution: it is downloaded once per installed version and cached.
`SCLITE_LLAMA_CPP` points at a llama.cpp checkout instead.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from sclite.errors import DataError, NetworkError, ScliteError, UsageError
from sclite.export.gguf_writer import is_plain_llama, write_gguf
from sclite.export.merge import copy_settings
from sclite.export.tensors import BaseWeights, Tensors, read_json

SCRIPT = "convert_hf_to_gguf.py"
EXTRACTED = (SCRIPT, "convert_lora_to_gguf.py", "conversion", "gguf-py", "LICENSE")
SHA256 = {"0.3.36": "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"}
"""Digests of the source distributions of all llama-cpp-python versions that pyproject.toml admits; no other is run."""
SMALL = 50_000_000
"""With fewer parameters, a model that `write_gguf` supports is written without the converter."""
LARGE = 3_000_000_000
"""From this many parameters on, the converter is tried on the base model first: a smaller model is merged as fast."""


def convert_model(folder: Path, out: Path, *, outtype: str = "f16", title: str = "") -> Path:
    """Write the model in `folder` as the GGUF `out` (f32 or f16). Returns `out`, which is complete or absent.

    `title`: the model's name in the GGUF (default: the folder's).
    Small Llamas with a tokenizer.model do not need the converter; larger ones are written without it if it cannot be
    downloaded. Raises DataError (the converter rejects the model) or NetworkError (no converter and no network).
    """
    supported, tensors = is_plain_llama(folder), Tensors(folder)
    if not supported or sum(map(tensors.size, tensors)) >= SMALL:
        try:
            run_converter(converter(), folder, out, outtype=outtype, title=title)
            return out
        except NetworkError:
            if not supported:
                raise
    return write_gguf(folder, out, outtype=outtype, title=title)


def check_convertible(base: Path) -> None:
    """Raise DataError if llama.cpp's converter rejects a LARGE base model: merging it takes longer than to find out."""
    if is_plain_llama(base) or BaseWeights(base).count_parameters() < LARGE:
        return
    with tempfile.TemporaryDirectory() as place:
        copy_settings(base, Path(place))  # the converter would run the code of a model folder
        if not read_json(base / "config.json").get("quantization_config"):
            for path in base.glob("*.safetensors*"):
                (Path(place) / path.name).symlink_to(path.resolve())
        run_converter(converter(), Path(place), None)


def run_converter(
    source: Path, folder: Path, out: Path | None, *, outtype: str = "f16", title: str = ""
) -> None:
    """Run convert_hf_to_gguf.py of the llama.cpp sources in `source`; without `out`, no tensors are written.

    Some architectures (Qwen3.5, DeepSeek, GLM) come with layers that draft tokens; a folder saved by transformers lacks them
    even if its configuration mentions them; the converter needs an option for that.
    """
    config, arguments = read_json(folder / "config.json"), [str(folder), "--outtype", outtype]
    arguments += [f"--model-name={title}"] if title else []
    config |= config.get("text_config") or {}
    names = list(Tensors(folder)) if any(folder.glob("model*.safetensors")) else []
    if out is None:
        arguments.append("--dry-run" if names else "--vocab-only")
    numbers = [int(found[1]) for name in names if (found := re.search(r"\.layers\.(\d+)\.", name))]
    more = max(numbers, default=-1) >= config.get("num_hidden_layers", 1 << 20)
    attempts = [arguments, [*arguments, "--no-nextn"]]
    if more or any(re.match(r"(model\.)?mtp\.", name) for name in names):
        attempts.pop()
    elif config.get("mtp_num_hidden_layers") or config.get("num_nextn_predict_layers"):
        attempts.reverse()
    errors = []
    for attempt in attempts:
        try:
            run_script(source, SCRIPT, attempt, out, f"the model in {folder}" if out else "the base model")
            return
        except DataError as error:
            errors.append(error)
    raise next(error for error in reversed(errors) if "--no-nextn are not supported" not in error.message)


def run_script(source: Path, script: str, arguments: list[str], out: Path | None, subject: str) -> None:
    """Run a script of the llama.cpp sources in `source`; `out` is complete or absent."""
    part = out.with_name(out.name + ".part") if out else None
    command = [sys.executable, str(source / script), *arguments]
    command += ["--outfile", str(part)] if part else []
    # offline, because a configuration could refer to code on the Hub
    environment = {**os.environ, "PYTHONPATH": str(source / "gguf-py"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, env=environment, input="", capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode != 0 or (part and not part.is_file()):
        if part:
            part.unlink(missing_ok=True)
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        # drop the markers in a traceback and progress bars
        lines = [line for line in lines if line.strip("^~ ") and not re.search(r"\d+%\|", line)]
        reason = lines[-1] if lines else "no reason given"
        if reason == "AssertionError":
            reason = lines[-2]
        # the last one is NumPy's
        if re.search("No space left|File too large|quota exceeded|requested and .* written", reason):
            raise ScliteError(f"llama.cpp's converter cannot write {out}: {reason}", "free some disk space")
        hint = "use another base model, or `sclite export --format merged`"
        raise DataError(f"llama.cpp's converter cannot convert {subject}: {reason}", hint)
    if part and out:
        part.replace(out)


def converter() -> Path:
    """The folder with convert_hf_to_gguf.py and its gguf-py, downloaded on the first call.

    Raises UsageError if SCLITE_LLAMA_CPP is not a llama.cpp checkout, NetworkError if the download fails.
    """
    if checkout := os.environ.get("SCLITE_LLAMA_CPP"):
        if not (Path(checkout) / SCRIPT).is_file():
            hint = "set it to a llama.cpp checkout"
            raise UsageError(f"SCLITE_LLAMA_CPP is {checkout}, which has no {SCRIPT}", hint)
        return Path(checkout)
    folder = cache_folder()
    if (folder / SCRIPT).is_file():
        return folder
    installed = version("llama_cpp_python")
    if installed not in SHA256:
        message = f"sclite does not know the source distribution of llama-cpp-python {installed}, which has the converter"
        hint = f"pip install llama-cpp-python=={max(SHA256)}, or set SCLITE_LLAMA_CPP to a llama.cpp checkout"
        raise ScliteError(message, hint)
    if importlib.util.find_spec("pip") is None:
        hint = "python -m ensurepip, or uv pip install pip; or set SCLITE_LLAMA_CPP to a llama.cpp checkout"
        raise NetworkError("cannot download llama.cpp's converter: pip is not installed", hint)
    package = f"llama-cpp-python=={installed}"
    arguments = ["download", "--no-deps", "--no-binary", "llama-cpp-python", package]
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "pip", *arguments, "--dest", place]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        archives = sorted(Path(place).glob("*.tar.gz"))
        if done.returncode != 0 or not archives:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise NetworkError(
                f"cannot download llama.cpp's converter: {lines[-1] if lines else 'no reason given by pip'}",
                f"on a machine with network access, run: pip {' '.join(arguments)}; unpack the archive here and set "
                "SCLITE_LLAMA_CPP to its folder vendor/llama.cpp (any llama.cpp checkout works)",
            )
        with archives[0].open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != SHA256[installed]:
            message = f"the downloaded {archives[0].name} is not the published one: its SHA-256 is {digest}"
            hint = "check the package index of pip, or set SCLITE_LLAMA_CPP to a llama.cpp checkout"
            raise ScliteError(message, hint)
        part = folder.with_name(folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        shutil.unpack_archive(archives[0], place)
        part.mkdir(parents=True)
        for path in Path(place).glob("*/vendor/llama.cpp/*"):
            if path.name in EXTRACTED:
                shutil.move(path, part)
    shutil.rmtree(folder, ignore_errors=True)
    return part.replace(folder)


def cache_folder() -> Path:
    """The cache folder of the converter for the installed llama-cpp-python."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "sclite" / f"llama.cpp-{version('llama_cpp_python')}"
