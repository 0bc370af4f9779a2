"""What this machine can do: the checks of `sclite doctor`, and the configuration that `sclite init` writes for it."""

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


@dataclass(frozen=True)
class Check:
    """One thing that works or does not, the command that fixes it, and whether anything works without it."""

    name: str
    works: bool
    found: str
    fix: str = ""
    required: bool = False


def run_checks() -> list[Check]:
    """Every check. torch and llama.cpp are imported in processes of their own, which takes seconds."""
    torch, llama = _printed(_TORCH), _printed(_LLAMA)
    gpus = [] if isinstance(torch, str) else torch["gpus"]
    return [
        _python(),
        _torch(torch),
        _gpu(gpus),
        _unsloth(gpus),
        _compiler(gpus),
        _llama_cpp(llama, gpus),
        _converter(),
        _ollama(),
        _disk(),
    ]


_TORCH = (
    "import json, torch; from sclite.doctor import list_gpus; "
    "print(json.dumps({'version': torch.__version__, 'cuda': torch.version.cuda, 'gpus': list_gpus()}))"
)
_LLAMA = "from sclite.student.llama_cpp.engine import llama; print(str(bool(llama().llama_supports_gpu_offload())).lower())"


def probe_gpus() -> list[tuple[str, float, float]]:
    """As `list_gpus`, asked in a process of its own; none where torch is missing or broken."""
    found = _printed(_TORCH)
    return [] if isinstance(found, str) else found["gpus"]


def _printed(code: str) -> Any:
    """What Python code prints as JSON in a process of its own; the reason as a str where it fails or is killed."""
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
        return "does not answer within 5 minutes"
    if done.returncode < 0:
        return f"crashes when it is imported (signal {-done.returncode})"
    last = [
        line.strip() for line in (done.stdout, done.stderr)[done.returncode > 0].splitlines() if line.strip()
    ]
    if done.returncode:
        return last[-1] if last else f"cannot be imported (exit code {done.returncode})"
    return json.loads(last[-1])


def as_dicts(checks: list[Check]) -> list[dict[str, Any]]:
    return [asdict(check) for check in checks]


def list_gpus() -> list[tuple[str, float, float]]:
    """(name, GB in all, GB free) of each CUDA card."""
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        found.append((torch.cuda.get_device_name(number), total / 1e9, free / 1e9))
    return found


DRIVERS = ("/dev/nvidiactl", "/dev/dxg")  # of Linux, and of Linux under Windows


def has_nvidia_driver() -> bool:
    """Whether a driver of NVIDIA's is here, asked without touching CUDA. A container may lack nvidia-smi."""
    return shutil.which("nvidia-smi") is not None or any(Path(path).exists() for path in DRIVERS)


_PROCESSES = ("--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader,nounits")


def describe_gpu(number: int = 0) -> dict[str, Any] | None:
    """{"name", "total_gb", "free_gb", "processes": [{"pid", "name", "gb"}] or None where nobody tells}; None: no such card.

    `number` counts the cards that CUDA shows, in the order of the bus.
    """
    found = list_gpus()
    if number >= len(found):
        return None
    name, total, free = found[number]
    return {"name": name, "total_gb": total, "free_gb": free, "processes": list_gpu_processes(number)}


def list_gpu_processes(number: int = 0) -> list[dict[str, Any]] | None:
    """Who holds memory on a card, largest first; None where nvidia-smi is missing or does not answer."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    physical = visible[number].strip() if number < len(visible) and visible[number].strip() else str(number)
    try:
        done = subprocess.run(
            ["nvidia-smi", "-i", physical, *_PROCESSES],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return parse_processes(done.stdout)


def parse_processes(text: str) -> list[dict[str, Any]]:
    """Lines of `pid, name, MiB` as {"pid", "name", "gb"}, largest first; "gb" is None where the driver does not say.

    A name may hold commas. Lines of another form, such as "No running processes found", are left out.
    """
    found = []
    for line in text.splitlines():
        pid, _, rest = line.partition(",")
        name, _, used = rest.rpartition(",")
        if not pid.strip().isdigit() or not name.strip():
            continue
        size = int(used) * 2**20 / 1e9 if used.strip().isdigit() else None
        found.append({"pid": int(pid), "name": name.strip(), "gb": None if size is None else round(size, 3)})
    return sorted(found, key=lambda process: -(process["gb"] or 0.0))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _python() -> Check:
    return Check(
        "Python",
        sys.version_info >= (3, 11),
        sys.version.split()[0],
        "install Python 3.11 or later",
        required=True,
    )


def _torch(found: Any) -> Check:
    if isinstance(found, str):
        return Check(
            "torch", False, found, 'pip install --force-reinstall "torch>=2.11,<2.14"', required=True
        )
    kind = f"CUDA {found['cuda']}" if found["cuda"] else "CPU build"
    return Check("torch", True, f"{found['version']}, {kind}", required=True)


def _gpu(gpus: list) -> Check:
    fix = "a GPU with 24 GB trains models of 7B and 8B"
    if not gpus:
        return Check("CUDA GPU", False, "none: training runs on the CPU", fix)
    text = "; ".join(f"{name}, {total:.0f} GB, {free:.0f} GB free" for name, total, free in gpus)
    return Check("CUDA GPU", max(total for _, total, _ in gpus) > 11, text, fix)


def _unsloth(gpus: list) -> Check:
    found = importlib.util.find_spec("unsloth") is not None
    if not found and not gpus:
        return Check("Unsloth", True, "not installed, not needed without a GPU")
    return Check("Unsloth", found, _version("unsloth") or "not installed", "pip install -e '.[cuda]'")


def _compiler(gpus: list) -> Check:
    """Unsloth's kernels are compiled by Triton, which asks a C compiler for its launchers."""
    found = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), "")
    if not gpus:
        return Check("C compiler", True, f"{found or 'none'}, not needed without a GPU")
    return Check("C compiler", bool(found), found or "none", "apt-get install gcc")


