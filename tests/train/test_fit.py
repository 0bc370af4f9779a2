"""The micro-batch size: a divisor of the batch size, one if memory is unknown, few enough for the RAM on a CPU."""

import json

import pytest

from sclite.train import memory
from sclite.train.memory import (
    HEAP,
    Setting,
    choose_micro_batch,
    estimate_on_cpu,
    largest_divisor,
    read_architecture,
    suggest_setting,
)
from tests.toy import toy_config


@pytest.mark.parametrize(
    ("batch", "most", "expected"), [(16, 16, 16), (16, 5, 4), (15, 7, 5), (7, 3, 1), (6, 9, 6)]
)
def test_the_micro_batch_divides_the_batch_size(batch, most, expected):
    assert largest_divisor(batch, most) == expected


def test_a_configured_micro_batch_is_lowered_to_a_divisor():
    chosen = toy_config("embedded", sft={"batch_size": 6, "per_device_train_batch_size": 4})
    assert choose_micro_batch(chosen, "sft") == 3


def test_if_memory_cannot_be_estimated_the_micro_batch_is_one(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe", "num_experts": 8}')
    monkeypatch.setattr(memory, "free_bytes", lambda: 24_000_000_000)
    chosen = toy_config(tmp_path, sft={"per_device_train_batch_size": None, "batch_size": 8})
    assert choose_micro_batch(chosen, "sft") == 1
    assert suggest_setting(chosen, "sft") == ""


def test_after_running_out_of_memory_half_the_length_is_suggested(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda: 24_000_000_000)
    assert "try max_length 512" in suggest_setting(toy_config("embedded"), "sft")
    monkeypatch.setattr(memory, "free_bytes", lambda: 1_000_000)
    assert "nothing fits" in suggest_setting(toy_config("embedded"), "sft")


SMOLLM2 = {
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}  # fmt: skip


@pytest.mark.parametrize(
    ("max_length", "ram", "expected"),
    [(2048, 64e9, 1), (128, 64e9, 4), (128, 2.2e9, 2), (128, 1e9, 1), (128, None, 4)],
)
def test_on_a_cpu_rows_are_few_enough_for_four_gigabytes_and_for_the_ram(
    tmp_path, monkeypatch, max_length, ram, expected
):
    """SmolLM2-135M: 0.54 GB of weights; 1.32 MB of activations per token, times 1.8 for the heap."""
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2))
    monkeypatch.setattr(memory, "free_bytes", lambda: None)
    monkeypatch.setattr(memory, "available_ram", lambda: ram)
    settings = {"per_device_train_batch_size": None, "batch_size": 16, "max_length": max_length}
    assert choose_micro_batch(toy_config(tmp_path, sft=settings), "sft") == expected


def test_the_activations_on_a_cpu_are_what_autograd_saves(tmp_path):
    """1,391,536 bytes per token were counted for SmolLM2-135M with rank 32, the attention mask of 607 tokens included."""
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2))
    model = read_architecture(toy_config(tmp_path).student)
    found = estimate_on_cpu(model, Setting("sft", 2, 607, 32, backend="plain")).parts["activations"]
    mask = 30 * 4 * 607
    assert found / HEAP / (2 * 607) + mask == pytest.approx(1_391_536, rel=0.01)
