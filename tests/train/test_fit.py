"""The micro-batch size: a divisor of the batch size, halved when out of memory, one if memory is unknown."""

import pytest

from sclite.errors import GpuMemoryError
from sclite.pipeline import halved
from sclite.train import memory
from sclite.train.memory import choose_micro_batch, largest_divisor, suggest_setting
from tests.train.test_sft import config_of


@pytest.mark.parametrize(
    ("batch", "most", "expected"), [(16, 16, 16), (16, 5, 4), (15, 7, 5), (7, 3, 1), (6, 9, 6)]
)
def test_the_micro_batch_divides_the_batch_size(batch, most, expected):
    assert largest_divisor(batch, most) == expected


def test_a_configured_micro_batch_is_lowered_to_a_divisor():
    chosen = config_of("embedded", sft={"batch_size": 6, "per_device_train_batch_size": 4})
    assert choose_micro_batch(chosen, "sft") == 3


def test_a_halved_micro_batch_divides_the_batch_size():
    chosen = config_of(
        "embedded",
        sft={"batch_size": 15, "per_device_train_batch_size": 15},
        warmup={"batch_size": 8, "per_device_train_batch_size": 8},
    )
    assert halved(chosen, GpuMemoryError("sft", 15)).sft.per_device_train_batch_size == 5
    assert halved(chosen, GpuMemoryError("warmup", 8)).warmup.per_device_train_batch_size == 4
    assert halved(chosen, GpuMemoryError("warmup", 8)).sft == chosen.sft


def test_if_memory_cannot_be_estimated_the_micro_batch_is_one(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe", "num_experts": 8}')
    monkeypatch.setattr(memory, "free_bytes", lambda: 24_000_000_000)
    chosen = config_of(tmp_path, sft={"per_device_train_batch_size": None, "batch_size": 8})
    assert choose_micro_batch(chosen, "sft") == 1
    assert suggest_setting(chosen, "sft") == ""


def test_after_running_out_of_memory_half_the_length_is_suggested(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda: 24_000_000_000)
    assert "try max_length 512" in suggest_setting(config_of("embedded"), "sft")
    monkeypatch.setattr(memory, "free_bytes", lambda: 1_000_000)
    assert "nothing fits" in suggest_setting(config_of("embedded"), "sft")
