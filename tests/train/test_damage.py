"""Damaged adapters, metrics and references: training recomputes them or refuses to go on."""

import os

import pytest

from sclite.errors import DataError
from sclite.run import Run
from sclite.train.metrics_logger import read_metrics
from sclite.train.sft import train_sft
from sclite.train.trainer import Checkpoints
from tests.toy import LONG, TRAIN, Said, adapter, largest_change, part_of, toy_config, train_all

FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth")


class Stopped(Exception):
    """Raised by a test to stop training."""


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """(config, run) with every stage trained without interruption."""
    run, short = Run(tmp_path_factory.mktemp("run")), {**LONG, "num_train_epochs": 4}
    warmup, dpo = {**short, "num_train_epochs": 1}, {**short, "learning_rate": 1e-3}
    config = toy_config(folder, sft=short, warmup=warmup, dpo=dpo)
    train_all(config, run)
    return config, run


@pytest.fixture
def stopped(whole, tmp_path, monkeypatch):
    """stopped(stage, step): a run whose stage stopped once the checkpoint of a step was complete."""

    def train_until(stage: str, step: int) -> Run:
        config, unbroken = whole
        run, mark = part_of(unbroken, tmp_path, stage), Checkpoints.mark

        def stopping(self, number):
            mark(self, number)
            if number >= step:
                raise Stopped

        with monkeypatch.context() as patched:
            patched.setattr(Checkpoints, "mark", stopping)
            with pytest.raises(Stopped):
                TRAIN[stage](config, run)
        assert Checkpoints(run.path(f"{stage}/checkpoints")).step() == step
        return run

    return train_until


def resume(whole, run: Run, stage: str) -> list[str]:
    """Resume a stage; it must end with the weights of the unbroken run. Returns the warnings."""
    config, unbroken = whole
    said = Said()
    TRAIN[stage](config, run, progress=said)
    assert largest_change(adapter(run, stage), adapter(unbroken, stage)) < 1e-6
    return said


def flip(path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut(path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def test_a_damaged_reference_is_recomputed_to_the_same_values(whole, stopped):
    run = stopped("dpo", 3)
    cut(run.path("dpo/reference.json"))
    resume(whole, run, "dpo")
    now, before = (r.read_json("dpo/reference.json")["log_probs"] for r in (run, whole[1]))
    assert now == before


def test_damaged_lines_of_metrics_are_removed(whole, stopped):
    run = stopped("sft", 4)
    path = run.path("sft/metrics.jsonl")
    lines = path.read_text().splitlines()
    lines[1] = lines[1][: len(lines[1]) // 2]
    path.write_text("\n".join([*lines, '{"phase": "sf']))
    resume(whole, run, "sft")
    assert [row["step"] for row in read_metrics(path)] == [1, 3, 4, 5, 6]


@pytest.mark.parametrize("stage", TRAIN)
@pytest.mark.parametrize("harm", [flip, cut])
def test_a_damaged_adapter_is_refused_and_fresh_retrains_it(whole, stage, harm):
    config, run = whole
    path = run.path(f"{stage}/adapter/adapter_model.safetensors")
    before = path.read_bytes()
    harm(path)
    with pytest.raises(DataError, match=f"is not the adapter that {stage} wrote") as error:
        TRAIN[stage](config, run)
    assert "--fresh" in error.value.hint
    if harm is flip:
        assert not TRAIN[stage](config, run, fresh=True).skipped
        assert path.read_bytes() == before  # training is deterministic
    path.write_bytes(before)
    assert TRAIN[stage](config, run).skipped


def test_files_are_synced_before_their_mark_is_written(whole, tmp_path, monkeypatch):
    config, unbroken = whole
    run = part_of(unbroken, tmp_path, "sft")
    synced, sync, replace = [], os.fsync, os.replace

    def noting(handle):
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))
        sync(handle)

    def renaming(source, target):
        synced.append(f"{target}, renamed")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noting)
    monkeypatch.setattr(os, "replace", renaming)
    train_sft(config, run)
    mark = next(i for i, path in enumerate(synced) if path.endswith("checkpoint-1/whole.json, renamed"))
    assert {f"{run.folder}/sft/checkpoints/checkpoint-1/{name}" for name in FILES} <= set(synced[:mark])
    done = next(i for i, path in enumerate(synced) if path.endswith("done/sft.json, renamed"))
    assert f"{run.folder}/sft/.adapter/adapter_model.safetensors" in synced[:done]
