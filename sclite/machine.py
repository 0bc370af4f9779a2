"""What this machine can do: the checks of `sclite doctor`, and the configuration that `sclite init` writes for it."""

import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sclite import config as configuration
from sclite.errors import UsageFault


@dataclass(frozen=True)
class Check:
    """One thing that works or does not, and the command that mends it."""

    name: str
    works: bool
    found: str
    mend: str = ""


def check_all() -> list[Check]:
    """Every check; imports torch and llama.cpp, which takes seconds."""
    return [
        _python(),
        _torch(),
        _card(),
        _unsloth(),
        _compiler(),
        _llama_cpp(),
        _converter(),
        _ollama(),
        _disk(),
    ]


def as_dicts(checks: list[Check]) -> list[dict[str, Any]]:
    return [asdict(check) for check in checks]


def cards() -> list[tuple[str, float, float]]:
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


def may_have_card() -> bool:
    """Whether a driver of NVIDIA's is here, asked without touching CUDA. A container may lack nvidia-smi."""
    return shutil.which("nvidia-smi") is not None or any(Path(path).exists() for path in DRIVERS)


_PROCESSES = ("--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader,nounits")


def card_facts(number: int = 0) -> dict[str, Any] | None:
    """{"name", "total_gb", "free_gb", "processes": [{"pid", "name", "gb"}] or None where nobody tells}; None: no such card.

    `number` counts the cards that CUDA shows, in the order of the bus.
    """
    found = cards()
    if number >= len(found):
        return None
    name, total, free = found[number]
    return {"name": name, "total_gb": total, "free_gb": free, "processes": processes(number)}


def processes(number: int = 0) -> list[dict[str, Any]] | None:
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
        "Python", sys.version_info >= (3, 11), sys.version.split()[0], "install Python 3.11 or later"
    )


def _torch() -> Check:
    import torch

    kind = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    return Check("torch", True, f"{torch.__version__}, {kind}")


def _card() -> Check:
    found = cards()
    if not found:
        return Check(
            "CUDA card", False, "none: training runs on the CPU", "a card of 24 GB trains models of 7B and 8B"
        )
    text = "; ".join(f"{name}, {total:.0f} GB, {free:.0f} GB free" for name, total, free in found)
    return Check(
        "CUDA card",
        max(total for _, total, _ in found) > 11,
        text,
        "a card of 24 GB trains models of 7B and 8B",
    )


def _unsloth() -> Check:
    found = importlib.util.find_spec("unsloth") is not None
    if not found and not cards():
        return Check("Unsloth", True, "not installed, not needed without a card")
    return Check("Unsloth", found, _version("unsloth") or "not installed", "pip install -e '.[cuda]'")


def _compiler() -> Check:
    """Unsloth's kernels are compiled by Triton, which asks a C compiler for its launchers."""
    found = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), "")
    if not cards():
        return Check("C compiler", True, f"{found or 'none'}, not needed without a card")
    return Check("C compiler", bool(found), found or "none", "apt-get install gcc")


def _llama_cpp() -> Check:
    from sclite.student.engine import llama

    offload = bool(llama().llama_supports_gpu_offload())
    text = f"llama-cpp-python {_version('llama-cpp-python')}, {'GPU' if offload else 'CPU'} build"
    mend = "CMAKE_ARGS=-DGGML_CUDA=on pip install --force-reinstall --no-cache-dir llama-cpp-python"
    return Check("llama.cpp", offload or not cards(), text, mend)


def _converter() -> Check:
    from sclite.export.convert import cache_folder

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
    free = shutil.disk_usage(".").free / 1e9
    return Check("disk", free > 40, f"{free:.0f} GB free here", "a run with an 8B model needs about 40 GB")


# -- sclite init ---------------------------------------------------------------------------------------------------


def starting_values(memory_gb: float | None) -> dict[str, Any]:
    """The keys that depend on the machine, for a card with so many GB (None: no card)."""
    if memory_gb is None:
        return {"student.model": "embedded", "student.backend": "plain"}
    name = "Qwen3-4B-Instruct-2507" if memory_gb < 15 else "Qwen2.5-Math-7B-Instruct"
    return {"student.model": f"unsloth/{name}-bnb-4bit"}


def write_configuration(path: Path, memory_gb: float | None) -> None:
    """A commented sclite.toml with every key: those that fit this machine set, the others with their defaults in comments.

    Raises UsageFault where the file exists or cannot be written.
    """
    if path.exists():
        raise UsageFault(f"{path} exists", "remove it first, or edit it")
    chosen = starting_values(memory_gb)
    sections: dict[str, list[str]] = {}
    for key, field in configuration.keys().items():
        section, _, name = key.rpartition(".")
        value = chosen.get(key, field.default)
        shown = " = .." if value is None else f" = {_toml(value)}"
        meaning = f"  # {field.description}" if field.description else ""
        off = "" if key in chosen else "# "
        sections.setdefault(section, []).append(f"{off}{name}{shown}{meaning}")
    blocks = ["# sclite: every key with its default; take the # away to change one."]
    for section, lines in sections.items():
        blocks.append("\n".join([*([f"[{section}]"] if section else []), *lines]))
    try:
        path.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageFault(
            f"{path} cannot be written: {error.strerror}", "name another file with --config"
        ) from error


def _toml(value: Any) -> str:
    import tomlkit

    return tomlkit.item(value).as_string()
