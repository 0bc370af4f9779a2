"""Supervised training with the real trainer: loss masks, refused rows, and a falling loss."""

import math
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from sclite import prompts
from sclite.errors import DataError
from sclite.records import Template
from sclite.run import Run
from sclite.student.adapters import ORIGIN_FILE, Origin, fingerprint
from sclite.student.loader import load_student, load_tokenizer
from sclite.student.tokenization import TrainingSequence, encode_solution, end_id
from sclite.trace import Step, Trace, render
from sclite.train import stage
from sclite.train.metrics_logger import MetricsLogger, read_metrics
from sclite.train.sft import solve_rows, supervised, supervised_task, train_sft
from sclite.train.stage import TrainingJob
from sclite.train.trainer import Checkpoints, build_trainer, train_adapter, training_arguments
from sclite.train.warmup import train_warmup
from tests.toy import adapter, metrics_of, raises, toy_config, toy_problems, toy_trace, write_toy


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """(config, run, SFT report, what its progress showed) after SFT."""
    config, run, seen = toy_config(folder), Run(tmp_path_factory.mktemp("run")), []
    write_toy(run)
    report = train_sft(config, run, progress=lambda done, total, **_: seen.append((done, total)))
    return config, run, report, seen


def test_in_the_trainers_batches_the_prompt_alone_is_masked(folder, tmp_path):
    config = toy_config(folder)
    model, tokenizer = load_student(config, "sft", train=True)
    problem, trace = toy_problems(1)[0], toy_trace(0)
    rows = [encode_solution(tokenizer, prompts.solve_messages(problem.question), trace)] * 3
    task = supervised_task("sft", config.sft, 0, rows, tokenizer.pad_token_id)
    logger = MetricsLogger(tmp_path / "metrics.jsonl", "sft")
    trainer = build_trainer(model, task, [0, 1, 2], [], 2, logger, Checkpoints(tmp_path))
    for batch in trainer.get_train_dataloader():
        for ids, weights in zip(batch["batch"].ids, batch["batch"].weights, strict=True):
            prompt = tokenizer.decode(ids[weights == 0])
            assert prompt.endswith("<|im_start|>assistant\n")
            assert problem.question in prompt
            assert tokenizer.decode(ids[weights > 0]) == render(trace) + "<|im_end|>"
            assert int(ids[weights > 0][-1]) == end_id(tokenizer)


def test_no_more_checkpoints_are_saved_than_configured(folder, tmp_path):
    config = toy_config(folder, sft={"checkpoints": 10})
    model, tokenizer = load_student(config, "sft", train=True)
    task = supervised_task("sft", config.sft, 0, [GOOD] * 4, tokenizer.pad_token_id)
    for steps, expected in ((9, 1), (10, 1), (11, 2), (19, 2), (101, 11)):
        settings = training_arguments(model, task, tmp_path, steps, evaluates=True, micro_batch=1)
        assert (settings["save_steps"], settings["eval_steps"]) == (expected, expected)


def test_nothing_is_trained_again(trained):
    config, run, report, _ = trained
    before = run.path("sft/adapter/adapter_model.safetensors").stat().st_mtime_ns
    again = train_sft(config, run)
    assert again.skipped
    assert again.counts == report.counts
    assert run.path("sft/adapter/adapter_model.safetensors").stat().st_mtime_ns == before


GOOD, ENDLESS = TrainingSequence([5, 6, 2], [0.0, 1.0, 1.0]), "the end-of-turn token is missing or masked"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows are left"),
        ([TrainingSequence([5, 6, 2], [1.0, 1.0, 1.0])], "row a: the prompt is not masked"),
        ([GOOD, TrainingSequence([5, 6, 7], [0.0, 1.0, 1.0])], f"row b: {ENDLESS}"),
        ([GOOD, TrainingSequence([5, 6, 2], [0.0, 1.0, 0.0])], f"row b: {ENDLESS}"),
    ],
)
def test_rows_with_wrong_labels_are_refused_with_a_hint(folder, run, rows, message):
    job, tokenizer = TrainingJob("sft", toy_config(folder), run), load_tokenizer(str(folder))
    with raises(DataError, message):
        supervised(job, "ab"[: len(rows)], rows, tokenizer)
    supervised(job, ["a"], [GOOD], tokenizer)
    assert job.report.counts["rows"] == 1


