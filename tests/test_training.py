"""`sclite train` on a tiny student: out of memory, processes of its own, warnings, and what it refuses."""

from contextlib import contextmanager

import pytest

from sclite import pipeline
from sclite.context import Context
from sclite.errors import DeviceError
from sclite.inspect.plan import plan_training
from sclite.progress import ProgressDisplay
from sclite.records import Template
from sclite.run import Run
from sclite.student.loader import load_tokenizer
from sclite.train import sft, stage
from sclite.train.metrics_logger import read_metrics
from tests.toy import pay, tiny_llama, toy_config, write_toy


class Recorder(ProgressDisplay):
    """A screen that remembers what it was told."""

    def __init__(self):
        super().__init__(quiet=True)
        self.notes, self.warnings = [], []

    @contextmanager
    def stage(self, name, text):
        def progress(done, total, *_, note="", warning=""):
            (self.warnings if warning else self.notes).append(warning or (done, total, note))

        yield progress


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("student"))


def train_sft(context: Context):
    return pipeline.train_stage(context, "sft")


def world_of(folder, path, isolated=False, **settings) -> Context:
    run = Run(path)
    write_toy(run, 12)
    config = toy_config(folder, **settings).model_copy(update={"run": str(path)})
    return Context(config, run, Recorder(), isolated=isolated)


def small_card(monkeypatch, rows: int, from_step: int = 0) -> list[int]:
    """Let forward passes of more than so many rows run out of memory, as a card would; the sizes that were tried."""
    import torch

    tried, real = [], sft.negative_log_likelihood

    def limited(model, batch):
        tried.append(len(batch.ids))
        if len(tried) > from_step and len(batch.ids) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(model, batch)

    monkeypatch.setattr(sft, "negative_log_likelihood", limited)
    return tried


def test_out_of_memory_halves_the_rows_at_once_and_goes_on_from_the_last_checkpoint(
    folder, tmp_path, monkeypatch
):
    settings = {"sft": {"per_device_train_batch_size": 4, "num_train_epochs": 6, "checkpoints": 9}}
    whole = world_of(folder, tmp_path / "whole", **settings)
    train_sft(whole)
    context = world_of(folder, tmp_path / "small", **settings)
    tried = small_card(monkeypatch, rows=2, from_step=4)
    train_sft(context)
    warnings = [text for text in context.display.warnings if "optimizer steps" not in text]
    assert warnings == ["out of memory at micro-batch size 4: sft resumes at 2"]
    assert max(tried[5:]) == 2
    rows, expected = (read_metrics(w.run.path("sft/metrics.jsonl")) for w in (context, whole))
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], rel=1e-4)


def test_when_not_even_one_row_fits_it_ends_with_exit_5_and_what_to_lower(folder, tmp_path, monkeypatch):
    context = world_of(folder, tmp_path, sft={"per_device_train_batch_size": 2})
    small_card(monkeypatch, rows=0)
    with pytest.raises(DeviceError, match="sft: out of GPU memory at micro-batch size 1") as error:
        train_sft(context)
    assert error.value.code == 5
    assert "sft.max_length" in error.value.hint
    assert context.run.manifest("sft") is None


def test_another_error_is_not_taken_for_one_of_memory(folder, tmp_path, monkeypatch):
    context = world_of(folder, tmp_path)

    def broken(model, batch):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(sft, "negative_log_likelihood", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        train_sft(context)


def test_in_a_process_of_its_own_a_stage_trains_the_same_and_tells_of_each_step(folder, tmp_path):
    here, there = world_of(folder, tmp_path / "here"), world_of(folder, tmp_path / "there", isolated=True)
    train_sft(here)
    report = train_sft(there)
    assert report.counts == here.reports[-1].counts
    assert [note[:2] for note in there.display.notes] == [note[:2] for note in here.display.notes]
    assert there.display.notes[-1][2].startswith("loss ")
    one, other = (w.run.path("sft/adapter/adapter_model.safetensors").read_bytes() for w in (here, there))
    assert one == other


def test_rows_that_are_too_long_are_told_of_before_the_first_step_and_in_the_line_of_the_stage(
    folder, tmp_path
):
    context = world_of(folder, tmp_path)
    lengths = sorted(_tokens(context))
    limit = lengths[-1] - 1
    config = context.config.model_copy(
        update={"sft": context.config.sft.model_copy(update={"max_length": limit})}
    )
    display = Ordered()
    report = train_sft(Context(config, context.run, display))
    left = report.dropped["longer_than_max_length"]
    assert display.said[0] == (
        f"{left} of {len(lengths)} rows have more than {limit} tokens and are skipped (the longest has "
        f"{lengths[-1]}): raise sft.max_length"
    )
    assert len(display.said) > 2
    assert "only 4 optimizer steps" in display.said[1]
    assert display.said[2].startswith("step 1 of")
    assert f"steps, {left} longer than max length" in display.line


class Ordered(ProgressDisplay):
    """A screen that keeps warnings and steps in the order in which they come."""

    def __init__(self):
        super().__init__(quiet=True)
        self.said, self.line = [], ""

    @contextmanager
    def stage(self, name, text):
        def progress(done, total, *_, note="", warning=""):
            self.said.append(warning or f"step {done} of {total}")

        yield progress

    def done(self, name, text, skipped=False):
        self.line = text


def _tokens(context) -> list[int]:
    """The lengths of the rows of SFT, in tokens."""
    tokenizer, unseen = load_tokenizer(context.config.student.model), pipeline.unseen(context)
    rows = [row for row in context.run.read("templates.jsonl", Template) if row.id not in unseen]
    return [len(row.ids) for row in sft.solve_rows(tokenizer, rows, "")]


def test_attempts_that_do_not_fit_at_once_are_sampled_in_halves(folder, monkeypatch):
    import torch

    from sclite import prompts
    from sclite.student.base import Request
    from sclite.student.hf_model import HFModel
    from sclite.student.loader import load_student

    config = toy_config(folder)
    model, tokenizer = load_student(config, "sft")
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


def test_missing_tensorboard_is_an_error_before_the_first_step(folder, tmp_path, monkeypatch):
    import importlib.util

    from sclite.errors import UsageError

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if name.startswith("tensorboard") else real(name, *a),
    )
    context = world_of(folder, tmp_path, sft={"tensorboard": True})
    with pytest.raises(UsageError, match="tensorboard is enabled but not installed") as error:
        train_sft(context)
    assert "pip install tensorboard" in error.value.hint


