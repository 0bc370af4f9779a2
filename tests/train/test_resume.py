"""A killed training resumes to the same losses and weights, and only with the inputs that it started with."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest

from sclite.config import Config
from sclite.errors import UsageError
from sclite.run import Run
from sclite.signature import differences
from sclite.train.checkpoints import Checkpoints
from sclite.train.dpo import train_dpo
from sclite.train.metrics_logger import read_metrics
from sclite.train.order import training_order
from sclite.train.sft import train_sft
from sclite.train.warmup import train_warmup
from tests.toy import LONG, adapter, metrics_of, part_of, tiny_llama, toy_config, write_pairs, write_toy

STAGES = {"sft": "sft/adapter", "warmup": "warmup/adapter", "dpo": "dpo/adapter"}

CHILD = """
import sys
from sclite.config import Config
from sclite.run import Run
from sclite.train.{module} import train_{stage}
train_{stage}(Config.model_validate_json(sys.argv[1]), Run(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(config, run) with every stage trained without interruption."""
    folder, run = tiny_llama(tmp_path_factory.mktemp("student")), Run(tmp_path_factory.mktemp("run"))
    write_toy(run)
    config = toy_config(
        folder,
        sft={**LONG, "num_train_epochs": 12},
        warmup={**LONG, "num_train_epochs": 6},
        dpo={**LONG, "num_train_epochs": 12, "learning_rate": 1e-3},
    )
    train_sft(config, run)
    train_warmup(config, run)
    write_pairs(run)
    train_dpo(config, run)
    return config, run


def checkpoints_of(run: Run, stage: str) -> Checkpoints:
    return Checkpoints(run.path(f"{stage}/checkpoints"))


def start(config: Config, run: Run, stage: str) -> subprocess.Popen:
    code = CHILD.format(module=stage, stage=stage)
    return subprocess.Popen([sys.executable, "-c", code, config.model_dump_json(), str(run.folder)])


def interrupt(config: Config, run: Run, stage: str, how: int) -> int:
    """Start a stage in a new process, send it a signal after a checkpoint, and return the step that it reached."""
    process = start(config, run, stage)
    while process.poll() is None:
        rows = metrics_of(run, stage)
        if (
            checkpoints_of(run, stage).step()
            and rows
            and rows[-1]["step"] > checkpoints_of(run, stage).step()
        ):
            process.send_signal(how)
            break
        time.sleep(0.01)
    process.wait()
    assert process.returncode != 0, "it ended before it could be interrupted"
    return metrics_of(run, stage)[-1]["step"]


@pytest.mark.parametrize(
    ("stage", "train"), [("sft", train_sft), ("warmup", train_warmup), ("dpo", train_dpo)]
)
def test_a_killed_stage_resumes_to_the_same_losses_and_weights(whole, tmp_path, stage, train):
    config, unbroken = whole
    run = part_of(unbroken, tmp_path, stage)
    reached = interrupt(config, run, stage, signal.SIGKILL)
    resumed_from = checkpoints_of(run, stage).step()
    expected = metrics_of(unbroken, stage)
    assert 0 < resumed_from < reached <= len(expected)
    train(config, run)
    rows = metrics_of(run, stage)
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-4)
    weights, others = adapter(run, stage), adapter(unbroken, stage)
    assert weights.keys() == others.keys()
    assert max(float((weights[name] - others[name]).abs().max()) for name in weights) < 1e-6
    assert not checkpoints_of(run, stage).folder.exists()
    if stage == "dpo":  # resuming from the SFT adapter would show as ln 2
        assert rows[0]["dpo_loss"] == pytest.approx(math.log(2), abs=1e-3)
        assert rows[resumed_from]["dpo_loss"] < math.log(2) - 0.02
        kept, before = (r.read_json("dpo/reference.json")["log_probs"] for r in (run, unbroken))
        assert kept == before


def test_ctrl_c_saves_a_checkpoint_of_the_current_step(whole, tmp_path):
    config, unbroken = whole
    run = part_of(unbroken, tmp_path, "sft")
    reached = interrupt(config, run, "sft", signal.SIGINT)
    assert checkpoints_of(run, "sft").step() == reached
    train_sft(config, run)
    assert [row["step"] for row in metrics_of(run, "sft")] == [
        row["step"] for row in metrics_of(unbroken, "sft")
    ]


def test_a_half_written_checkpoint_is_not_resumed_from(tmp_path):
    inputs = {"seed": 0}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.prepare(inputs)
    for step in (3, 6):
        (tmp_path / f"checkpoint-{step}").mkdir()
    checkpoints.mark(3)
    assert checkpoints.last() == str(tmp_path / "checkpoint-3")
    checkpoints.prepare(inputs)
    assert not (tmp_path / "checkpoint-6").exists()
    assert checkpoints.step() == 3
    checkpoints.prepare({"seed": 1})
    assert checkpoints.step() == 0


def test_a_changed_setting_is_refused_with_the_difference(whole, tmp_path):
    config, unbroken = whole
    other = config.model_copy(
        update={
            "sft": config.sft.model_copy(update={"learning_rate": 2e-3, "per_device_train_batch_size": 4})
        }
    )
    with pytest.raises(
        UsageError, match=r"sft was trained with other inputs: sft\.learning_rate: 0\.003 before, 0\.002 now$"
    ) as error:
        train_sft(other, unbroken)
    assert "--fresh" in error.value.hint
    run = part_of(unbroken, tmp_path, "sft")
    interrupt(config, run, "sft", signal.SIGKILL)
    with pytest.raises(UsageError, match=r"sft was started with other inputs"):
        train_sft(other, run)
    assert checkpoints_of(run, "sft").step() > 0
    assert train_sft(other, run, fresh=True).counts["steps"] == len(metrics_of(unbroken, "sft"))


def test_settings_that_do_not_change_the_result_may_change(whole):
    config, run = whole
    same = config.sft.model_copy(
        update={"per_device_train_batch_size": 4, "checkpoints": 2, "tensorboard": True}
    )
    assert train_sft(config.model_copy(update={"sft": same}), run).skipped


def test_differences_name_the_setting_and_both_values():
    before = {
        "lora": {"r": 8},
        "sft": {"num_train_epochs": 3},
        "templates.jsonl": "0123456789abcdef",
        "seed": 0,
    }
    now = {
        "lora": {"r": 16},
        "sft": {"num_train_epochs": 3},
        "templates.jsonl": "fedcba9876543210",
        "seed": 0,
    }
    assert differences(before, now) == ["lora.r: 8 before, 16 now", "templates.jsonl changed"]
    assert differences(before, before) == []


def test_every_epoch_has_every_row_and_the_longest_comes_first():
    lengths = [10 + (7 * i) % 90 for i in range(203)]
    order = training_order(lengths, 8, 3, seed=1)
    assert len(order) == 609
    assert all(order.count(i) == 3 for i in range(203))
    assert lengths[order[0]] == max(lengths)
    assert order == training_order(lengths, 8, 3, seed=1) != training_order(lengths, 8, 3, seed=2)
    waste = sum(
        8 * max(lengths[i] for i in order[s : s + 8]) - sum(lengths[i] for i in order[s : s + 8])
        for s in range(0, 600, 8)
    )
    assert waste < 0.05 * sum(lengths) * 3
    assert len(training_order(lengths, 8, 0.5, seed=1)) == 102


def test_metrics_with_a_half_written_last_line_are_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"phase": "sft", "step": 1}) + "\n" + '{"phase": "sf')
    assert read_metrics(path) == [{"phase": "sft", "step": 1}]
    assert os.path.getsize(path) > 0


def test_a_manifest_never_signs_another_adapter(tmp_path, monkeypatch):
    folder = tiny_llama(tmp_path / "student")
    run = Run(tmp_path / "run")
    write_toy(run)
    train_sft(toy_config(folder, sft={"num_train_epochs": 1}), run)

    def die(*_):
        raise RuntimeError("killed between the adapter and its manifest")

    with monkeypatch.context() as broken:
        broken.setattr(Run, "sign", die)
        with pytest.raises(RuntimeError, match="killed"):
            train_sft(toy_config(folder, sft={"num_train_epochs": 2}), run, fresh=True)
    assert run.manifest("sft") is None
    first = toy_config(folder, sft={"num_train_epochs": 1})
    assert not train_sft(first, run, fresh=True).skipped
