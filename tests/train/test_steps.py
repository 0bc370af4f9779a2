"""Every optimizer step changes weights; a stage whose weights are no longer numbers fails and is not finished."""

import math

import pytest

from sclite.errors import ScliteError
from sclite.train import trainer
from sclite.train.dpo import train_dpo
from sclite.train.sft import train_sft
from sclite.train.warmup import train_warmup
from tests.toy import adapter, largest_change, metrics_of, toy_config, write_pairs, write_toy

ONE_STEP = {"batch_size": 6, "per_device_train_batch_size": 3}


def test_the_first_step_moves_weights_by_the_full_learning_rate(run, folder):
    """AdamW's first step is the rate times the gradient's sign: g / (|g| + 1e-8)."""
    write_toy(run)
    once = {**ONE_STEP, "num_train_epochs": 1}
    # six reviews, and four closed rows of wrong work
    ten = {"batch_size": 10, "per_device_train_batch_size": 5}
    warmup = {**once, **ten, "learning_rate": 2e-3, "replay_share": 0}
    config = toy_config(folder, sft=once, warmup=warmup, dpo={**once, **ten, "replay_share": 0})
    assert train_sft(config, run).counts["steps"] == 1
    first = {name: w for name, w in adapter(run, "sft").items() if ".lora_B." in name}
    assert float(max(w.abs().max() for w in first.values())) == pytest.approx(3e-3, rel=1e-3)
    assert train_warmup(config, run).counts["steps"] == 1
    warm = largest_change(adapter(run, "sft"), adapter(run, "warmup"))
    assert warm == pytest.approx(2e-3, rel=1e-3)
    write_pairs(run)
    assert train_dpo(config, run).counts["steps"] == 1
    preferred = largest_change(adapter(run, "warmup"), adapter(run, "dpo"))
    assert preferred == pytest.approx(1e-3, rel=1e-3)


def test_the_learning_rate_warms_up_from_step_1_then_follows_cosine(run, folder):
    write_toy(run)
    train_sft(toy_config(folder, sft={"num_train_epochs": 8, "warmup_ratio": 0.2}), run)
    rates = [row["learning_rate"] / 3e-3 for row in metrics_of(run, "sft")]
    assert len(rates) == 12  # 6 rows, 8 times, 4 a step
    warmup = 3  # 0.2 of 12, rounded up
    cosine = [0.5 * (1 + math.cos(math.pi * step / (12 - warmup))) for step in range(12 - warmup)]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, *cosine], abs=1e-3)
    assert min(rates) > 0


def test_weights_that_are_not_numbers_are_an_error(run, folder, monkeypatch):
    whole = trainer.weighted_loss

    def spoiled(parts, totals):
        loss, figures = whole(parts, totals)
        return loss * math.nan, figures

    monkeypatch.setattr(trainer, "weighted_loss", spoiled)
    write_toy(run)
    config = toy_config(folder, sft={"num_train_epochs": 1})
    with pytest.raises(ScliteError, match="NaN or infinite") as error:
        train_sft(config, run)
    assert error.value.code == 1
    assert "sft.learning_rate (now 0.003)" in error.value.hint
    assert run.manifest("sft") is None
    (row,) = metrics_of(run, "sft")  # NaN weights are not trained on
    assert math.isnan(row["loss"])
    monkeypatch.undo()
    assert train_sft(config, run).counts["steps"] == 2