def test_the_plan_of_a_run_says_what_each_stage_takes(folder, tmp_path):
    found = plan_training(world_of(folder, tmp_path))
    assert list(found["stages"]) == ["sft", "warmup", "dpo"]
    assert found["gpu"] is None
    assert found["stages"]["sft"]["rows"] > 0
    assert found["stages"]["sft"]["hours"] is None
    assert found["teacher"]["requests"] == 0


def test_the_plan_has_the_steps_rows_and_rows_at_once_of_the_training_that_follows(
    folder, tmp_path, monkeypatch
):
    settings = {
        "batch_size": 3,
        "per_device_train_batch_size": None,
        "num_train_epochs": 2.5,
        "eval_share": 0.4,
    }
    context = world_of(
        folder,
        tmp_path,
        sft=settings,
        warmup={**settings, "per_device_train_batch_size": 3, "num_train_epochs": 1},
    )
    stages = plan_training(context)["stages"]
    sizes = []
    real = stage.train_adapter
    monkeypatch.setattr(
        stage,
        "train_adapter",
        lambda *a, **named: sizes.append(named["micro_batch"]) or real(*a, **named),
    )
    for report in (train_sft(context), pipeline.train_stage(context, "warmup")):
        planned = stages[report.stage]
        assert (planned["rows"], planned["steps"]) == (report.counts["rows"], report.counts["steps"])
        assert planned["micro_batch"] == sizes.pop(0)


def test_a_plan_that_does_not_fit_ends_with_exit_5_as_json_too(capsys):
    import json

    from sclite import console
    from sclite.inspect import summaries

    with pytest.raises(DeviceError) as error:
        summaries.print_plan({"stages": {"sft": {"fits": False}}}, json=True)
    assert error.value.code == 5
    console.error(error.value, as_json=True)  # as the command line does
    shown = json.loads(capsys.readouterr().out)
    assert (shown["stages"]["sft"]["fits"], shown["exit_code"]) == (False, 5)


# -- what the teacher will cost ------------------------------------------------------------------------------------


def told_before_sft(context, monkeypatch, capsys) -> str:
    """What stands on stderr when SFT begins."""

    class Begun(Exception):
        pass

    def begin(*_):
        raise Begun

    monkeypatch.setattr(pipeline, "train_stage", begin)
    context.display.quiet = False
    for name in ("attempts.jsonl", "reviews.jsonl"):
        context.run.path(name).unlink()
    with pytest.raises(Begun):
        pipeline.train(context)
    return capsys.readouterr().err


TEACHER = {"model": "openai/teacher", "api_base": "http://127.0.0.1:9/v1"}


def test_train_says_in_one_line_what_the_corrections_will_cost(folder, tmp_path, monkeypatch, capsys):
    context = world_of(folder, tmp_path, teacher={**TEACHER, "max_cost": 0.5}, attempts={"samples": 2})
    pay(context.run, "templates", *[0.02] * 12)
    said = told_before_sft(context, monkeypatch, capsys)
    line = (
        "corrections after SFT: at most 10 by openai/teacher, about $0.20"  # five problems, two samples each
    )
    assert said.splitlines()[1:] == [line]


def test_a_limit_that_the_corrections_would_reach_is_told_with_their_cost(
    folder, tmp_path, monkeypatch, capsys
):
    context = world_of(folder, tmp_path, teacher={**TEACHER, "max_cost": 0.4}, attempts={"samples": 2})
    pay(context.run, "templates", *[0.02] * 12)
    said = told_before_sft(context, monkeypatch, capsys)
    assert said.endswith("about $0.20; teacher.max_cost is $0.4, $0.24 is spent\n")


def test_without_a_pilot_the_cost_is_reckoned_from_the_price_and_without_a_price_nothing_is_said(
    folder, tmp_path, monkeypatch, capsys
):
    priced = world_of(folder, tmp_path / "a", teacher={**TEACHER, "price": (1000.0, 1000.0)})
    said = told_before_sft(priced, monkeypatch, capsys)
    assert said.splitlines()[-1].startswith("corrections after SFT: at most 20 by openai/teacher, about $")
    assert float(said.rpartition("$")[2]) > 1
    unknown = world_of(folder, tmp_path / "b", teacher=TEACHER)
    assert told_before_sft(unknown, monkeypatch, capsys).splitlines()[1:] == []
