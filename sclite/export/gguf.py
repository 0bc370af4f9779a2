"""Convert a Hugging Face folder to GGUF, with the converter that matches the installed llama.cpp, and quantize it.

The converter is part of llama-cpp-python's source distribution: it is downloaded once per installed version and cached.
`SCLITE_LLAMA_CPP` points at a llama.cpp checkout instead.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from sclite.cores import usable_cores
from sclite.errors import DataError, NetworkError, ScliteError, UsageError
from sclite.export.weights import BaseWeights, read_json
from sclite.student.llama_cpp.engine import last_errors, llama

if TYPE_CHECKING:
    import gguf
    import numpy as np

SCRIPT = "convert_hf_to_gguf.py"
EXTRACTED = (SCRIPT, "convert_lora_to_gguf.py", "conversion", "gguf-py", "LICENSE")
SHA256 = {"0.3.36": "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"}
"""Digests of the source distributions of all llama-cpp-python versions that pyproject.toml admits; no other is run."""
SMALL = 200_000_000
"""With fewer bytes of weights, a model that `write_gguf` supports is written without the converter."""


def convert_model(folder: Path, out: Path, *, outtype: str = "f16", title: str = "") -> Path:
    """Write the model in `folder` as the GGUF `out` (f32 or f16). Returns `out`, which is complete or absent.

    `title`: the model's name in the GGUF (default: the folder's). Small Llamas with a tokenizer.model need no converter.
    Raises DataError (the converter rejects the model) or NetworkError (no converter and no network).
    """
    config = read_json(folder / "config.json")
    plain = config.get("architectures") == ["LlamaForCausalLM"] and (folder / "tokenizer.model").is_file()
    plain = plain and (config.get("rope_parameters") or {}).get("rope_type") == "default"
    plain = plain and not (config.get("attention_bias") or config.get("mlp_bias"))
    if plain and sum(path.stat().st_size for path in folder.glob("*.safetensors")) < SMALL:
        return write_gguf(folder, out, outtype=outtype, title=title)
    run_converter(converter(), folder, out, outtype=outtype, title=title)
    return out


def run_converter(source: Path, folder: Path, out: Path, *, outtype: str = "f16", title: str = "") -> None:
    """Run convert_hf_to_gguf.py of the llama.cpp sources in `source`, without layers that draft tokens."""
    config = read_json(folder / "config.json")
    config |= config.get("text_config") or {}
    arguments = [str(folder), "--outtype", outtype, f"--model-name={title or folder.resolve().name}"]
    # a folder saved by transformers lacks these layers even if its configuration mentions them, or always for Qwen3.5
    drafts = config.get("mtp_num_hidden_layers") or config.get("num_nextn_predict_layers")
    if drafts or str(config.get("model_type")).startswith(("qwen3_5", "qwen3_next")):
        arguments.append("--no-nextn")
    run_script(source, SCRIPT, arguments, out, f"the model in {folder}")


def run_script(source: Path, script: str, arguments: list[str], out: Path, subject: str) -> None:
    """Run a script of the llama.cpp sources in `source`; `out` is complete or absent."""
    part = out.with_name(out.name + ".part")
    command = [sys.executable, str(source / script), *arguments, "--outfile", str(part)]
    # offline, because a configuration could refer to code on the Hub
    environment = {**os.environ, "PYTHONPATH": str(source / "gguf-py"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, env=environment, input="", capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode != 0:
        part.unlink(missing_ok=True)
        # without the markers in a traceback and progress bars
        lines = [line.strip() for line in done.stderr.splitlines() if not re.search(r"\d+%\|", line)]
        reason = "; ".join([line for line in lines if line.strip("^~ ")][-2:])
        hint = (
            "use another base model, or `sclite export --format merged`; if the disk is full, free some space"
        )
        raise DataError(f"llama.cpp's converter cannot convert {subject}: {reason}", hint)
    part.replace(out)


def converter() -> Path:
    """The folder with convert_hf_to_gguf.py and its gguf-py, downloaded on the first call.

    Raises UsageError if SCLITE_LLAMA_CPP is not a llama.cpp checkout, NetworkError if the download fails.
    """
    if checkout := os.environ.get("SCLITE_LLAMA_CPP"):
        if not (Path(checkout) / SCRIPT).is_file():
            message = f"SCLITE_LLAMA_CPP is {checkout}, which has no {SCRIPT}"
            raise UsageError(message, "set it to a llama.cpp checkout")
        return Path(checkout)
    cache, installed = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", version("llama_cpp_python")
    folder = Path(cache) / "sclite" / f"llama.cpp-{installed}"
    if (folder / SCRIPT).is_file():
        return folder
    if installed not in SHA256:
        message = f"sclite does not know the source distribution of llama-cpp-python {installed}, which has the converter"
        hint = f"pip install llama-cpp-python=={max(SHA256)}, or set SCLITE_LLAMA_CPP to a llama.cpp checkout"
        raise ScliteError(message, hint)
    arguments = ["download", "--no-deps", "--no-binary", "llama-cpp-python", f"llama-cpp-python=={installed}"]
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "pip", *arguments, "--dest", place]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode != 0:
            raise NetworkError(
                f"cannot download llama.cpp's converter: {done.stderr.strip().splitlines()[-1]}",
                "install pip if it is missing (python -m ensurepip, or uv pip install pip); without network access, run "
                f"elsewhere: pip {' '.join(arguments)}; unpack the archive here and set SCLITE_LLAMA_CPP to its folder "
                "vendor/llama.cpp (any llama.cpp checkout works)",
            )
        (archive,) = Path(place).glob("*.tar.gz")
        if (digest := hashlib.sha256(archive.read_bytes()).hexdigest()) != SHA256[installed]:
            message = f"the downloaded {archive.name} is not the published one: its SHA-256 is {digest}"
            hint = "check the package index of pip, or set SCLITE_LLAMA_CPP to a llama.cpp checkout"
            raise ScliteError(message, hint)
        part = folder.with_name(folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        shutil.unpack_archive(archive, place)
        for path in Path(place).glob("*/vendor/llama.cpp/*"):
            if path.name in EXTRACTED:
                shutil.move(path, part)
    return part.replace(folder)


def write_gguf(folder: Path, out: Path, *, outtype: str = "f16", title: str = "") -> Path:
    """Write a Llama with a SentencePiece vocabulary, no scaled positions and no biases to the GGUF `out`, complete or absent.

    `outtype` is f32 or f16; norms are always f32.

    `title`: the model's name in it (default: the folder's). The result equals that of convert_hf_to_gguf.py.
    """
    import gguf

    config, half = read_json(folder / "config.json"), outtype == "f16"
    part = out.with_name(out.name + ".part")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    layers, head_dim = config["num_hidden_layers"], config["head_dim"]
    writer = gguf.GGUFWriter(part, "llama")
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(title or folder.resolve().name)
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if half else gguf.LlamaFileType.ALL_F32)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_vocabulary(writer, folder, config["vocab_size"])
    tensors, names = BaseWeights(folder), gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    for name in tensors:
        tensor, target = tensors[name], names.get_name(name, try_suffixes=(".weight",)) or name
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # each head's rows from transformers' layout (two halves) to llama.cpp's (pairs)
            halves = tensor.unflatten(0, (heads if name.endswith("q_proj.weight") else kv_heads, 2, -1))
            tensor = halves.swapaxes(1, 2).flatten(0, 2)
        writer.add_tensor(target, (tensor.half() if half and tensor.ndim > 1 else tensor.float()).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return part.replace(out)


def _add_vocabulary(writer: gguf.GGUFWriter, folder: Path, size: int) -> None:
    """Tokens, scores and types from tokenizer.model; special ids and the chat template from the files next to it."""
    import gguf

    pieces = list(gguf.SentencePieceVocab(folder).sentencepiece_tokens())
    pieces += [(f"[PAD{i}]".encode(), -10000.0, gguf.TokenType.UNUSED) for i in range(len(pieces), size)]
    tokens, scores, types = map(list, zip(*pieces, strict=True))
    settings = read_json(folder / "tokenizer_config.json")
    for key, token in settings.get("added_tokens_decoder", {}).items():
        i, text = int(key), token["content"]
        if i < size:
            control = token.get("special") or (text.startswith("<|") and text.endswith("|>"))
            tokens[i] = (text if control else text.replace("▁", " ")).encode()
            scores[i] = -1000.0
            types[i] = gguf.TokenType.CONTROL if control else gguf.TokenType.USER_DEFINED
    if settings.get("add_prefix_space") is not None:
        writer.add_add_space_prefix(settings["add_prefix_space"])
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    special = gguf.SpecialVocab(folder, n_vocab=size)
    special.add_to_gguf(writer, quiet=True)


def quantization_type(name: str) -> int:
    """llama.cpp's number for a quantization type (q4_k_m, q8_0, f16, ...); raises UsageError for an unknown name."""
    api, prefix = llama(), re.compile("LLAMA_FTYPE_(MOSTLY|ALL)_")
    types = {prefix.sub("", each).lower(): getattr(api, each) for each in dir(api) if prefix.match(each)}
    if name not in types:
        raise UsageError(f"unknown quantization type {name!r}", f"use one of {', '.join(sorted(types))}")
    return int(types[name])


