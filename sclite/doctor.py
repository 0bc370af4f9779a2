"""The GPUs of this machine, and the checks of `sclite doctor`."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sclite.config import Config, Teacher, without_password
from sclite.errors import DataError, UsageError

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
        pid, _, rest = line.partition(",")
        program, _, used = rest.rpartition(",")  # a name may contain commas
        if pid.strip().isdigit() and program.strip():  # unlike "No running processes found"
            gb = round(int(used) * 2**20 / 1e9, 3) if used.strip().isdigit() else None
            processes.append({"pid": int(pid), "name": program.strip(), "gb": gb})
    return sorted(processes, key=lambda process: -(process["gb"] or 0.0))


def probe_torch() -> dict[str, Any]:
    """{"version", "cuda", "why" CUDA fails, "gpus"} of torch, from a subprocess; {"failure", "gpus": []} if it is broken."""
    found = _run_python(_TORCH)
    return {"failure": found, "gpus": []} if isinstance(found, str) else found


# -- sclite doctor -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """A check of the environment, with a fix if it fails. sclite does not work if a `required` one fails."""

    name: str
    works: bool
    found: str
    fix: str = ""
    required: bool = False


_TORCH = (
    "import json, torch; from sclite.doctor import list_gpus; from sclite.student.cuda_memory import cuda_failure; "
    "print(json.dumps({'version': torch.__version__, 'cuda': torch.version.cuda, 'why': cuda_failure(), 'gpus': list_gpus()}))"
)
_LLAMA = "from sclite.student.llama_cpp.engine import llama; print(str(bool(llama().llama_supports_gpu_offload())).lower())"
_TEACHER = (
    "import json, sys; from sclite.config import Teacher; from sclite.doctor import describe_teacher; "
    "print(json.dumps(describe_teacher(Teacher.model_validate_json(sys.argv[1]))))"
)


def llama_offloads() -> bool | str:
    """Whether llama.cpp is built for a GPU, from a subprocess; the reason if it cannot be loaded."""
    found: bool | str = _run_python(_LLAMA)
    return found


def _run_python(code: str, *arguments: str) -> Any:
    """Run Python code in a subprocess and parse the JSON that it prints; if it fails, return the reason as a str."""
    path = os.pathsep.join(folder for folder in sys.path if folder)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
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


CUDA_WHEELS = (118, 121, 122, 123, 124, 125, 130, 132)
"""The CUDA versions that llama-cpp-python has prebuilt wheels for."""


def run_checks(config: Config) -> Iterator[Check]:
    """Run every check. Takes seconds: torch, llama.cpp and LiteLLM are imported in parallel subprocesses."""
    from sclite.export.gguf import SHA256, cache_folder
    from sclite.student.cuda_memory import available_ram, has_driver

    taught = config.teacher.model and not config.teacher.embedded
    with ThreadPoolExecutor() as pool:
        torch_probe, llama_probe = pool.submit(probe_torch), pool.submit(llama_offloads)
        settings = config.teacher.model_dump_json()
        teacher_probe = pool.submit(_run_python, _TEACHER, settings) if taught else None
        yield Check("Python", True, sys.version.split()[0])
    torch, offload = torch_probe.result(), llama_probe.result()

    found, fix = torch.get("failure", ""), 'pip install --force-reinstall "torch>=2.11,<2.14"'
    build = found or f"{torch['version']}, {'CUDA ' + torch['cuda'] if torch['cuda'] else 'CPU build'}"
    yield Check("torch", not found, build, fix, required=True)
    gpus = torch["gpus"]
    shown = [f"{gpu['name']}, {gpu['total_gb']:.0f} GB, {gpu['free_gb']:.0f} GB free" for gpu in gpus]
    found, fix = (
        "; ".join(shown) or "not found, training runs on the CPU",
        "use a 24 GB GPU to train 7B and 8B models",
    )
    if has_driver() and (why := torch.get("why")):
        found, fix = f"CUDA cannot be initialized: {why}", "update the NVIDIA driver to 580 or newer"
        fix += ', or install PyTorch for CUDA 12.6: pip install --force-reinstall "torch>=2.11,<2.14" torchvision --index-url https://download.pytorch.org/whl/cu126'
    yield Check("CUDA GPU", any(gpu["total_gb"] > 11 for gpu in gpus), found, fix)
    unneeded, unsloth = "" if gpus else ", not needed without a GPU", _version("unsloth")
    found, fix = unsloth or "not installed", "pip install -e '.[cuda]'"
    yield Check("Unsloth", not gpus or bool(unsloth), found + unneeded, fix)
    # Triton, which compiles Unsloth's kernels, needs a C compiler and Python's headers for its launchers
    found = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), "not found")
    yield Check("C compiler", not gpus or found != "not found", found + unneeded, "apt-get install gcc")
    headers = Path(sysconfig.get_paths()["include"], "Python.h").is_file()
    fix = f"apt-get install python{sys.version_info.major}.{sys.version_info.minor}-dev"
    yield Check("Python headers", not gpus or headers, ("found" if headers else "not found") + unneeded, fix)

    ram, needed = available_ram(), 16 if gpus else 4
    found = "unknown" if ram is None else f"{ram / 1e9:.0f} GB available"
    why = "to train and export 7B and 8B models" if gpus else "for a run with a small student on the CPU"
    yield Check("RAM", ram is None or ram > needed * 1e9, found, f"free {needed} GB {why}")
    run, needed = Path(config.run), 60 if gpus else 5
    folder = next((path for path in (run, *run.parents) if path.is_dir()), Path("."))
    free = shutil.disk_usage(folder).free / 1e9
    student = "an 8B model" if gpus else "a small student"
    fix = f"free {needed} GB for a run with {student}, or choose another folder with --run"
    yield Check("disk", free > needed, f"{free:.0f} GB free in {folder.resolve()}", fix, required=free < 1)

    llama, package = _version("llama-cpp-python"), f"llama-cpp-python=={max(SHA256)}"
    fix = f"pip install --force-reinstall --no-cache-dir {package}"
    if gpus and torch["cuda"]:
        # the newest build that is not newer than torch's CUDA, which the driver supports
        cuda = int("".join(torch["cuda"].split(".")[:2]))
        newest = max((built for built in CUDA_WHEELS if built <= cuda), default=CUDA_WHEELS[0])
        fix += f" --no-deps --index-url https://abetlen.github.io/llama-cpp-python/whl/cu{newest}"
    if isinstance(offload, str):
        yield Check("llama.cpp", False, offload, fix, required=True)
    else:  # a CPU build on a GPU machine is slow, not broken
        works, found = offload or not gpus, f"llama-cpp-python {llama}, {'GPU' if offload else 'CPU'} build"
        yield Check("llama.cpp", works, found, fix, required=works)
    if llama:  # else the check above has failed
        checkout = os.environ.get("SCLITE_LLAMA_CPP", "")
        folder = Path(checkout or cache_folder())
        found = str(folder) if checkout or folder.is_dir() else "downloaded when first needed"
        fix = "set SCLITE_LLAMA_CPP to a llama.cpp checkout"
        yield Check("GGUF converter", not checkout or folder.is_dir(), found, fix)
    ollama, fix = shutil.which("ollama"), "curl -fsSL https://ollama.com/install.sh | sh"
    yield Check("Ollama", bool(ollama), ollama or "not installed", fix)
    yield from check_network(config, teacher_probe.result() if teacher_probe else {})


# -- teacher and Hub -----------------------------------------------------------------------------------------------

NETWORK_SECONDS = 3.0
"""Timeout for all addresses together, including DNS resolution."""
ADDRESSES = {
    "openai": "https://api.openai.com",
    "anthropic": "https://api.anthropic.com",
    "gemini": "https://generativelanguage.googleapis.com",
    "openrouter": "https://openrouter.ai",
}
"""Addresses of the providers for which LiteLLM reports none."""


def describe_teacher(settings: Teacher) -> dict[str, Any]:
    """{"problem", "fix"} of a teacher that cannot be used, else {"missing": variables, "found": text, "address": URL or ""}.

    Imports LiteLLM, and sends nothing.
    """
    from sclite.teacher.provider import connect

    try:
        provider = connect(settings)
    except UsageError as error:
        return {"problem": error.message, "fix": error.hint}
    litellm = provider.litellm
    _, name, _, address = litellm.get_llm_provider(settings.model, api_base=settings.api_base or None)
    missing, found = list[str](), settings.model
    if name.startswith("ollama"):
        address = address or os.environ.get("OLLAMA_API_BASE") or "http://localhost:11434"
    elif not settings.api_base:
        missing = litellm.validate_environment(settings.model)["missing_keys"]
        missing = missing[-1:] if name == "gemini" else missing  # two names for the same key
        # LiteLLM also reports nothing missing if it does not know what is needed
        found += ", key found" if provider.key_variable in os.environ else ", key not checked"
    return {"missing": missing, "found": found, "address": address or ADDRESSES.get(name, "")}


def check_network(config: Config, teacher: Any) -> Iterator[Check]:
    """The teacher's key and address, and the Hub, each only if the configuration needs it."""
    from huggingface_hub import constants, get_token, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    from sclite.data.sources import is_local_source
    from sclite.student.loader import model_name

    wanted = list[str]()
    if config.student.model:
        try:
            name = model_name(config.student)
            if not Path(name).is_dir() and not isinstance(try_to_load_from_cache(name, "config.json"), str):
                wanted = [name]
        except (DataError, HFValidationError):
            found = f"{config.student.model} is neither a Hugging Face model folder nor a Hub ID"
            yield Check("student", False, found, "check student.model", required=True)
    sources = (config.problems.source, config.eval.source)
    wanted += [source for source in sources if source and not is_local_source(source)]
    teacher = {"problem": teacher, "fix": "pip install litellm"} if isinstance(teacher, str) else teacher
    address = without_password(teacher.get("address", ""))
    hub = constants.ENDPOINT if wanted and not constants.HF_HUB_OFFLINE else ""
    failures = find_failures([url for url in (address, hub) if url])
    if "problem" in teacher:
        yield Check("teacher", False, teacher["problem"], teacher["fix"], required=True)
    elif teacher:
        missing = teacher["missing"]
        unset = f"{' and '.join(missing)} {'are' if missing[1:] else 'is'} not set"
        fix = f"export {' '.join(f'{variable}=...' for variable in missing)}"
        yield Check("teacher's key", not missing, unset if missing else teacher["found"], fix, required=True)
    if address:
        fix = "check teacher.api_base, the network, HTTPS_PROXY and ALL_PROXY"
        found = f"{address}: {failures[address] or 'reachable'}"
        yield Check("teacher's address", not failures[address], found, fix)
    if wanted:
        token = "token found" if get_token() else "no token (only needed for gated and private repositories)"
        found = f"{hub}: {failures[hub] or 'reachable'}; {token}" if hub else "HF_HUB_OFFLINE is set"
        fix = "check the network and HF_ENDPOINT" if hub else "unset HF_HUB_OFFLINE"
        fix += f": {', '.join(wanted)} must be downloaded"
        yield Check("Hugging Face Hub", bool(hub) and not failures[hub], found, fix)


def find_failures(addresses: Sequence[str]) -> dict[str, str]:
    """The failure of each address: "" if a server responds, with any status except a gateway's."""
    import httpx

    found = dict.fromkeys(addresses, f"no answer within {NETWORK_SECONDS:g} s")

    def ask(address: str) -> None:
        try:
            status = httpx.head(address, timeout=NETWORK_SECONDS).status_code
            found[address] = f"HTTP {status}" if status in (502, 503, 504) else ""  # from a proxy
        # the last two are for a SOCKS proxy
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError, ImportError) as error:
            found[address] = str(error) or type(error).__name__

    deadline = time.monotonic() + NETWORK_SECONDS
    # DNS resolution has no timeout and may outlive the command
    threads = [threading.Thread(target=ask, args=(address,), daemon=True) for address in addresses]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return dict(found)


def _version(package: str) -> str:
    """The installed version of a package, "" without it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
