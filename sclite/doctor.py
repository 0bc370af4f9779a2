"""What this machine can do: the checks of `sclite doctor`, and the configuration that `sclite init` writes."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
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

    `number` counts the GPUs that CUDA shows, in PCI bus order. "processes" is from `list_gpu_processes`.
    """
    gpus = list_gpus()
    if number >= len(gpus):
        return None
    name, total, free = gpus[number]
    return {"name": name, "total_gb": total, "free_gb": free, "processes": list_gpu_processes(number)}


def list_gpu_processes(number: int = 0) -> list[dict[str, Any]] | None:
    """The processes that hold memory on a GPU, largest first; None if nvidia-smi is missing or fails."""
    # CUDA_VISIBLE_DEVICES renumbers the GPUs for CUDA, not for nvidia-smi
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    physical = visible[number].strip() if number < len(visible) and visible[number].strip() else str(number)
    query = ("--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader,nounits")
    try:
        done = subprocess.run(
            ["nvidia-smi", "-i", physical, *query], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return parse_gpu_processes(done.stdout)


def parse_gpu_processes(text: str) -> list[dict[str, Any]]:
    """Parse lines of `pid, name, MiB` to {"pid", "name", "gb"}, largest first; "gb" is None if the driver hides it.

    A name may contain commas. Other lines, such as "No running processes found", are skipped.
    """
    processes = []
    for line in text.splitlines():
        pid, _, rest = line.partition(",")
        name, _, used = rest.rpartition(",")
        if not pid.strip().isdigit() or not name.strip():
            continue
        gb = round(int(used) * 2**20 / 1e9, 3) if used.strip().isdigit() else None
        processes.append({"pid": int(pid), "name": name.strip(), "gb": gb})
    return sorted(processes, key=lambda process: -(process["gb"] or 0.0))


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


def run_checks() -> list[Check]:
    """Run every check. Takes seconds: torch and llama.cpp are imported in subprocesses."""
    torch, llama = _run_python(_TORCH), _run_python(_LLAMA)
    gpus = [] if isinstance(torch, str) else torch["gpus"]
    python = sys.version.split()[0]
    return [
        Check("Python", sys.version_info >= (3, 11), python, "install Python 3.11 or later", required=True),
        _check_torch(torch),
        _check_gpu(gpus),
        _check_unsloth(gpus),
        _check_compiler(gpus),
        _check_llama_cpp(llama, gpus),
        _check_converter(),
        _check_ollama(),
        _check_disk(),
    ]


def as_dicts(checks: list[Check]) -> list[dict[str, Any]]:
    return [asdict(check) for check in checks]


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
    output = done.stderr if done.returncode else done.stdout
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if done.returncode:
        return lines[-1] if lines else f"cannot be imported (exit code {done.returncode})"
    return json.loads(lines[-1])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _check_torch(torch: Any) -> Check:
    if isinstance(torch, str):
        fix = 'pip install --force-reinstall "torch>=2.11,<2.14"'
        return Check("torch", False, torch, fix, required=True)
    build = f"CUDA {torch['cuda']}" if torch["cuda"] else "CPU build"
    return Check("torch", True, f"{torch['version']}, {build}", required=True)


def _check_gpu(gpus: list[GPU]) -> Check:
    fix = "use a GPU with 24 GB to train 7B and 8B models"
    if not gpus:
        return Check("CUDA GPU", False, "not found, training runs on the CPU", fix)
    text = "; ".join(f"{name}, {total:.0f} GB, {free:.0f} GB free" for name, total, free in gpus)
    return Check("CUDA GPU", max(total for _, total, _ in gpus) > 11, text, fix)


def _check_unsloth(gpus: list[GPU]) -> Check:
    found = importlib.util.find_spec("unsloth") is not None
    if not found and not gpus:
        return Check("Unsloth", True, "not installed, not needed without a GPU")
    return Check("Unsloth", found, _version("unsloth") or "not installed", "pip install -e '.[cuda]'")


def _check_compiler(gpus: list[GPU]) -> Check:
    """Triton, which compiles Unsloth's kernels, needs a C compiler for its launchers."""
    found = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), "")
    if not gpus:
        return Check("C compiler", True, f"{found or 'not found'}, not needed without a GPU")
    return Check("C compiler", bool(found), found or "not found", "apt-get install gcc")


