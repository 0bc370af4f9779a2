"""Rows at once: always a divisor of the batch, halved after out of memory, one where nothing is known."""

import pytest

from sclite.errors import GpuMemoryError
from sclite.pipeline import halved
from sclite.train import memory
from sclite.train.memory import divisor, micro_batch, what_fits
from tests.train.test_sft import config_of


@pytest.mark.parametrize(
    ("batch", "most", "expected"), [(16, 16, 16), (16, 5, 4), (15, 7, 5), (7, 3, 1), (6, 9, 6)]
)
def test_rows_at_once_divide_the_batch(batch, most, expected):
    assert divisor(batch, most) == expected


def test_a_configured_number_that_does_not_divide_the_batch_gives_way():
    chosen = config_of("embedded", sft={"batch_size": 6, "per_device_train_batch_size": 4})
    assert micro_batch(chosen, "sft") == 3


def test_half_of_the_rows_divide_the_batch_too():
    chosen = config_of(
        "embedded",
        sft={"batch_size": 15, "per_device_train_batch_size": 15},
        warmup={"batch_size": 8, "per_device_train_batch_size": 8},
    )
    assert halved(chosen, GpuMemoryError("sft", 15)).sft.per_device_train_batch_size == 5
    assert halved(chosen, GpuMemoryError("warmup", 8)).warmup.per_device_train_batch_size == 4
    assert halved(chosen, GpuMemoryError("warmup", 8)).sft == chosen.sft


def test_a_student_whose_memory_cannot_be_reckoned_begins_with_one_row(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe", "num_experts": 8}')
    monkeypatch.setattr(memory, "free_bytes", lambda: 24_000_000_000)
    chosen = config_of(tmp_path, sft={"per_device_train_batch_size": None, "batch_size": 8})
    assert micro_batch(chosen, "sft") == 1
    assert what_fits(chosen, "sft") == ""


def test_what_should_have_fitted_names_half_the_length(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda: 24_000_000_000)
    assert "try max_length 512" in what_fits(config_of("embedded"), "sft")
    monkeypatch.setattr(memory, "free_bytes", lambda: 1_000_000)
    assert "nothing fits" in what_fits(config_of("embedded"), "sft")
