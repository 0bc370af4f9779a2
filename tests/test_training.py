"""`sclite train` on a tiny student: out of memory, separate processes, warnings, the plan, and errors."""

import importlib.util
import json
from contextlib import contextmanager

import pytest
import torch

from sclite import console, pipeline, prompts
from sclite.context import Context
from sclite.errors import DeviceError, UsageError
from sclite.inspect.plan import plan_training, print_plan
from sclite.progress import ProgressDisplay
from sclite.records import Template
from sclite.run import Run
from sclite.student.base import Request
from sclite.student.hf_model import HFModel
from sclite.student.loader import load_student, load_tokenizer
from sclite.train import memory, sft, stage
from sclite.train.metrics_logger import read_metrics
from tests.toy import pay, raises, toy_config, write_toy


class Recorder(ProgressDisplay):
    """Keeps warnings, steps (done, total, note) and the line of a finished stage."""

    def __init__(self):
        super().__init__(quiet=True)
        self.shown, self.line = [], ""

    @contextmanager
    def stage(self, name, text):
        def show(done, total, *_, note="", warning="", **__):
            self.shown.append(warning or (done, total, note))

        yield show

    def done(self, name, text, skipped=False):
        self.line = text

    def steps(self) -> list[tuple]:
        return [entry for entry in self.shown if isinstance(entry, tuple)]

    def warnings(self) -> list[str]:
        return [entry for entry in self.shown if isinstance(entry, str)]


def context_of(folder, path, isolated=False, **settings) -> Context:
    run = Run(path)
    write_toy(run, 12)
    config = toy_config(folder, **settings).model_copy(update={"run": str(path)})
    return Context(config, run, Recorder(), isolated=isolated)


def train_sft(context: Context):
    return pipeline.train_stage(context, "sft")


def limit_memory(monkeypatch, rows: int, from_step: int = 0) -> list[int]:
    """Make forward passes with more rows run out of memory, as on a GPU; returns the sizes tried."""
    tried, real = [], sft.negative_log_likelihood

    def limited(model, batch):
        tried.append(len(batch.ids))
        if len(tried) > from_step and len(batch.ids) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(model, batch)

    monkeypatch.setattr(sft, "negative_log_likelihood", limited)
    return tried


def test_out_of_memory_halves_the_micro_batch_and_resumes(folder, tmp_path, monkeypatch):
    settings = {"sft": {"per_device_train_batch_size": 4, "num_train_epochs": 6, "checkpoints": 9}}
    whole = context_of(folder, tmp_path / "whole", **settings)
    train_sft(whole)
    context = context_of(folder, tmp_path / "small", **settings)
    tried = limit_memory(monkeypatch, rows=2, from_step=4)
    train_sft(context)
    warnings = [text for text in context.display.warnings() if "optimizer steps" not in text]
    assert warnings == ["out of memory at micro-batch size 4: sft resumes at 2"]
    assert max(tried[5:]) == 2
    rows, expected = (read_metrics(c.run.path("sft/metrics.jsonl")) for c in (context, whole))
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], rel=1e-4)


@pytest.mark.parametrize(
    ("free", "advice"),
    [
        (None, "shows what fits"),
        (24_000_000_000, ". By the memory estimate it should fit; try max_length 512"),
        (1_000_000, "estimate nothing fits: at least"),
    ],
)
def test_if_one_row_does_not_fit_it_says_what_to_lower(folder, tmp_path, monkeypatch, free, advice):
    monkeypatch.setattr(memory, "free_bytes", lambda: free)
    context = context_of(folder, tmp_path, sft={"per_device_train_batch_size": 2})
    limit_memory(monkeypatch, rows=0)
    with pytest.raises(DeviceError, match="sft: out of GPU memory at micro-batch size 1") as error:
        train_sft(context)
    assert error.value.code == 5
    assert "sft.max_length" in error.value.hint
    assert advice in error.value.hint
    assert context.run.manifest("sft") is None

    def broken(model, batch):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(sft, "negative_log_likelihood", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):  # not taken for one of memory
        train_sft(context)


def test_attempts_that_do_not_fit_are_sampled_in_halves(folder, monkeypatch):
    model, tokenizer = load_student(toy_config(folder), "sft")
    sizes, real = [], model.generate

    def limited(input_ids, **settings):
        sizes.append(len(input_ids))
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(input_ids=input_ids, **settings)

    requests = [Request(prompts.solve_messages(f"What is {n} + 1?"), max_tokens=4) for n in range(9)]
    expected = [reply.text for reply in HFModel(model, tokenizer, 8).generate(requests)]
    monkeypatch.setattr(model, "generate", limited)
    replies = list(HFModel(model, tokenizer, 8).generate(requests))
    assert [reply.index for reply in replies] == list(range(9))
    assert [reply.text for reply in replies] == expected
    assert sizes == [8, 4, 2, 2, 2, 2, 1]


