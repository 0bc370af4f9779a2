"""What this machine can do: the checks of `sclite doctor`, and the configuration that `sclite init` writes."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sclite import config as configuration
from sclite.errors import UsageError

GPU = tuple[str, float, float]
"""Name, total GB, free GB."""
DRIVERS = ("/dev/nvidiactl", "/dev/dxg")  # Linux, and Linux under Windows

# -- GPUs ----------------------------------------------------------------------------------------------------------


def has_nvidia_driver() -> bool:
    """Whether an NVIDIA driver is installed, without initializing CUDA. A container may lack nvidia-smi."""
    return shutil.which("nvidia-smi") is not None or any(Path(path).exists() for path in DRIVERS)


def list_gpus() -> list[GPU]:
    """Every CUDA GPU. Imports torch and initializes CUDA."""
    import torch

    if not torch.cuda.is_available():
        return []
    gpus = []
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        gpus.append((torch.cuda.get_device_name(number), total / 1e9, free / 1e9))
    return gpus


def probe_gpus() -> list[GPU]:
    """Like `list_gpus`, in a subprocess; empty if torch is missing or broken."""
    found = _run_python(_TORCH)
    return [] if isinstance(found, str) else found["gpus"]


def describe_gpu(number: int = 0) -> dict[str, Any] | None:
    """{"name", "total_gb", "free_gb", "processes"} of a GPU, None if it does not exist.

    `number` counts the GPUs that CUDA shows, in PCI bus order. "processes" holds memory on it: [{"pid", "name", "gb"}],
    largest first; None if nvidia-smi is missing or fails. "gb" is None if the driver hides it.
    """
    gpus = list_gpus()
    if number >= len(gpus):
        return None
    name, total, free = gpus[number]
    found: dict[str, Any] = {"name": name, "total_gb": total, "free_gb": free, "processes": None}
    # CUDA_VISIBLE_DEVICES renumbers the GPUs for CUDA, not for nvidia-smi
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    physical = visible[number].strip() if number < len(visible) and visible[number].strip() else str(number)
    query = ("--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader,nounits")
    try:
        done = subprocess.run(
            ["nvidia-smi", "-i", physical, *query], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return found
    processes: list[dict[str, Any]] = []
    for line in done.stdout.splitlines():
        pid, _, rest = line.partition(",")
        program, _, used = rest.rpartition(",")  # a name may contain commas
        if pid.strip().isdigit() and program.strip():  # unlike "No running processes found"
            gb = round(int(used) * 2**20 / 1e9, 3) if used.strip().isdigit() else None
            processes.append({"pid": int(pid), "name": program.strip(), "gb": gb})
    return found | {"processes": sorted(processes, key=lambda process: -(process["gb"] or 0.0))}


# -- sclite doctor -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """A check of the environment, with a fix if it fails. Nothing works without what is `required`."""

    name: str
    works: bool
    found: str
    fix: str = ""
    required: bool = False


_TORCH = (
    "import json, torch; from sclite.doctor import list_gpus; "
    "print(json.dumps({'version': torch.__version__, 'cuda': torch.version.cuda, 'gpus': list_gpus()}))"
)
_LLAMA = "from sclite.student.llama_cpp.engine import llama; print(str(bool(llama().llama_supports_gpu_offload())).lower())"


def _run_python(code: str) -> Any:
    """Run Python code in a subprocess and parse the JSON that it prints; a str with the reason if it fails."""
    path = os.pathsep.join(folder for folder in sys.path if folder)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            env={**os.environ, "PYTHONPATH": path},
            text=True,
            errors="replace",
            timeout=300,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "no answer within 5 minutes"
    if done.returncode < 0:
        return f"crashes on import (signal {-done.returncode})"
    lines = [line.strip() for line in (done.stderr if done.returncode else done.stdout).splitlines()]
    last = next(filter(None, reversed(lines)), f"cannot be imported (exit code {done.returncode})")
    return last if done.returncode else json.loads(last)


def run_checks() -> Iterator[Check]:
    """Every check. Takes seconds: torch and llama.cpp are imported in subprocesses."""
    from sclite.export.gguf import cache_folder

    torch, offload = _run_python(_TORCH), _run_python(_LLAMA)
    gpus: list[GPU] = [] if isinstance(torch, str) else torch["gpus"]
    found, fix = sys.version.split()[0], "install Python 3.11 or later"
    yield Check("Python", sys.version_info >= (3, 11), found, fix, required=True)

    fix = 'pip install --force-reinstall "torch>=2.11,<2.14"'
    if isinstance(torch, str):
        yield Check("torch", False, torch, fix, required=True)
    else:
        build = f"CUDA {torch['cuda']}" if torch["cuda"] else "CPU build"
        yield Check("torch", True, f"{torch['version']}, {build}", required=True)

    found = "; ".join(f"{name}, {total:.0f} GB, {free:.0f} GB free" for name, total, free in gpus)
    found, fix = found or "not found, training runs on the CPU", "use a 24 GB GPU to train 7B and 8B models"
    yield Check("CUDA GPU", any(total > 11 for _, total, _ in gpus), found, fix)

    unneeded = "" if gpus else ", not needed without a GPU"
    unsloth = _version("unsloth") or "not installed"
    yield Check(
        "Unsloth", not gpus or unsloth != "not installed", unsloth + unneeded, "pip install -e '.[cuda]'"
    )
    # Triton, which compiles Unsloth's kernels, needs a C compiler for its launchers
    found = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), "not found")
    yield Check("C compiler", not gpus or found != "not found", found + unneeded, "apt-get install gcc")

    llama, fix = _version("llama-cpp-python"), "pip install --force-reinstall --no-cache-dir llama-cpp-python"
    if isinstance(offload, str):
        yield Check("llama.cpp", False, offload, fix, required=True)
    else:
        found, works = f"llama-cpp-python {llama}, {'GPU' if offload else 'CPU'} build", offload or not gpus
        # a CPU build on a GPU machine is slow, not broken
        wheel = "--no-deps --index-url https://abetlen.github.io/llama-cpp-python/whl/cu130"  # cu118 to cu132
        yield Check("llama.cpp", works, found, f"{fix} {wheel}", required=works)
    if not llama:
        yield Check(
            "GGUF converter", False, "llama-cpp-python is not installed", "pip install llama-cpp-python"
        )
    elif checkout := os.environ.get("SCLITE_LLAMA_CPP"):
        fix = "set SCLITE_LLAMA_CPP to a llama.cpp checkout"
        yield Check("GGUF converter", Path(checkout).is_dir(), checkout, fix)
    else:
        folder = cache_folder()
        yield Check(
            "GGUF converter", True, str(folder) if folder.is_dir() else "downloaded when first needed"
        )

    ollama = shutil.which("ollama")
    yield Check(
        "Ollama", bool(ollama), ollama or "not installed", "curl -fsSL https://ollama.com/install.sh | sh"
    )
    try:
        free = shutil.disk_usage(".").free / 1e9
    except OSError as error:  # the working folder was removed
        yield Check("disk", False, f"unknown: {error.strerror}", "cd to another folder")
    else:
        yield Check("disk", free > 40, f"{free:.0f} GB free here", "free 40 GB for a run with an 8B model")


def _version(package: str) -> str:
    """The installed version of a package, "" without it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


