"""Damaged checkpoints, adapters, metrics and references: training resumes from the last intact one, with a warning."""

import json

import pytest

from sclite.errors import DataError
from sclite.run import Run
from sclite.train.checkpoints import Checkpoints
from sclite.train.dpo import train_dpo
from sclite.train.metrics_logger import read_metrics
from sclite.train.sft import train_sft
from sclite.train.warmup import train_warmup
from tests.toy import LONG, adapter, metrics_of, part_of, tiny_llama, toy_config, write_pairs, write_toy

FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth")


class Stopped(Exception):
    """Raised by a test to stop a training."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(config, run) with every stage trained without interruption."""
    folder, run = tiny_llama(tmp_path_factory.mktemp("student")), Run(tmp_path_factory.mktemp("run"))
    write_toy(run)
    short = {**LONG, "num_train_epochs": 4}
    config = toy_config(
        folder, sft=short, warmup={**short, "num_train_epochs": 1}, dpo={**short, "learning_rate": 1e-3}
    )
    train_sft(config, run)
    train_warmup(config, run)
    write_pairs(run)
    train_dpo(config, run)
    return config, run


def stopped_at(config, run: Run, train, step: int, monkeypatch) -> Checkpoints:
    """Train until the checkpoint of a step is complete, then stop."""
    kept = []
    mark = Checkpoints.mark

    def stopping(self, number):
        mark(self, number)
        kept.append(self)
        if number >= step:
            raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "mark", stopping)
        with pytest.raises(Stopped):
            train(config, run)
    return kept[-1]


def flip(path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut(path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def same_weights(run: Run, other: Run, stage: str) -> bool:
    one, two = adapter(run, stage), adapter(other, stage)
    return max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-6


@pytest.mark.parametrize("harm", [flip, cut])
@pytest.mark.parametrize("name", FILES)
def test_training_resumes_from_the_checkpoint_before_a_damaged_one(whole, tmp_path, monkeypatch, name, harm):
    config, unbroken = whole
    run, said = part_of(unbroken, tmp_path, "sft"), []
    checkpoints = stopped_at(config, run, train_sft, 4, monkeypatch)
    assert checkpoints.step() == 4
    harm(checkpoints.folder / "checkpoint-4" / name)
    train_sft(config, run, progress=lambda *_, warning="", **__: said.append(warning))
    assert f"checkpoint-4 ({name} is damaged); training resumes from step 3" in said[0]
    assert [row["step"] for row in metrics_of(run, "sft")] == [1, 2, 3, 4, 5, 6]
    assert same_weights(run, unbroken, "sft")


def test_if_every_checkpoint_is_damaged_training_starts_over(whole, tmp_path, monkeypatch):
    config, unbroken = whole
    run, said = part_of(unbroken, tmp_path, "sft"), []
    checkpoints = stopped_at(config, run, train_sft, 4, monkeypatch)
    cut(checkpoints.folder / "checkpoint-4/whole.json")
    (checkpoints.folder / "checkpoint-3/optimizer.pt").unlink()
    train_sft(config, run, progress=lambda *_, warning="", **__: said.append(warning))
    assert "checkpoint-4 (whole.json is damaged), checkpoint-3 (optimizer.pt is missing)" in said[0]
    assert said[0].endswith("training starts over")
    assert same_weights(run, unbroken, "sft")


@pytest.mark.parametrize("harm", ["digit", "cut", "shape"])
def test_a_damaged_reference_is_recomputed_to_the_same_values(whole, tmp_path, monkeypatch, harm):
    config, unbroken = whole
    run, said = part_of(unbroken, tmp_path, "dpo"), []
    stopped_at(config, run, train_dpo, 3, monkeypatch)
    path = run.path("dpo/reference.json")
    kept = json.loads(path.read_text())
    next(iter(kept["log_probs"].values()))["decisions"][0][0] += 1.0
    path.write_text({"digit": json.dumps(kept), "cut": path.read_text()[:-40], "shape": "[]"}[harm])
    train_dpo(config, run, progress=lambda *_, warning="", **__: said.append(warning))
    assert "reference.json is damaged: recomputing the reference" in " ".join(said)
    now, before = (r.read_json("dpo/reference.json")["log_probs"] for r in (run, unbroken))
    assert now == before
    assert same_weights(run, unbroken, "dpo")


def test_damaged_lines_of_metrics_are_removed_and_counted(whole, tmp_path, monkeypatch):
    config, unbroken = whole
    run, said = part_of(unbroken, tmp_path, "sft"), []
    stopped_at(config, run, train_sft, 4, monkeypatch)
    path = run.path("sft/metrics.jsonl")
    lines = path.read_text().splitlines()
    lines[1], lines[2] = lines[1][: len(lines[1]) // 2], '["not", "a row"]'
    path.write_text("\n".join([*lines, '{"phase": "sft", "step": "5"}', '{"phase": "sf']))
    train_sft(config, run, progress=lambda *_, warning="", **__: said.append(warning))
    assert "metrics.jsonl: 3 damaged lines removed" in said[0]
    assert [row["step"] for row in read_metrics(path)] == [1, 4, 5, 6]


@pytest.mark.parametrize(
    ("stage", "train", "name"),
    [
        ("sft", train_sft, "sft/adapter"),
        ("warmup", train_warmup, "warmup/adapter"),
        ("dpo", train_dpo, "dpo/adapter"),
    ],
)
@pytest.mark.parametrize("harm", [flip, cut])
def test_a_damaged_adapter_is_refused_and_fresh_retrains_it(whole, stage, train, name, harm):
    config, run = whole
    path = run.path(f"{name}/adapter_model.safetensors")
    before = path.read_bytes()
    harm(path)
    with pytest.raises(DataError, match=f"is not the adapter that {stage} wrote") as error:
        train(config, run)
    assert "--fresh" in error.value.hint
    if harm is flip:
        assert not train(config, run, fresh=True).skipped
        assert path.read_bytes() == before  # training is deterministic
    path.write_bytes(before)
    assert train(config, run).skipped


def test_files_are_synced_before_the_mark_that_vouches_for_them(whole, tmp_path, monkeypatch):
    import os

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