def _llama_cpp(offload: Any, gpus: list) -> Check:
    install = "pip install --force-reinstall --no-cache-dir llama-cpp-python"
    if isinstance(offload, str):
        return Check("llama.cpp", False, offload, install, required=True)
    text = f"llama-cpp-python {_version('llama-cpp-python')}, {'GPU' if offload else 'CPU'} build"
    works = offload or not gpus  # a CPU build beside a GPU is slow, not broken
    return Check("llama.cpp", works, text, f"CMAKE_ARGS=-DGGML_CUDA=on {install}", required=works)


def _converter() -> Check:
    from sclite.export.gguf import cache_folder

    if not _version("llama-cpp-python"):
        return Check(
            "GGUF converter", False, "llama-cpp-python is not installed", "pip install llama-cpp-python"
        )
    checkout = os.environ.get("SCLITE_LLAMA_CPP")
    if checkout:
        return Check(
            "GGUF converter",
            Path(checkout).is_dir(),
            checkout,
            "point SCLITE_LLAMA_CPP at a llama.cpp checkout",
        )
    kept = cache_folder().is_dir()
    return Check(
        "GGUF converter",
        True,
        str(cache_folder()) if kept else "fetched at the first export of a large model",
    )


def _ollama() -> Check:
    path = shutil.which("ollama")
    return Check(
        "Ollama", bool(path), path or "not installed", "curl -fsSL https://ollama.com/install.sh | sh"
    )


def _disk() -> Check:
    try:
        free = shutil.disk_usage(".").free / 1e9
    except OSError as error:  # the working folder was removed
        return Check("disk", False, f"unknown: {error.strerror}", "cd to another folder")
    return Check("disk", free > 40, f"{free:.0f} GB free here", "a run with an 8B model needs about 40 GB")


# -- sclite init ---------------------------------------------------------------------------------------------------


def values_for_machine(memory_gb: float | None) -> dict[str, Any]:
    """The keys that depend on the machine, for a card with so many GB (None: no card)."""
    if memory_gb is None:
        return {"student.model": "embedded", "student.backend": "plain"}
    name = "Qwen3-4B-Instruct-2507" if memory_gb < 15 else "Qwen2.5-Math-7B-Instruct"
    return {"student.model": f"unsloth/{name}-bnb-4bit"}


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
"""Values for the keys that have none, so that each line of sclite.toml can be taken as it stands."""


def write_configuration(path: Path, memory_gb: float | None) -> None:
    """A commented sclite.toml with every key: those that fit this machine set, the others with their defaults in comments.

    Raises UsageFault where the file exists or cannot be written.
    """
    if path.exists():
        raise UsageError(f"{path} exists", "remove it first, or edit it")
    chosen = values_for_machine(memory_gb)
    sections: dict[str, list[str]] = {}
    for key, field in configuration.keys().items():
        section, _, name = key.rpartition(".")
        value = chosen.get(key, field.default)
        meanings = [field.description] if field.description else []
        if value is None:
            value = EXAMPLES[key]
            meanings.append("an example: not set by default")
        meaning = f"  # {'; '.join(meanings)}" if meanings else ""
        off = "" if key in chosen else "# "
        sections.setdefault(section, []).append(f"{off}{name} = {_toml(value)}{meaning}")
    blocks = ["## Every key with its default. Remove the # before a key to change it."]
    for section, lines in sections.items():
        blocks.append("\n".join([*([f"[{section}]"] if section else []), *lines]))
    try:
        path.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written: {error.strerror}", "name another file with --config"
        ) from error


def _toml(value: Any) -> str:
    import tomlkit

    return tomlkit.item(value).as_string()
