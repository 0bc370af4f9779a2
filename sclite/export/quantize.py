"""Quantize a GGUF with llama.cpp's own quantizer, with an importance matrix measured on the run's texts."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sclite.cores import usable_cores
from sclite.errors import DataError, DeviceError, ScliteError, UsageError
from sclite.export.tensors import read_gguf
from sclite.student.llama_cpp.engine import last_errors, llama

if TYPE_CHECKING:
    import numpy as np

ROW = 256  # K-quants and most IQ types need row lengths divisible by this
UNUSABLE = ("nvfp4", "q1_0", "q2_0")
"""Types that llama-cpp-python 0.3.36 lists but cannot write (nvfp4), or that gguf 0.19 cannot read."""
NO_IMPORTANCE = "set export.imatrix = false"


def quantization_type(name: str) -> int:
    """llama.cpp's number for a quantization type (q4_k_m, q8_0, f16, ...); raises UsageError for an unknown name."""
    api, types = llama(), {}
    for constant in dir(api):
        found = re.fullmatch("LLAMA_FTYPE_(MOSTLY|ALL)_(.+)", constant)
        if found and (kind := found[2].lower()) not in UNUSABLE:
            types[kind] = getattr(api, constant)
    if name not in types:
        raise UsageError(f"unknown quantization type {name!r}", f"use one of {', '.join(sorted(types))}")
    return types[name]


def estimate_bytes(parameters: int, name: str) -> int:
    """The approximate size of a GGUF of this quantization type."""
    bits = {"f32": 32.0, "f16": 16.0, "bf16": 16.0, "q8_0": 8.5}
    digits = re.sub(r"\D", "", name)  # some tensors of each type have more bits than the name says
    return int(parameters * bits.get(name, int(digits[:1] or 8) + 0.9) / 8)


def quantize(
    source: Path, out: Path, name: str, importance: Mapping[str, np.ndarray] | None = None
) -> tuple[int, str]:
    """Write the GGUF `source` (f32, f16 or bf16) as `out`, quantized to the type `name`; `out` is complete or absent.

    A file that already has that type is copied. Returns how many tensors have rows that are not divisible by 256, and the
    types to which llama.cpp falls back for them. Raises UsageError for an unknown name, DataError if llama.cpp fails.
    """
    number = quantization_type(name)
    part = out.with_name(out.name + ".part")
    if (kind := read_gguf(source).get_field("general.file_type")) and kind.contents() == number:
        shutil.copyfile(source, part)
        part.replace(out)
        return 0, ""
    api = llama()
    parameters = api.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = number, usable_cores()
    if importance:
        # the last one, without a name, terminates the list
        entries = (api.llama_model_imatrix_data * (len(importance) + 1))()
        for entry, (tensor, values) in zip(entries, importance.items(), strict=False):
            entry.name, entry.size = tensor.encode(), values.size
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        parameters.imatrix = entries
    code = api.llama_model_quantize(os.fsencode(source), os.fsencode(part), parameters)
    if code != 0:
        part.unlink(missing_ok=True)
        why, hint = last_errors(), "choose another type (export.quant)"
        hint = "free some disk space" if "iostream" in why else hint
        raise DataError(f"llama.cpp cannot quantize {source} to {name}: {why}", hint)
    part.replace(out)
    if not re.search("_k|iq|tq", name):
        return 0, ""
    matrices = [tensor for tensor in read_gguf(out).tensors if len(tensor.shape) > 1]
    stored = [tensor.tensor_type.name.lower() for tensor in matrices if tensor.shape[0] % ROW]
    odd = [kind for kind in stored if kind != name]  # iq4_nl has blocks of 32
    return len(odd), ", ".join(sorted(set(odd)))