def test_in_its_own_process_a_stage_trains_the_same_and_reports_each_step(folder, tmp_path):
    here, there = context_of(folder, tmp_path / "a"), context_of(folder, tmp_path / "b", isolated=True)
    train_sft(here)
    report = train_sft(there)
    assert report.counts == here.reports[-1].counts
    steps = there.display.steps()
    assert [step[:2] for step in steps] == [step[:2] for step in here.display.steps()]
    assert steps[-1][2].startswith("loss ")
    one, other = (c.run.path("sft/adapter/adapter_model.safetensors").read_bytes() for c in (here, there))
    assert one == other


def test_long_rows_are_reported_before_the_first_step_and_in_the_final_line(folder, tmp_path):
    context = context_of(folder, tmp_path)
    tokenizer, unseen = load_tokenizer(context.config.student.model), pipeline.unseen(context)
    templates = [row for row in context.run.read("templates.jsonl", Template) if row.id not in unseen]
    *shorter, longest = sorted(len(row.ids) for row in sft.solve_rows(tokenizer, templates, ""))
    chosen = context.config.sft.model_copy(update={"max_length": longest - 1})
    context.config = context.config.model_copy(update={"sft": chosen})
    left = train_sft(context).dropped["longer_than_max_length"]
    first, second, step = context.display.shown[:3]
    said = f"{left} of {len(shorter) + 1} rows have more than {longest - 1} tokens and are skipped"
    assert first == f"{said} (the longest has {longest}): raise sft.max_length"
    assert "only 4 optimizer steps" in second
    assert step[0] == 1
    assert f"steps, {left} longer than max length" in context.display.line


def test_missing_tensorboard_is_an_error_before_the_first_step(folder, tmp_path, monkeypatch):
    real = importlib.util.find_spec
    without = lambda name, *a: None if name.startswith("tensorboard") else real(name, *a)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", without)
    with raises(UsageError, "tensorboard is enabled but not installed", hint="pip install tensorboard"):
        train_sft(context_of(folder, tmp_path, sft={"tensorboard": True}))


def test_the_plan_has_the_steps_rows_and_micro_batch_of_the_training(folder, tmp_path, monkeypatch):
    settings = {"batch_size": 3, "per_device_train_batch_size": 3, "eval_share": 0.4, "num_train_epochs": 1}
    warmup, settings = settings, {**settings, "per_device_train_batch_size": None, "num_train_epochs": 2.5}
    context = context_of(folder, tmp_path, sft=settings, warmup=warmup)
    found = plan_training(context)
    assert list(found["stages"]) == ["sft", "warmup", "dpo"]
    assert (found["gpu"], found["stages"]["sft"]["hours"], found["teacher"]["requests"]) == (None, None, 0)
    sizes, real = [], stage.train_adapter
    noting = lambda *a, **named: sizes.append(a[4]) or real(*a, **named)  # noqa: E731
    monkeypatch.setattr(stage, "train_adapter", noting)
    for report in (train_sft(context), pipeline.train_stage(context, "warmup")):
        planned = found["stages"][report.stage]
        assert (planned["rows"], planned["steps"]) == (report.counts["rows"], report.counts["steps"])
        assert planned["micro_batch"] == sizes.pop(0)


def test_the_plan_omits_the_problems_for_the_threshold(folder, tmp_path):
    context = context_of(folder, tmp_path)
    write_toy(context.run, 200)
    trained = 200 - len(pipeline.unseen(context, "sft"))
    assert trained < 200 - len(pipeline.unseen(context))  # 50 or more for the fit
    assert plan_training(context)["stages"]["sft"]["rows"] == trained


def test_a_plan_that_does_not_fit_ends_with_exit_5_as_json_too(capsys):
    with pytest.raises(DeviceError) as error:
        print_plan({"gpu": {}, "stages": {"sft": {"fits": False}}}, json=True)
    assert error.value.code == 5
    console.error(error.value, as_json=True)  # as the command line does
    shown = json.loads(capsys.readouterr().out)
    assert (shown["stages"]["sft"]["fits"], shown["exit_code"]) == (False, 5)


SUMS = {"model": "openai/teacher", "api_base": "http://127.0.0.1:9/v1"}
# five problems, two samples each
MOST = "corrections: at most 10 by openai/teacher, about $"


@pytest.mark.parametrize(
    ("teacher", "paid", "line"),
    [
        ({**SUMS, "max_cost": 0.5}, 12, f"{MOST}0.20"),
        ({**SUMS, "max_cost": 0.4}, 12, f"{MOST}0.20; teacher.max_cost is $0.4, of which $0.24 is spent"),
        (SUMS, 0, ""),
    ],
    ids=["from the templates", "beyond the limit", "unknown"],
)
def test_train_names_the_cost_of_corrections(folder, tmp_path, monkeypatch, capsys, teacher, paid, line):
    def start(*_):
        raise InterruptedError

    context = context_of(folder, tmp_path, teacher=teacher, attempts={"samples": 2})
    if paid:
        pay(context.run, "templates", *[0.02] * paid)
    monkeypatch.setattr(pipeline, "train_stage", start)
    context.display.quiet = False
    for name in ("attempts.jsonl", "reviews.jsonl"):
        context.run.path(name).unlink()
    with pytest.raises(InterruptedError):
        pipeline.train(context)
    assert " ".join(capsys.readouterr().err.split()) == line
