"""The micro-batch size: a divisor of the batch size, few enough for the RAM on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sclite.student.loader import load_student, read_config
from sclite.train import memory
from sclite.train.memory import (
    HEAP,
    Setting,
    architecture,
    choose_micro_batch,
    estimate_on_cpu,
    largest_divisor,
)
from tests.toy import tiny_llama, toy_config


def test_the_micro_batch_is_a_divisor_of_the_batch():
    for batch, most, expected in ((16, 16, 16), (16, 5, 4), (15, 7, 5), (7, 3, 1), (6, 9, 6)):
        assert largest_divisor(batch, most) == expected
    chosen = toy_config("embedded", sft={"batch_size": 6, "per_device_train_batch_size": 4})
    assert choose_micro_batch(chosen, "sft", 512) == 3


ALLOCATE = """
import ctypes
import torch

def taken():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6

torch.ones(7_000_000)  # freed at once: glibc raises its threshold to the largest freed block
before, kept = taken(), [torch.ones(500_000 + 64 * i) for i in range(100)]
full = taken()
del kept[::2]
ctypes.CDLL(None).malloc_trim(0)  # as after each step
print((taken() - before) / (full - before))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_freed_tensors_between_kept_ones_go_back_to_the_system():
    """Without the call no heap memory is returned: a share of 1.0 with glibc 2.36."""
    said = subprocess.check_output([sys.executable, "-c", ALLOCATE], text=True, env=os.environ)
    assert float(said) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("chosen", [None, "7"])
def test_onednn_caches_kernels_for_few_row_lengths(tmp_path, monkeypatch, chosen):
    """The cache size is 1,024 by default, and read once from the environment."""
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    monkeypatch.setenv(name, chosen or "")
    if chosen is None:
        monkeypatch.delenv(name)
    load_student(toy_config(tiny_llama(tmp_path)), "sft", train=True)
    assert os.environ[name] == (chosen or "64")


SMOLLM2 = {
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}  # fmt: skip


@pytest.fixture
def smollm2(tmp_path, monkeypatch, bf16):
    """A bfloat16 checkpoint without weights, on a CPU that multiplies bfloat16 or not (the parameter `bf16`)."""
    (tmp_path / "config.json").write_text(json.dumps({**SMOLLM2, "dtype": "bfloat16"}))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": bf16})
    return tmp_path


@pytest.mark.parametrize(
    ("longest", "ram", "bf16", "expected"),
    [
        (2048, 64e9, False, 1), (512, 64e9, False, 1), (256, 64e9, False, 2), (256, 64e9, True, 4),
        (128, 64e9, False, 4), (128, 2.2e9, False, 2), (128, 1e9, False, 1), (128, None, False, 4),
    ],
)  # fmt: skip
def test_on_a_cpu_rows_are_few_enough_for_4_gb_and_for_the_ram(smollm2, monkeypatch, longest, ram, expected):
    """SmolLM2-135M: 0.54 GB of weights; 1.32 MB of activations per token, times 1.8 for the heap; 0.6 MB per loss token."""
    monkeypatch.setattr(memory, "free_bytes", lambda: None)
    monkeypatch.setattr(memory, "available_ram", lambda: ram)
    chosen = toy_config(smollm2, sft={"per_device_train_batch_size": None, "batch_size": 16})
    assert choose_micro_batch(chosen, "sft", longest) == expected


@pytest.mark.parametrize(
    ("bf16", "rows", "tokens", "counted"),
    [
        # without the attention masks of unequal rows, and without the adapter in bfloat16
        (False, 2, 607, 1_689_324_704 - 30 * 4 * 2 * 607 * 607),
        (True, 2, 210, 330_953_088 - 30 * 2 * 2 * 210 * 210 - 2 * 9_768_960),
    ],
)
def test_the_activations_on_a_cpu_are_what_autograd_saves(smollm2, rows, tokens, counted):
    """Bytes of the distinct tensors saved for SmolLM2-135M with rank 32, counted with torch's saved_tensors_hooks."""
    model = architecture(read_config(str(smollm2)))
    found = estimate_on_cpu(model, Setting("sft", rows, tokens, 32, backend="plain")).parts["activations"]
    assert found / HEAP == pytest.approx(counted, rel=0.06)