def estimate_bytes(parameters: int, name: str) -> int:
    """The approximate size of a GGUF of this quantization type."""
    bits = {"f32": 32.0, "f16": 16.0, "bf16": 16.0, "q8_0": 8.5}
    digits = re.sub(r"\D", "", name)  # some tensors of each type have more bits than the name says
    return int(parameters * bits.get(name, int(digits[:1] or 8) + 0.9) / 8)


def quantize(source: Path, out: Path, name: str, importance: Mapping[str, np.ndarray] | None = None) -> None:
    """Write the GGUF `source` (f32, f16 or bf16) as `out`, quantized to the type `name`; `out` is complete or absent.

    Raises UsageError for an unknown name, DataError if llama.cpp fails.
    """
    api, part = llama(), out.with_name(out.name + ".part")
    parameters = api.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = quantization_type(name), usable_cores()
    if importance:
        # the last one, without a name, terminates the list
        entries = (api.llama_model_imatrix_data * (len(importance) + 1))()
        for entry, (tensor, values) in zip(entries, importance.items(), strict=False):
            entry.name, entry.size = tensor.encode(), values.size
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        parameters.imatrix = entries
    if api.llama_model_quantize(os.fsencode(source), os.fsencode(part), parameters) != 0:
        part.unlink(missing_ok=True)
        message = f"llama.cpp cannot quantize {source} to {name}: {last_errors()}"
        raise DataError(message, "choose another type (export.quant), or free some disk space")
    part.replace(out)
