"""The GPUs of this machine, and the checks of `sclite doctor`."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sclite.config import Config, Teacher, without_password
from sclite.errors import UsageError

# -- GPUs ----------------------------------------------------------------------------------------------------------


def list_gpus() -> list[dict[str, Any]]:
    """{"name", "total_gb", "free_gb"} of every CUDA GPU, in CUDA's order. Imports torch and initializes CUDA."""
    import torch

    gpus = []
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(number)
        name = torch.cuda.get_device_name(number)
        gpus.append({"name": name, "total_gb": total / 1e9, "free_gb": free / 1e9})
    return gpus


def gpu_processes() -> list[dict[str, Any]] | None:
    """[{"pid", "name", "gb"}] of the processes that use memory on the first GPU, largest first; "gb" is None if the driver hides it.

    None if nvidia-smi is missing or fails.
    """
    # CUDA_VISIBLE_DEVICES renumbers the GPUs for CUDA, not for nvidia-smi
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0].strip() or "0"
    query = ("--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader,nounits")
    command = ["nvidia-smi", "-i", first, *query]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    processes: list[dict[str, Any]] = []
    for line in done.stdout.splitlines():
        pid, _, rest = line.partition(", ")
        program, _, used = rest.rpartition(", ")  # a name may contain commas
        if program:  # unlike "No running processes found"
            gb = round(int(used) * 2**20 / 1e9, 3) if used.isdigit() else None
            processes.append({"pid": int(pid), "name": program, "gb": gb})
    return sorted(processes, key=lambda process: -(process["gb"] or 0.0))


_TORCH = (
    "import json, torch; from sclite.doctor import list_gpus; from sclite.student.cuda_memory import cuda_failure; "
    "print(json.dumps({'version': torch.__version__, 'cuda': torch.version.cuda, 'why': cuda_failure(), 'gpus': list_gpus()}))"
)
_LLAMA = "from sclite.student.llama_cpp.engine import llama; print(str(bool(llama().llama_supports_gpu_offload())).lower())"


def probe_torch() -> dict[str, Any]:
    """{"version", "cuda", "why" CUDA fails, "gpus"} of torch, from a subprocess; {"failure", "gpus": []} if it is broken."""
    found = _run_python(_TORCH)
    return {"failure": found, "gpus": []} if isinstance(found, str) else found


def llama_offloads() -> bool | str:
    """Whether llama.cpp is built for a GPU, from a subprocess; the reason if it cannot be loaded."""
    found: bool | str = _run_python(_LLAMA)
    return found


