"""Training resumes after a kill to the same losses and weights, and only with the inputs it started with."""

import math
import signal
import time

import pytest

from sclite.config import Config
from sclite.errors import UsageError
from sclite.run import Run
from sclite.train import trainer
from sclite.train.sft import train_sft
from sclite.train.trainer import Checkpoints, training_order
from tests.toy import (
    LONG,
    TRAIN,
    adapter,
    largest_change,
    metrics_of,
    part_of,
    start_training,
    toy_config,
    train_all,
    write_toy,
)


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """(config, run) with every stage trained without interruption."""
    run, long = Run(tmp_path_factory.mktemp("run")), {**LONG, "num_train_epochs": 12}
    warmup, dpo = {**LONG, "num_train_epochs": 6}, {**long, "learning_rate": 1e-3}
    config = toy_config(folder, sft=long, warmup=warmup, dpo=dpo)
    train_all(config, run)
    return config, run


def checkpoints_of(run: Run, stage: str) -> Checkpoints:
    return Checkpoints(run.path(f"{stage}/checkpoints"))


def interrupt(config: Config, run: Run) -> int:
    """Train SFT until Ctrl-C after its first checkpoint, and return the step that it reached."""
    mark, pressed = Checkpoints.mark, []

    def press(self, step):
        mark(self, step)
        if not pressed:
            pressed.append(step)
            signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "mark", press)
        with pytest.raises(KeyboardInterrupt):
            train_sft(config, run)
    return metrics_of(run, "sft")[-1]["step"]


@pytest.mark.parametrize("stage", ["sft", pytest.param("warmup", marks=pytest.mark.slow), "dpo"])
def test_a_killed_stage_resumes_to_the_same_losses_and_weights(whole, tmp_path, stage):
    config, unbroken = whole
    run = part_of(unbroken, tmp_path, stage)
    process = start_training(config, run, stage)
    while process.poll() is None:
        rows = metrics_of(run, stage)
        if rows and rows[-1]["step"] > checkpoints_of(run, stage).step() > 0:
            process.kill()
            break
        time.sleep(0.01)
    assert process.wait() != 0, "it ended before it could be killed"
    reached, resumed_from = metrics_of(run, stage)[-1]["step"], checkpoints_of(run, stage).step()
    expected = metrics_of(unbroken, stage)
    assert 0 < resumed_from < reached <= len(expected)
    TRAIN[stage](config, run)
    rows = metrics_of(run, stage)
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], abs=1e-4)
    assert largest_change(adapter(run, stage), adapter(unbroken, stage)) < 1e-6
    assert not checkpoints_of(run, stage).folder.exists()
    if stage == "dpo":  # resuming from the SFT adapter would show as ln 2
        assert rows[0]["dpo_loss"] == pytest.approx(math.log(2), abs=1e-3)
        assert rows[resumed_from]["dpo_loss"] < math.log(2) - 0.02
        kept, before = (r.read_json("dpo/reference.json")["log_probs"] for r in (run, unbroken))
        assert kept == before


def test_ctrl_c_saves_a_checkpoint_of_the_current_step(whole, tmp_path, monkeypatch):
    config, unbroken = whole
    run = part_of(unbroken, tmp_path, "sft")
    reached = interrupt(config, run)
    assert checkpoints_of(run, "sft").step() == reached
    # the last steps, where checkpoints are now wanted, instead of the interval stored in the checkpoint
    marked, total = [], len(metrics_of(unbroken, "sft"))
    monkeypatch.setattr(Checkpoints, "mark", lambda self, step: marked.append(step))
    train_sft(config.model_copy(update={"sft": config.sft.model_copy(update={"checkpoints": total})}), run)
    assert marked == list(range(reached + 1, total + 1))
    steps, expected = ([row["step"] for row in metrics_of(r, "sft")] for r in (run, unbroken))
    assert steps == expected


def test_a_half_written_checkpoint_is_not_resumed_from(tmp_path):
    inputs = {"seed": 0}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.prepare(inputs)
    for step in (3, 6):
        (tmp_path / f"checkpoint-{step}").mkdir(parents=True)
    checkpoints.mark(3)
    assert checkpoints.step() == 3
    checkpoints.prepare(inputs)
    assert not (tmp_path / "checkpoint-6").exists()
    assert checkpoints.step() == 3
    checkpoints.prepare({"seed": 1})
    assert checkpoints.step() == 0


def test_the_previous_checkpoint_is_kept_until_the_next_is_complete(folder, run, monkeypatch):
    """Next to the best step's, here the first: the evaluation loss rises as the training loss falls."""
    write_toy(run, 12)
    mark, before, whole = Checkpoints.mark, {}, trainer.weighted_loss

    def marking(self, step):
        before[step] = self.step()
        mark(self, step)

    def rising(parts, totals):
        loss, figures = whole(parts, totals)
        return (loss if loss.requires_grad else -loss), figures

    monkeypatch.setattr(Checkpoints, "mark", marking)
    monkeypatch.setattr(trainer, "weighted_loss", rising)
    train_sft(toy_config(folder, sft={"num_train_epochs": 2, "eval_share": 0.34}), run)
    assert before == {1: 0, 2: 1, 3: 2, 4: 3}


def test_a_changed_setting_is_refused_unless_it_does_not_change_the_result(whole, tmp_path):
    config, unbroken = whole
    changed = config.sft.model_copy(update={"learning_rate": 2e-3, "per_device_train_batch_size": 4})
    other = config.model_copy(update={"sft": changed})
    said = r"sft was trained with other inputs: sft\.learning_rate: 0\.003 before, 0\.002 now$"
    with pytest.raises(UsageError, match=said) as error:
        train_sft(other, unbroken)
    assert "--fresh" in error.value.hint
    run = part_of(unbroken, tmp_path, "sft")
    interrupt(config, run)
    with pytest.raises(UsageError, match=r"sft was started with other inputs"):
        train_sft(other, run)
    assert checkpoints_of(run, "sft").step() > 0
    assert train_sft(other, run, fresh=True).counts["steps"] == len(metrics_of(unbroken, "sft"))
    config, run = whole
    change = {"per_device_train_batch_size": 4, "checkpoints": 2, "tensorboard": True}
    same = config.model_copy(update={"sft": config.sft.model_copy(update=change)})
    assert train_sft(same, run).skipped


def test_every_epoch_has_every_row_and_the_longest_comes_first():
    lengths = [10 + (7 * i) % 90 for i in range(203)]
    order = training_order(lengths, 8, 3, seed=1)
    assert len(order) == 609
    assert all(order.count(i) == 3 for i in range(203))
    assert lengths[order[0]] == max(lengths)
    assert order == training_order(lengths, 8, 3, seed=1) != training_order(lengths, 8, 3, seed=2)
    steps = [[lengths[i] for i in order[start : start + 8]] for start in range(0, 600, 8)]
    assert sum(8 * max(step) - sum(step) for step in steps) < 0.05 * sum(lengths) * 3  # padding
    assert len(training_order(lengths, 8, 0.5, seed=1)) == 102


def test_a_manifest_never_signs_another_adapter(folder, run, monkeypatch):
    write_toy(run)
    first = toy_config(folder, sft={"num_train_epochs": 1})
    train_sft(first, run)

    def die(*_):
        raise RuntimeError("killed between the adapter and its manifest")

    with monkeypatch.context() as broken:
        broken.setattr(Run, "sign", die)
        with pytest.raises(RuntimeError, match="killed"):
            train_sft(toy_config(folder, sft={"num_train_epochs": 2}), run, fresh=True)
    assert run.manifest("sft") is None
    assert not train_sft(first, run, fresh=True).skipped
