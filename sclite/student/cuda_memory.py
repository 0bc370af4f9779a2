"""The GPU: whether CUDA starts, out-of-memory errors, memory that a model leaves behind; and the RAM that is available."""

import ctypes
import os
from pathlib import Path

DRIVERS = ("/dev/nvidiactl", "/dev/dxg")
"""Devices of NVIDIA's driver: Linux, and Linux under Windows."""
WORDS = (
    "out of memory",
    "cudaErrorMemoryAllocation",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator",
)


def has_driver() -> bool:
    """Whether NVIDIA's driver is there, found without CUDA: asking it would initialize it."""
    return any(Path(path).exists() for path in DRIVERS)


def cuda_failure() -> str:
    """Why a CUDA build of PyTorch cannot start CUDA; "" if it can, is a CPU build, or may use no GPU."""
    import torch

    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if hidden or torch.version.cuda is None or torch.cuda.is_available():
        return ""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"{error}".strip().partition("\n")[0]
    return "no device is visible"


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error means that GPU memory ran out. PyTorch has a class for it; other libraries only say so."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in WORDS)


def free_memory() -> None:
    """Release the memory of models that are no longer referenced, on the GPU too."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def return_freed_memory() -> None:
    """Return freed heap memory to the system; does nothing without glibc.

    Call it after each optimizer step on a CPU, or the heap grows with every new row length. A lower mmap threshold keeps it
    smaller still, but costs 10 % more CPU time in page faults.
    """
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def available_ram() -> int | None:
    """Bytes of available RAM; None if the system does not report it."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)