def _run_python(code: str) -> Any:
    """Run Python code in a subprocess and parse the JSON that it prints; if it fails, return the reason as a str."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, capture_output=True, env=environment, encoding="utf-8", errors="replace", check=False
    )
    if done.returncode < 0:
        return f"crashes on import (signal {-done.returncode})"
    lines = (done.stderr if done.returncode else done.stdout).split("\n")
    last = next(filter(str.strip, reversed(lines)), f"cannot be imported (exit code {done.returncode})")
    return last.strip() if done.returncode else json.loads(last)


# -- sclite doctor -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """A check of the environment, with a fix if it fails. sclite does not work if a `required` one fails."""

    name: str
    works: bool
    found: str
    fix: str = ""
    required: bool = False


CUDA_WHEELS = (118, 121, 122, 123, 124, 125, 130, 132)
"""The CUDA versions that llama-cpp-python has prebuilt wheels for."""


def run_checks(config: Config) -> Iterator[Check]:
    """Run every check. Takes seconds: torch and llama.cpp are imported in parallel subprocesses."""
    from sclite.export.gguf import SHA256
    from sclite.student.cuda_memory import available_ram, has_driver

    with ThreadPoolExecutor() as pool:
        torch_probe, llama_probe = pool.submit(probe_torch), pool.submit(llama_offloads)
        yield Check("Python", True, sys.version.split()[0])
    torch, offload = torch_probe.result(), llama_probe.result()

    found, fix = torch.get("failure", ""), 'pip install --force-reinstall "torch>=2.11,<2.14"'
    build = found or f"{torch['version']}, {'CUDA ' + torch['cuda'] if torch['cuda'] else 'CPU build'}"
    yield Check("torch", not found, build, fix, required=True)
    gpus = torch["gpus"]
    shown = [f"{gpu['name']}, {gpu['total_gb']:.0f} GB, {gpu['free_gb']:.0f} GB free" for gpu in gpus]
    found = "; ".join(shown) or "not found, training runs on the CPU"
    fix = "use a 24 GB GPU to train 7B and 8B models"
    if has_driver() and (why := torch.get("why")):
        found, fix = f"CUDA cannot be initialized: {why}", "update the NVIDIA driver to 580 or newer"
        fix += ', or install PyTorch for CUDA 12.6: pip install --force-reinstall "torch>=2.11,<2.14" torchvision --index-url https://download.pytorch.org/whl/cu126'
    yield Check("CUDA GPU", any(gpu["total_gb"] > 11 for gpu in gpus), found, fix)
    if gpus:
        unsloth = _version("unsloth")
        yield Check("Unsloth", bool(unsloth), unsloth or "not installed", "pip install -e '.[cuda]'")
        # Triton, which compiles Unsloth's kernels, needs a C compiler and Python's headers for its launchers
        compiler = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), "")
        yield Check("C compiler", bool(compiler), compiler or "not found", "apt-get install gcc")
        headers = Path(sysconfig.get_paths()["include"], "Python.h").is_file()
        fix = f"apt-get install python{sys.version_info.major}.{sys.version_info.minor}-dev"
        yield Check("Python headers", headers, "found" if headers else "not found", fix)

    student, least_ram, least_disk = ("an 8B model", 16, 60) if gpus else ("a small student", 4, 5)
    ram = available_ram()
    found, fix = (
        "unknown" if ram is None else f"{ram / 1e9:.0f} GB available",
        f"free {least_ram} GB for {student}",
    )
    yield Check("RAM", ram is None or ram > least_ram * 1e9, found, fix)
    run = Path(config.run)
    folder = next((path for path in (run, *run.parents) if path.is_dir()), Path("."))
    free = shutil.disk_usage(folder).free / 1e9
    fix = f"free {least_disk} GB for a run with {student}, or choose another folder with --run"
    yield Check(
        "disk", free > least_disk, f"{free:.0f} GB free in {folder.resolve()}", fix, required=free < 1
    )

    fix = f"pip install --force-reinstall --no-cache-dir llama-cpp-python=={max(SHA256)}"
    if gpus and torch["cuda"]:
        # the newest build that is not newer than torch's CUDA, which the driver supports
        cuda = int("".join(torch["cuda"].split(".")[:2]))
        newest = max((built for built in CUDA_WHEELS if built <= cuda), default=CUDA_WHEELS[0])
        fix += f" --no-deps --index-url https://abetlen.github.io/llama-cpp-python/whl/cu{newest}"
    if isinstance(offload, str):
        yield Check("llama.cpp", False, offload, fix, required=True)
    else:  # a CPU build on a GPU machine is slow, not broken
        found = f"llama-cpp-python {_version('llama-cpp-python')}, {'GPU' if offload else 'CPU'} build"
        yield Check("llama.cpp", offload or not gpus, found, fix)
    if config.teacher.model and not config.teacher.embedded:
        yield from check_teacher(config.teacher)
    yield from check_hub(config)


def check_teacher(settings: Teacher) -> Iterator[Check]:
    """The teacher's key, and whether its own address answers. Imports LiteLLM; sends nothing to the model."""
    from sclite.teacher.provider import connect

    try:
        provider = connect(settings)
    except UsageError as error:
        yield Check("teacher", False, error.message, error.hint, required=True)
        return
    litellm, missing, found = provider.litellm, list[str](), settings.model
    _, name, _, address = litellm.get_llm_provider(settings.model, api_base=settings.api_base or None)
    if name.startswith("ollama"):
        address = address or os.environ.get("OLLAMA_API_BASE") or "http://localhost:11434"
    elif not settings.api_base:
        missing = litellm.validate_environment(settings.model)["missing_keys"]
        missing = missing[-1:] if name == "gemini" else missing  # two names for the same key
        # LiteLLM also reports nothing missing if it does not know what is needed
        found += ", key found" if provider.key_variable in os.environ else ", key not checked"
    found = f"not set: {', '.join(missing)}" if missing else found
    fix = f"export {' '.join(f'{variable}=...' for variable in missing)}"
    yield Check("teacher's key", not missing, found, fix, required=True)
    if address:
        failure, fix = find_failure(address), "check teacher.api_base, the network, HTTPS_PROXY and ALL_PROXY"
        found = f"{without_password(address)}: {failure or 'reachable'}"
        yield Check("teacher's address", not failure, found, fix)


def check_hub(config: Config) -> Iterator[Check]:
    """The Hugging Face Hub, if the configuration names a model or a dataset that is no local file."""
    from huggingface_hub import constants, get_token

    from sclite.data.sources import is_local_source

    student = config.student.model if config.student.model != "embedded" else ""
    named = [*filter(None, (student, config.problems.source, config.eval.source))]
    wanted = [name for name in named if not is_local_source(name)]
    if wanted:
        failure = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else find_failure(constants.ENDPOINT)
        token = "token found" if get_token() else "no token (only needed for gated and private repositories)"
        needed = f"{', '.join(wanted)} must be downloaded, unless in the Hub's cache"
        found = f"{constants.ENDPOINT}: {failure or 'reachable'}; {token}"
        fix = f"check the network, HF_ENDPOINT and HF_HUB_OFFLINE: {needed}"
        yield Check("Hugging Face Hub", not failure, found, fix)


def find_failure(address: str) -> str:
    """Why no server responds at an address; "" if one does, with any status except a gateway's."""
    import httpx

    try:
        status = httpx.head(address, timeout=3.0).status_code
    # the last two are for a SOCKS proxy
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError, ImportError) as error:
        return str(error) or type(error).__name__
    return f"HTTP {status}" if status in (502, 503, 504) else ""  # from a proxy


def _version(package: str) -> str:
    """The installed version of a package, "" without it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
