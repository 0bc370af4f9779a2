"""The card as others see it: who holds its memory, as nvidia-smi tells it."""

import os

import pytest

from sclite import doctor
from sclite.errors import DeviceError, UsageError
from sclite.options import Common
from sclite.student.loader import select_gpu


def test_processes_are_read_largest_first_and_a_name_may_hold_commas():
    text = "1201, /usr/bin/Xorg, 204\n4242, python, serve.py, 11822\n"
    assert doctor.parse_processes(text) == [
        {"pid": 4242, "name": "python, serve.py", "gb": 12.396},
        {"pid": 1201, "name": "/usr/bin/Xorg", "gb": 0.214},
    ]


def test_a_size_that_the_driver_does_not_tell_is_unknown_and_not_zero():
    assert doctor.parse_processes("77, [Not Found], [N/A]\n") == [
        {"pid": 77, "name": "[Not Found]", "gb": None}
    ]


def test_lines_that_are_no_process_are_left_out():
    assert doctor.parse_processes("No running processes found\n\n") == []
    assert doctor.parse_processes("") == []


def test_without_nvidia_smi_nobody_tells(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert doctor.list_gpu_processes() is None


def test_the_card_is_asked_for_by_its_number_on_the_bus(tmp_path, monkeypatch):
    """CUDA_VISIBLE_DEVICES renumbers the cards for CUDA and not for nvidia-smi."""
    script = tmp_path / "nvidia-smi"
    script.write_text('#!/bin/sh\necho "$2, card, 1000"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert doctor.list_gpu_processes(0)[0]["pid"] == 3
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert doctor.list_gpu_processes(1)[0]["pid"] == 1


def test_a_card_that_is_not_there_has_no_facts(monkeypatch):
    monkeypatch.setattr(doctor, "list_gpus", lambda: [("Card", 24.0, 20.0)])
    monkeypatch.setattr(doctor, "list_gpu_processes", lambda number: None)
    assert doctor.describe_gpu(0) == {"name": "Card", "total_gb": 24.0, "free_gb": 20.0, "processes": None}
    assert doctor.describe_gpu(1) is None


def test_a_container_or_windows_without_nvidia_smi_has_a_card_by_its_driver(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "DRIVERS", (str(tmp_path / "nvidiactl"), str(tmp_path / "dxg")))
    assert Common().context().isolated is False
    (tmp_path / "dxg").touch()
    assert Common().context().isolated is True


@pytest.fixture
def torch_with_cards(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # so that it is put back
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "")
    del os.environ["CUDA_VISIBLE_DEVICES"], os.environ["CUDA_DEVICE_ORDER"]


def test_gpu_counts_the_cards_of_the_bus(torch_with_cards):
    select_gpu(1)
    assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["CUDA_DEVICE_ORDER"]) == ("1", "PCI_BUS_ID")


def test_gpu_counts_within_the_cards_that_are_visible_already(torch_with_cards):
    os.environ["CUDA_VISIBLE_DEVICES"] = "2, GPU-5f3a"
    select_gpu(1)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-5f3a"
    assert "CUDA_DEVICE_ORDER" not in os.environ  # the numbers are in the order that their writer had
    with pytest.raises(DeviceError, match="CUDA_VISIBLE_DEVICES=GPU-5f3a shows 1 cards") as error:
        select_gpu(1)
    assert "unset CUDA_VISIBLE_DEVICES" in error.value.hint


def test_a_configuration_that_cannot_be_written_is_a_usage_fault(tmp_path):
    with pytest.raises(UsageError, match="cannot be written: No such file or directory"):
        doctor.write_configuration(tmp_path / "nowhere/sclite.toml", None)