def _check_llama_cpp(offload: Any, gpus: list[GPU]) -> Check:
    install = "pip install --force-reinstall --no-cache-dir llama-cpp-python"
    if isinstance(offload, str):
        return Check("llama.cpp", False, offload, install, required=True)
    text = f"llama-cpp-python {_version('llama-cpp-python')}, {'GPU' if offload else 'CPU'} build"
    works = offload or not gpus  # a CPU build on a GPU machine is slow, not broken
    return Check("llama.cpp", works, text, f"CMAKE_ARGS=-DGGML_CUDA=on {install}", required=works)


def _check_converter() -> Check:
    from sclite.export.gguf import cache_folder

    name, checkout = "GGUF converter", os.environ.get("SCLITE_LLAMA_CPP")
    if not _version("llama-cpp-python"):
        return Check(name, False, "llama-cpp-python is not installed", "pip install llama-cpp-python")
    if checkout:
        fix = "set SCLITE_LLAMA_CPP to a llama.cpp checkout"
        return Check(name, Path(checkout).is_dir(), checkout, fix)
    cached = cache_folder().is_dir()
    return Check(name, True, str(cache_folder()) if cached else "downloaded when first needed")


def _check_ollama() -> Check:
    path = shutil.which("ollama")
    fix = "curl -fsSL https://ollama.com/install.sh | sh"
    return Check("Ollama", bool(path), path or "not installed", fix)


def _check_disk() -> Check:
    try:
        free = shutil.disk_usage(".").free / 1e9
    except OSError as error:  # the working folder was removed
        return Check("disk", False, f"unknown: {error.strerror}", "cd to another folder")
    return Check("disk", free > 40, f"{free:.0f} GB free here", "free 40 GB for a run with an 8B model")


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
    "review.threshold": 0.0,
}
"""Example values for keys without a default: every line of sclite.toml is valid when uncommented."""


def write_configuration(path: Path, memory_gb: float | None) -> None:
    """Write a sclite.toml with every key: those that depend on the GPU are set, the others are commented defaults.

    `memory_gb` is the memory of the largest GPU, None without one. Raises UsageError if the file exists or cannot be
    written.
    """
    if path.exists():
        raise UsageError(f"{path} already exists", "edit it, or remove it first")
    if memory_gb is None:
        chosen = {"student.model": "embedded", "student.backend": "plain"}
    else:
        name = "Qwen3-4B-Instruct-2507" if memory_gb < 15 else "Qwen2.5-Math-7B-Instruct"
        chosen = {"student.model": f"unsloth/{name}-bnb-4bit"}
    sections: dict[str, list[str]] = {}
    for key, field in configuration.keys().items():
        section, _, name = key.rpartition(".")
        value = chosen.get(key, field.default)
        comments = [field.description] if field.description else []
        if value is None:
            value = EXAMPLES[key]
            comments.append("example, not set by default")
        comment = f"  # {'; '.join(comments)}" if comments else ""
        prefix = "" if key in chosen else "# "
        sections.setdefault(section, []).append(f"{prefix}{name} = {_toml(value)}{comment}")
    blocks = ["## Every setting with its default. Uncomment a line to change it."]
    for section, lines in sections.items():
        blocks.append("\n".join([*([f"[{section}]"] if section else []), *lines]))
    try:
        path.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written: {error.strerror}", "use another file with --config"
        ) from error


def _toml(value: Any) -> str:
    import tomlkit

    return tomlkit.item(value).as_string()
