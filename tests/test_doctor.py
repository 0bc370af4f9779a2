"""GPUs and the processes on them, GPU selection, and the configuration file that init writes."""

import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sclite import doctor, options
from sclite.config import Config, Teacher
from sclite.errors import DeviceError
from sclite.student import cuda_memory
from sclite.student.loader import select_gpu
from tests.replay import TeacherServer, say


@pytest.fixture
def torch_with_gpus(monkeypatch):
    """torch with two GPUs of 24 GB; the environment is restored after the test."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: ((20e9, 4e9)[number], 24e9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: ("RTX 4090", "RTX 3090")[number])
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch, torch_with_gpus):
    """An nvidia-smi that prints the given lines, where {gpu} is the requested number."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    script = tmp_path / "nvidia-smi"

    def write(lines: str) -> None:
        script.write_text(f"#!/bin/sh\ncat <<END\n{lines.replace('{gpu}', '$2')}\nEND\n")
        script.chmod(0o755)

    return write


def test_gpu_processes_are_sorted_by_size_or_unknown(nvidia_smi, monkeypatch):
    assert doctor.gpu_processes() is None  # there is no nvidia-smi
    nvidia_smi("END\nexit 9\n")
    assert doctor.gpu_processes() is None
    nvidia_smi("1201, /usr/bin/Xorg, 204\n4242, python, serve.py, 11822\n77, [Not Found], [N/A]")
    processes = [
        {"pid": 4242, "name": "python, serve.py", "gb": 12.396},
        {"pid": 1201, "name": "/usr/bin/Xorg", "gb": 0.214},
        {"pid": 77, "name": "[Not Found]", "gb": None},  # the driver hides the size
    ]
    assert doctor.gpu_processes() == processes
    nvidia_smi("No running processes found\n")
    assert doctor.gpu_processes() == []
    nvidia_smi("{gpu}, python, 1000")
    for visible, physical in (("", 0), ("3", 3), ("5, 2", 5)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert doctor.gpu_processes()[0]["pid"] == physical


def test_gpus_are_numbered_by_the_pci_bus_within_cuda_visible_devices(torch_with_gpus):
    assert doctor.list_gpus() == [GPU, {**GPU, "name": "RTX 3090", "free_gb": 4.0}]
    select_gpu(1)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    assert os.environ.pop("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    os.environ["CUDA_VISIBLE_DEVICES"] = "2, GPU-5f3a"
    select_gpu(1)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-5f3a"
    assert "CUDA_DEVICE_ORDER" not in os.environ  # keep the order in which the numbers were written
    with pytest.raises(DeviceError, match="--gpu 1 is out of range for CUDA_VISIBLE_DEVICES=") as error:
        select_gpu(1)
    assert "unset CUDA_VISIBLE_DEVICES" in error.value.hint


@pytest.fixture
def checks_with(monkeypatch):
    """checks_with(torch, offloads): the checks of a machine with this torch and llama.cpp, by name."""

    def call(torch: dict, offloads: bool = True) -> dict:
        monkeypatch.setattr(doctor, "probe_torch", lambda: {"version": "2.13.0", "cuda": "13.0", **torch})
        monkeypatch.setattr(doctor, "llama_offloads", lambda: offloads)
        return {check.name: check for check in doctor.run_checks(Config())}

    return call


GPU = {"name": "RTX 4090", "total_gb": 24.0, "free_gb": 20.0}


def test_a_driver_without_cuda_is_shown_with_the_reason(checks_with, monkeypatch):
    why = "The NVIDIA driver on your system is too old (found version 12040)."
    monkeypatch.setattr(cuda_memory, "has_driver", lambda: True)
    found = checks_with({"why": why, "gpus": []})["CUDA GPU"]
    assert found.found == f"CUDA cannot be initialized: {why}"
    assert "/whl/cu126" in found.fix


def test_headers_that_triton_compiles_with_are_checked(checks_with, monkeypatch, tmp_path):
    for there in (False, True):
        monkeypatch.setattr(doctor.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
        found = checks_with({"gpus": [GPU]})["Python headers"]
        assert found.works is there
        assert "-dev" in found.fix
        (tmp_path / "Python.h").touch()


def test_the_reason_why_cuda_does_not_start_is_pytorchs(monkeypatch):
    import torch

    assert cuda_memory.cuda_failure() == "" or torch.version.cuda

    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old.\nPlease update")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert cuda_memory.cuda_failure() == "The NVIDIA driver on your system is too old."
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert cuda_memory.cuda_failure() == ""


def test_the_nvidia_driver_is_found_without_nvidia_smi(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cuda_memory, "DRIVERS", (str(tmp_path / "nvidiactl"), str(tmp_path / "dxg")))
    assert options.Common().context().isolated is False
    (tmp_path / "dxg").touch()
    assert options.Common().context().isolated is True


def checks_of(sclite, *arguments):
    """(exit code, {name: check}) of `sclite doctor`."""
    ended = sclite("doctor", "--json", *arguments)
    return ended.code, {check["name"]: check for check in json.loads(ended.out)["checks"]}


def test_doctor_without_a_teacher_requires_no_key_and_no_network(sclite, monkeypatch):
    monkeypatch.setattr(doctor, "find_failure", lambda address: "asked")
    code, checks = checks_of(sclite, "--set", "student.model=embedded")
    assert code == 0
    assert {"Python", "torch", "CUDA GPU", "RAM", "disk", "llama.cpp"} <= checks.keys()
    assert not {"teacher's key", "teacher's address", "Hugging Face Hub"} & checks.keys()
    assert "GB available" in checks["RAM"]["found"]


def test_doctor_requires_the_teachers_key_and_only_mentions_the_network(sclite, monkeypatch):
    monkeypatch.setattr(doctor, "find_failure", lambda address: "no route to host")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    named = ("--set", "teacher.model=openai/gpt-5.4-mini")
    code, checks = checks_of(sclite, *named, "--set", "problems.source=openai/gsm8k")
    assert code == 1
    key, hub = checks["teacher's key"], checks["Hugging Face Hub"]
    found = {"works": False, "required": True, "found": "not set: OPENAI_API_KEY"}
    assert key == {"name": "teacher's key", "fix": "export OPENAI_API_KEY=...", **found}
    assert (hub["works"], hub["required"]) == (False, False)
    assert "no route to host; token found" in hub["found"]
    assert "openai/gsm8k" in hub["fix"]
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    code, checks = checks_of(sclite, *named)
    assert code == 0
    assert checks["teacher's key"]["found"] == "openai/gpt-5.4-mini, key found"


@pytest.mark.parametrize(
    ("model", "found", "fix"),
    [
        ("gemini/gemini-2.5-flash", "not set: GEMINI_API_KEY", "export GEMINI_API_KEY=..."),
        ("azure/gpt-5", "not set: AZURE_API_BASE, AZURE_API_VERSION, AZURE_API_KEY",
         "export AZURE_API_BASE=... AZURE_API_VERSION=... AZURE_API_KEY=..."),
        ("sambanova/some-model", "sambanova/some-model, key not checked", None),
        ("ollama/qwen3", "ollama/qwen3", None),  # needs no key
    ],
)  # fmt: skip
def test_doctor_lists_the_variables_of_the_teachers_key(monkeypatch, model, found, fix):
    for name in [name for name in os.environ if name.startswith(("AZURE_", "GEMINI_", "GOOGLE_", "OLLAMA_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(doctor, "find_failure", lambda address: "")
    key = next(doctor.check_teacher(Teacher(model=model)))
    assert (key.found, key.works) == (found, fix is None)
    assert fix in (None, key.fix)


def test_doctor_reaches_a_local_teacher_and_reports_a_broken_configuration(sclite):
    with TeacherServer(lambda request, nth: say("x")) as server:
        named = ("--set", "teacher.model=openai/replay", "--set", f"teacher.api_base={server.url}")
        code, checks = checks_of(sclite, *named)
        assert (code, checks["teacher's address"]["works"]) == (0, True)
        assert checks["teacher's key"]["works"]  # a self-hosted endpoint may need none
        assert server.requests == []  # no request to the model
    code, checks = checks_of(sclite, "--set", "teacher.modl=x")
    assert code == 1
    assert checks["configuration"]["fix"] == "did you mean teacher.model?"
    assert checks["torch"]["works"]


def test_any_response_but_a_gateway_error_counts_as_reachable():
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(int(self.path[1:]))
            self.end_headers()

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        found = [doctor.find_failure(f"{address}/{status}") for status in (401, 404, 502)]
        server.shutdown()
    assert found == ["", "", "HTTP 502"]


@pytest.mark.parametrize(
    ("cuda", "wheel"),
    [("11.8", "cu118"), ("12.1", "cu121"), ("12.8", "cu125"), ("13.0", "cu130"), ("13.1", "cu130"), ("13.2", "cu132")],
)  # fmt: skip
def test_doctor_suggests_llama_cpp_wheels_for_the_cuda_version(checks_with, cuda, wheel):
    found = checks_with({"cuda": cuda, "gpus": [GPU]}, offloads=False)["llama.cpp"]
    assert (found.works, found.required) == (False, False)
    assert found.fix.endswith(f" --index-url https://abetlen.github.io/llama-cpp-python/whl/{wheel}")
