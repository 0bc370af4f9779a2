"""Metrics, warnings with advice, and the best weights by evaluation loss."""

import math

import pytest
import torch

from sclite.records import Template
from sclite.student.loader import load_student
from sclite.train import metrics_logger as metrics
from sclite.train.losses import negative_log_likelihood
from sclite.train.metrics_logger import MetricsLogger, diagnose, read_metrics
from sclite.train.sft import solve_rows, supervised_task, train_sft
from sclite.train.trainer import held_out_rows
from tests.toy import Said, toy_config, write_toy


def steps(count: int, **figures) -> list[dict]:
    healthy = {"loss": 1.0, "grad_norm": 1.0, "dpo_loss": 0.5, "margin": 0.4, "chosen_shift": 0.1}
    rows = [{"step": i, **healthy, **figures} for i in range(1, count + 1)]
    return [rows[0] | {"dpo_loss": figures.get("dpo_loss", math.log(2))}, *rows[1:]]


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        (steps(25, margin=0.0, dpo_loss=math.log(2)), metrics.FLAT),
        (steps(25, chosen_shift=-3.0), metrics.FALLING),
        ([*steps(30), *steps(1, grad_norm=25.0)], metrics.EXPLODING),
        (steps(2, dpo_loss=0.66), metrics.OTHER_REFERENCE),
        (steps(1, loss=math.nan), metrics.NOT_A_NUMBER),
        (steps(1, grad_norm=math.inf), metrics.NOT_A_NUMBER),
    ],
)
def test_known_problems_are_recognized_and_healthy_training_has_none(rows, kind):
    assert diagnose(rows) == [kind]
    for healthy in ([], steps(40), steps(5, margin=0.0, dpo_loss=math.log(2))):
        assert diagnose(healthy) == []


def test_a_warning_is_shown_once_with_its_step(tmp_path):
    said = Said()
    logger = MetricsLogger(tmp_path / "metrics.jsonl", "dpo", said)
    for step in range(1, 31):
        logger.add({"margin": 0.0, "dpo_loss": math.log(2), "chosen_shift": 0.0}, 10)
        logger.log_step({"loss": 1.0, "grad_norm": 0.1}, step, 30)
    assert said == [f"step 21: {metrics.FLAT}"]
    assert logger.warnings == [metrics.FLAT]


def test_micro_batch_figures_are_summed(tmp_path):
    logger = MetricsLogger(tmp_path / "metrics.jsonl", "dpo")
    logger.add({"margin": 0.25}, 100)
    logger.add({"margin": 0.5}, 50)
    logger.log_step({"loss": 0.7, "learning_rate": 4e-7}, 1, 9)
    row = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert (row["margin"], row["tokens"], row["phase"]) == (0.75, 150, "dpo")
    assert row["tokens_per_second"] > 0
    assert row["learning_rate"] == 4e-7


def test_the_progress_line_shows_loss_margin_speed_and_memory(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 9_840_000_000)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    logger = MetricsLogger(tmp_path / "metrics.jsonl", "dpo", lambda *_, note="", **__: said.append(note))
    logger.add({"margin": 0.31, "accuracy": 0.74}, 0)
    logger.log_step({"loss": 0.4123}, 1, 9)
    logger.log_step({"eval_loss": 0.5}, 1, 9)
    shown = "loss 0.412, margin 0.31, accuracy 74 %, 0 tokens/s, 9.8 GB"
    assert said == [shown, "evaluation loss 0.500"]


def test_early_stopping_keeps_the_best_weights(folder, run):
    """At a learning rate this high the evaluation loss soon rises; the adapter is from its lowest step."""
    write_toy(run, 12)
    settings = {"learning_rate": 3e-2, "num_train_epochs": 20, "checkpoints": 30}
    config = toy_config(folder, sft={**settings, "eval_share": 0.34, "early_stopping_patience": 3})
    report = train_sft(config, run)
    rows = read_metrics(run.path("sft/metrics.jsonl"))
    losses = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
    best = min(losses, key=losses.get)
    assert report.counts["steps"] == max(losses) < 40
    assert losses[max(losses)] > losses[best]
    model, tokenizer = load_student(config, "sft", run.path("sft/adapter"))
    encoded = solve_rows(tokenizer, run.read("templates.jsonl", Template), "")
    held_out = held_out_rows(len(encoded), 0.34, config.seed)
    task = supervised_task("sft", config.sft, 0, encoded, tokenizer.pad_token_id)
    part = negative_log_likelihood(model.eval(), task.collate(held_out))["nll"]
    tokens = sum(task.counts[i]["tokens"] for i in held_out)
    assert part.total.item() / tokens == pytest.approx(losses[best], rel=1e-4)


def test_rows_are_held_out_only_if_there_are_enough():
    assert held_out_rows(100, 0.02, 0) == []
    assert len(held_out_rows(1000, 0.02, 0)) == 20
    assert len(held_out_rows(100_000, 0.02, 0)) == 200
    assert held_out_rows(1000, 0.02, 0) == held_out_rows(1000, 0.02, 0) != held_out_rows(1000, 0.02, 1)
