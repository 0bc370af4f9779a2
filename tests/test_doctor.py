"""GPUs and the processes on them, GPU selection, and the configuration file that init writes."""

import os

import pytest

from sclite import doctor
from sclite.errors import DeviceError, UsageError
from sclite.options import Common
from sclite.student.loader import select_gpu


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Two GPUs, and an nvidia-smi that prints the given lines, in which {gpu} is the number it was asked for."""
    monkeypatch.setattr(doctor, "list_gpus", lambda: [("RTX 4090", 24.0, 20.0), ("RTX 3090", 24.0, 4.0)])
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    script = tmp_path / "nvidia-smi"

    def write(lines: str) -> None:
        script.write_text(f"#!/bin/sh\ncat <<END\n{lines.replace('{gpu}', '$2')}\nEND\n")
        script.chmod(0o755)

    return write


def test_gpu_processes_are_sorted_by_size(nvidia_smi):
    nvidia_smi("1201, /usr/bin/Xorg, 204\n4242, python, serve.py, 11822\n77, [Not Found], [N/A]")
    assert doctor.describe_gpu(0) == {
        "name": "RTX 4090",
        "total_gb": 24.0,
        "free_gb": 20.0,
        "processes": [
            {"pid": 4242, "name": "python, serve.py", "gb": 12.396},
            {"pid": 1201, "name": "/usr/bin/Xorg", "gb": 0.214},
            {"pid": 77, "name": "[Not Found]", "gb": None},  # the driver hides the size
        ],
    }
    nvidia_smi("No running processes found\n")
    assert doctor.describe_gpu(0)["processes"] == []
    assert doctor.describe_gpu(2) is None


def test_without_nvidia_smi_gpu_processes_are_unknown(nvidia_smi):
    assert doctor.describe_gpu(1)["processes"] is None
    nvidia_smi("END\nexit 9\n")
    assert doctor.describe_gpu(1)["processes"] is None


def test_nvidia_smi_gets_the_physical_gpu_number(nvidia_smi, monkeypatch):
    nvidia_smi("{gpu}, python, 1000")
    assert doctor.describe_gpu(1)["processes"][0]["pid"] == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert doctor.describe_gpu(0)["processes"][0]["pid"] == 3


def test_the_nvidia_driver_is_found_without_nvidia_smi(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "DRIVERS", (str(tmp_path / "nvidiactl"), str(tmp_path / "dxg")))
    assert Common().context().isolated is False
    (tmp_path / "dxg").touch()
    assert Common().context().isolated is True


@pytest.fixture
def torch_with_gpus(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # restored after the test
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "")
    del os.environ["CUDA_VISIBLE_DEVICES"], os.environ["CUDA_DEVICE_ORDER"]


def test_gpu_numbers_follow_the_pci_bus(torch_with_gpus):
    select_gpu(1)
    assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["CUDA_DEVICE_ORDER"]) == ("1", "PCI_BUS_ID")


def test_gpu_numbers_count_within_cuda_visible_devices(torch_with_gpus):
    os.environ["CUDA_VISIBLE_DEVICES"] = "2, GPU-5f3a"
    select_gpu(1)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-5f3a"
    assert "CUDA_DEVICE_ORDER" not in os.environ  # keep the order in which the numbers were written
    with pytest.raises(DeviceError, match="--gpu 1 is out of range for CUDA_VISIBLE_DEVICES=") as error:
        select_gpu(1)
    assert "unset CUDA_VISIBLE_DEVICES" in error.value.hint


def test_an_unwritable_configuration_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="cannot be written: No such file or directory"):
        doctor.write_configuration(tmp_path / "nowhere/sclite.toml", None)
