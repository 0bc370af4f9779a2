"""Unsloth on a real GPU, with the embedded student: it learns, resumes, reports its memory, and fits."""

import math
import os
import signal
import subprocess
import sys
import time

import pytest

from sclite.errors import GpuMemoryError
from sclite.run import Run
from sclite.train.sft import train_sft
from tests.benchmarks.bench_train import run_session
from tests.benchmarks.train_sides import peak
from tests.gpu.paths import config_of, figures
from tests.toy import TRAIN, adapter, metrics_of, start_training, train_all, write_toy

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(config, run) after SFT, warm-up and DPO through Unsloth in 4 bits."""
    run, config = Run(tmp_path_factory.mktemp("run")), config_of()
    train_all(config, run, 8)
    return config, run


def test_every_stage_learns_and_changes_every_lora_matrix(trained):
    _, run = trained
    for stage in TRAIN:
        rows, weights = metrics_of(run, stage), adapter(run, stage)
        assert rows[-1]["loss"] < rows[0]["loss"] - 0.05, stage
        assert rows[-1]["memory_gb"] < 24
        assert {str(value.dtype) for value in weights.values()} == {"torch.float32"}
        assert all(float(value.abs().max()) > 0 for value in weights.values()), stage
        assert not [name for name in weights if "ref" in name.split(".")]


def test_dpo_starts_at_ln_2_in_16_bits(trained):
    _, run = trained
    first = metrics_of(run, "dpo")[0]
    assert first["dpo_loss"] == pytest.approx(math.log(2), abs=0.02)
    assert abs(first["margin"]) < 0.02


@pytest.mark.parametrize("backend", ["unsloth", "plain"])
def test_padding_free_and_padded_rows_have_the_same_hidden_states(trained, backend):
    _, run = trained
    for name, gap in figures("hidden_gaps", backend, run).items():
        assert gap < 0.02, name


def test_both_backends_give_the_same_decision_odds(trained):
    _, run = trained
    ours, plain = (figures("odds", backend, run) for backend in ("unsloth", "plain"))
    for one, other in zip(ours, plain, strict=True):
        assert one == pytest.approx(other, abs=0.25)


def test_both_backends_generate_the_same_attempts(trained):
    _, run = trained
    ours, plain = (figures("attempts", backend, run) for backend in ("unsloth", "plain"))
    same = sum(one == other for one, other in zip(ours, plain, strict=True))
    assert same >= 0.75 * len(ours)  # near ties can go either way in 16 bits


def same_losses(run: Run, other: Run) -> None:
    """Step by step, as far as 16 bits are reproducible."""
    rows, expected = metrics_of(run, "sft"), metrics_of(other, "sft")
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], abs=0.02)


@pytest.fixture
def runs(tmp_path):
    """(whole, broken): two runs with the same rows."""
    made = Run(tmp_path / "whole"), Run(tmp_path / "broken")
    for run in made:
        write_toy(run, 8)
    return made


def test_killed_training_resumes_on_a_gpu(runs):
    whole, broken = runs
    config = config_of(num_train_epochs=16, checkpoints=8)
    train_sft(config, whole)
    process = start_training(config, broken, "sft")
    while process.poll() is None and not list(broken.path("sft/checkpoints").glob("*/whole.json")):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(broken.path("sft/checkpoints").glob("*/whole.json"))
    train_sft(config, broken)
    same_losses(broken, whole)


def test_training_resumes_after_ctrl_c_on_a_gpu(runs):
    whole, broken = runs
    config = config_of(num_train_epochs=8)
    train_sft(config, whole)

    def press(step, total, **_):
        if total and step == total // 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train_sft(config, broken, progress=press)
    assert len(metrics_of(broken, "sft")) < len(metrics_of(whole, "sft"))
    train_sft(config, broken)
    same_losses(broken, whole)


def test_running_out_of_gpu_memory_is_a_gpu_memory_error(tmp_path):
    import torch

    run = Run(tmp_path)
    write_toy(run, 8)
    total, before = torch.cuda.mem_get_info()[1], torch.cuda.get_per_process_memory_fraction()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 60e6) / total)
    try:
        with pytest.raises(GpuMemoryError, match="out of GPU memory"):
            train_sft(config_of(batch_size=64, per_device_train_batch_size=64, num_train_epochs=16), run)
    finally:
        torch.cuda.set_per_process_memory_fraction(before)


def test_a_missing_gpu_is_exit_5():
    command = [sys.executable, "-m", "sclite", "train", "--gpu", "77", "--set", "student.model=embedded"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 5
    assert "CUDA GPU 77 not found" in done.stderr


@pytest.mark.parametrize(
    ("name", "most_gb"),
    [("qwen2.5-math-7b", {"sft": 12, "dpo": 20}), ("llama-3.1-8b", {"sft": 24, "dpo": 24})],
)
def test_7b_and_8b_models_fit(name, most_gb, tmp_path):
    """Rows of 2,048 tokens, rank 32, micro-batch size 2; in a new process."""
    found = run_session(tmp_path, name, "unsloth", [peak("ours", stage, 2) for stage in most_gb])
    for row in found:
        assert "error" not in row
        assert row["peak_gb"] <= most_gb[row["stage"]]