def test_the_loss_falls_each_step_is_logged_and_the_adapter_is_not_zero(trained):
    _, run, report, seen = trained
    rows = metrics_of(run, "sft")
    assert [row["step"] for row in rows] == list(range(1, report.counts["steps"] + 1))
    assert report.counts == {"rows": 6, "steps": 6}
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    assert seen == [(0, 0), *((i, 6) for i in range(1, 7))]  # first the warning of few steps
    weights = adapter(run, "sft")
    assert any("lora_B" in name and float(value.abs().max()) > 0 for name, value in weights.items())
    assert {str(value.dtype) for value in weights.values()} == {"torch.float32"}


def test_the_micro_batch_changes_neither_losses_nor_gradients(folder, trained, tmp_path):
    """Rows of different lengths in one optimizer step: one, two or four forward passes give the same."""
    config, run, *_ = trained
    tokenizer = load_tokenizer(config.student.model)
    rows = solve_rows(tokenizer, run.read("templates.jsonl", Template), "")
    rows = [TrainingSequence([*rows[0].ids[:60], 2], [0.0] * 55 + [1.0] * 6), *rows, *rows[:2]]
    settings = {"num_train_epochs": 3, "learning_rate": 1e-3, "checkpoints": 1, "eval_share": 0.5}
    made = toy_config(folder, sft=settings)
    found = {}
    for micro in (1, 2, 4):
        model, _ = load_student(made, "sft", train=True)
        task = supervised_task("sft", made.sft, 0, rows, tokenizer.pad_token_id)
        metrics, checkpoints = tmp_path / f"{micro}.jsonl", Checkpoints(tmp_path / f"{micro}")
        train_adapter(model, task, checkpoints, metrics, micro)
        found[micro] = read_metrics(metrics)
    for name in ("loss", "grad_norm", "tokens", "eval_loss"):
        one, two, four = ([row[name] for row in found[micro] if name in row] for micro in (1, 2, 4))
        assert one
        assert one == pytest.approx(four, rel=1e-3)
        assert two == pytest.approx(four, rel=1e-3)


def test_base_model_is_not_fetched_again_and_long_rows_are_dropped(folder, run, monkeypatch):
    """The network may be gone by then."""

    def train_offline(*given, **named):
        monkeypatch.setattr(stage, "fetch_model", lambda _: pytest.fail("fetched"))
        return train_adapter(*given, **named)

    monkeypatch.setattr(stage, "train_adapter", train_offline)
    write_toy(run, 3)
    lengthy = render(Trace((Step(("1 + 1 = 2 " * 300).strip()),), None, "2"))
    run.append("templates.jsonl", [Template(id="long", question="How?", answer="2", trace=lengthy)])
    report = train_sft(toy_config(folder, sft={"num_train_epochs": 1}), run)
    origin = Origin.model_validate_json(run.path(f"sft/adapter/{ORIGIN_FILE}").read_bytes())
    assert origin.weights == fingerprint(folder)
    assert (report.dropped, report.counts["rows"]) == ({"longer_than_max_length": 1}, 3)


def test_a_bfloat16_checkpoint_trains_in_bfloat16_if_the_cpu_multiplies_it(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path)
    config, losses = toy_config(tmp_path, sft={"num_train_epochs": 8}), {}
    for able, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: {"avx512_bf16": able})
        model, _ = load_student(config, "sft", train=True)
        types = {p.requires_grad: p.dtype for p in model.parameters()}
        assert types == {False: expected, True: torch.float32}
        run = Run(tmp_path / f"run-{able}")
        write_toy(run)
        train_sft(config, run)
        losses[able] = [row["loss"] for row in metrics_of(run, "sft")]
    assert losses[True] != losses[False]
    assert losses[True] == pytest.approx(losses[False], rel=0.03)
    assert losses[True][-1] < losses[True][0] - 0.5
    used, _ = load_student(config, "sft")
    assert next(used.parameters()).dtype == torch.float32


def test_the_warmup_starts_from_the_sft_adapter_and_its_loss_falls(trained):
    config, run, *_ = trained
    report, rows = train_warmup(config, run), metrics_of(run, "warmup")
    assert report.counts == {"rows": 16, "reviews": 6, "steps": 16}
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3
    assert run.path("warmup/adapter/adapter_model.safetensors").is_file()
    # a new adapter would start where SFT started, at the loss of guessing
    assert metrics_of(run, "sft")[0]["loss"] > math.log(512)
    assert rows[0]["loss"] < metrics_of(run, "sft")[0]["loss"] - 0.5