class Tensor(ctypes.Structure):
    """struct ggml_tensor of ggml.h, up to its name."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    )


def _read(tensor: Tensor, numbers: type[ctypes.c_float] | type[ctypes.c_int32]) -> np.ndarray:
    """A tensor in RAM as an array of three dimensions, in reverse order; it may be a view with gaps."""
    import numpy as np

    first = np.ctypeslib.as_array(ctypes.cast(tensor.data, ctypes.POINTER(numbers)), shape=(1,))
    return np.lib.stride_tricks.as_strided(first, tensor.ne[2::-1], tensor.nb[2::-1], writeable=False)


def measure_importance(gguf: Path, sequences: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """The mean square of each input of every weight matrix, float32 by tensor name, over sequences of token ids.

    This is what llama.cpp's imatrix tool measures: a callback sees every node of the graph before and after it is computed.
    A tensor of several matrices, such as the experts of a mixture, has their means one after another, 1 for an unused one.
    """
    import numpy as np

    api = llama()
    sums: dict[str, np.ndarray] = {}
    counts: dict[str, np.ndarray] = {}

    @api.ggml_backend_sched_eval_callback
    def see(address: int, ask: bool, _: object) -> bool:
        sources = Tensor.from_address(address).src
        if not sources[0] or not sources[1]:
            return not ask
        weight, values = Tensor.from_address(sources[0]), Tensor.from_address(sources[1])
        # an embedding has its weight first too, but its values are integers
        product = weight.name.endswith(b".weight") and values.type == 0
        if ask or not product:
            return product or not ask
        inputs, name, matrices = _read(values, ctypes.c_float), weight.name.decode(), weight.ne[2]
        if sources[2]:  # the experts chosen for each token, which may share an input
            chosen = _read(Tensor.from_address(sources[2]), ctypes.c_int32)[0]
            inputs = np.broadcast_to(inputs, (*chosen.shape, inputs.shape[2]))
        else:
            numbers = np.arange(len(inputs)) * matrices // len(inputs)
            chosen = np.broadcast_to(numbers[:, None], inputs.shape[:2])
        total = sums.setdefault(name, np.zeros((matrices, inputs.shape[2])))
        count = counts.setdefault(name, np.zeros((matrices, 1)))
        for matrix in np.unique(chosen):
            rows = inputs[chosen == matrix]
            total[matrix] += np.einsum("ij,ij->j", rows, rows)
            count[matrix] += len(rows)
        return True

    length = max(map(len, sequences))
    parameters = api.llama_model_default_params()
    parameters.n_gpu_layers = 0  # the callback reads the values where they are
    model = api.llama_model_load_from_file(os.fsencode(gguf), parameters)
    if not model:
        raise DataError(f"llama.cpp cannot load {gguf}: {last_errors()}", "run `sclite export` again")
    settings = api.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = length
    # else a GPU computes large products, with copies of weights and inputs
    settings.cb_eval, settings.op_offload = see, False
    context, batch = api.llama_init_from_model(model, settings), api.llama_batch_init(length, 0, 1)
    try:
        if not context:
            message = f"llama.cpp cannot open {gguf} with a context of {length} tokens: {last_errors()}"
            raise DeviceError(message, f"close other programs, or {NO_IMPORTANCE}")
        for ids in sequences:
            api.llama_memory_clear(api.llama_get_memory(context), True)
            batch.n_tokens = len(ids)
            for i, token in enumerate(ids):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, i, 1, 0
                batch.logits[i] = 1  # else the last layer sees only the last token
            if api.llama_decode(context, batch):
                raise ScliteError(f"llama.cpp cannot run {gguf}: {last_errors()}", NO_IMPORTANCE)
    finally:
        api.llama_batch_free(batch)
        api.llama_free(context)
        api.llama_model_free(model)
    if not sums:
        raise ScliteError("the installed llama-cpp-python hides the inputs of weights", NO_IMPORTANCE)
    means = {name: np.where(n, sums[name] / np.maximum(n, 1), 1) for name, n in counts.items()}
    return {name: mean.astype(np.float32).ravel() for name, mean in means.items()}
