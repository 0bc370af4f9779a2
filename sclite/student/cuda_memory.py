"""The GPU: whether CUDA starts, out-of-memory errors, memory that a model leaves behind; and the RAM that is available."""

import os
from pathlib import Path

DRIVERS = ("/dev/nvidiactl", "/dev/dxg")
"""Devices of NVIDIA's driver: Linux, and Linux under Windows."""
WORDS = ("out of memory", "MemoryAllocation", "ALLOC_FAILED", "STATUS_NOT_INITIALIZED", "DefaultCPUAllocator")
"""What PyTorch, CUDA and its libraries say when memory runs out, on the GPU or the CPU."""


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
    """Whether an error means that memory ran out. PyTorch has a class for it; other libraries only say so."""
    return any(words in str(error) for words in WORDS)


def free_memory() -> None:
    """Release the memory of models that are no longer referenced, on the GPU too."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def available_ram() -> int | None:
    """Bytes of available RAM; None if the system does not report it."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)
