"""GPUs and the processes on them, GPU selection, and the configuration file that init writes."""

import os

import pytest

from sclite import doctor
from sclite.errors import DeviceError, UsageError
from sclite.options import Common
from sclite.student.loader import select_gpu


def test_gpu_processes_are_sorted_by_size():
    text = "1201, /usr/bin/Xorg, 204\n4242, python, serve.py, 11822\n"
    assert doctor.parse_gpu_processes(text) == [
        {"pid": 4242, "name": "python, serve.py", "gb": 12.396},
        {"pid": 1201, "name": "/usr/bin/Xorg", "gb": 0.214},
    ]


def test_a_size_hidden_by_the_driver_is_unknown():
    assert doctor.parse_gpu_processes("77, [Not Found], [N/A]\n") == [
        {"pid": 77, "name": "[Not Found]", "gb": None}
    ]


def test_other_lines_of_nvidia_smi_are_skipped():
    assert doctor.parse_gpu_processes("No running processes found\n\n") == []
    assert doctor.parse_gpu_processes("") == []


def test_without_nvidia_smi_gpu_processes_are_unknown(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert doctor.list_gpu_processes() is None


def test_nvidia_smi_gets_the_physical_gpu_number(tmp_path, monkeypatch):
    """CUDA_VISIBLE_DEVICES renumbers the GPUs for CUDA, not for nvidia-smi."""
    script = tmp_path / "nvidia-smi"
    script.write_text('#!/bin/sh\necho "$2, python, 1000"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert doctor.list_gpu_processes(0)[0]["pid"] == 3
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert doctor.list_gpu_processes(1)[0]["pid"] == 1


def test_a_missing_gpu_has_no_description(monkeypatch):
    monkeypatch.setattr(doctor, "list_gpus", lambda: [("RTX 4090", 24.0, 20.0)])
    monkeypatch.setattr(doctor, "list_gpu_processes", lambda number: None)
    assert doctor.describe_gpu(0) == {
        "name": "RTX 4090",
        "total_gb": 24.0,
        "free_gb": 20.0,
        "processes": None,
    }
    assert doctor.describe_gpu(1) is None


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