# -- sclite init ---------------------------------------------------------------------------------------------------

EXAMPLES: dict[str, Any] = {
    "problems.limit": 1000,
    "attempts.price": (0.5, 1.5),
    "teacher.temperature": 0.7,
    "teacher.requests_per_minute": 500.0,
    "teacher.tokens_per_minute": 200_000.0,
    "teacher.max_cost": 5.0,
    "teacher.price": (0.5, 1.5),
    **{f"{stage}.per_device_train_batch_size": 4 for stage in ("sft", "warmup", "dpo")},
    **{f"{stage}.padding_free": True for stage in ("sft", "warmup", "dpo")},
    "export.imatrix": True,
    "review.threshold": 0.0,
}
"""Example values for keys without a default: every line of sclite.toml is valid when uncommented."""


FIRST = (
    *(
        "problems.source",
        "teacher.model",
        "teacher.api_base",
        "teacher.max_cost",
        "student.model",
        "eval.source",
    ),
    *("sft.num_train_epochs", "attempts.samples", "export.quant", "run"),
)
"""The keys that most people set, at the top of a new sclite.toml."""


def write_configuration(path: Path, memory_gb: float | None) -> None:
    """Write a sclite.toml with every key: those that depend on the GPU are set, the others are commented defaults.

    `memory_gb` is the memory of the largest GPU, None without one. Raises UsageError if the file exists or cannot be
    written.
    """
    import tomlkit

    if path.exists():
        raise UsageError(f"{path} already exists", "edit it, or remove it first")
    if memory_gb is None:
        chosen = {"student.model": "embedded"}
    else:
        name = "Qwen3-4B-Instruct-2507" if memory_gb < 15 else "Qwen2.5-Math-7B-Instruct"
        chosen = {"student.model": f"unsloth/{name}-bnb-4bit"}
    known = configuration.keys()
    lines, section = ["## Settings that matter most. Uncomment a line to change it."], "most"
    for key in (*FIRST, *(key for key in known if key not in FIRST)):
        field, named = known[key], key.rpartition(".")[0]
        if key not in FIRST and named != section:
            lines += ["", f"## {'All other settings, with their defaults' if section == 'most' else named}"]
            section = named
        default = field.get_default(call_default_factory=True)
        value, comment = chosen.get(key, default), field.description or ""
        if value is None:
            value, comment = EXAMPLES[key], f"{comment}; example, not set by default"
        if isinstance(value, dict):
            table = tomlkit.inline_table()
            table.update(value)
            value = table
        prefix, suffix = "" if key in chosen else "# ", f"  # {comment}" if comment else ""
        lines.append(f"{prefix}{key} = {tomlkit.item(value).as_string()}{suffix}")
    try:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written: {error.strerror}", "use another file with --config"
        ) from error
