"""The Unsloth path on a real card, with the embedded student: it learns, resumes, says what it uses, and fits."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest

from sclite.config import Config
from sclite.errors import MemoryFault
from sclite.records import Attempt, Problem, Template
from sclite.run import Run
from sclite.student.review import score_request
from sclite.trace import parse
from sclite.train.watch import read_metrics
from tests.train.test_dpo import write_pairs
from tests.train.test_sft import write_toy

pytestmark = pytest.mark.gpu

LORA = {"batch": 4, "micro_batch": 2, "max_length": 1024, "eval_share": 0}


def config_of(backend="unsloth", four_bit=True, **sft) -> Config:
    return Config.model_validate(
        {
            "student": {"model": "embedded", "backend": backend, "batch": 16, "load_in_4bit": four_bit},
            "sft": {**LORA, "rank": 8, "alpha": 16, "learning_rate": 1e-3, "epochs": 8, **sft},
            "dpo": {
                **LORA,
                "warmup_learning_rate": 1e-3,
                "warmup_epochs": 4,
                "learning_rate": 5e-4,
                "epochs": 6,
            },
        }
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(config, run) after SFT, warm-up and DPO through Unsloth in 4 bits."""
    from sclite.train.dpo import train_dpo
    from sclite.train.sft import train_sft
    from sclite.train.warm import train_warm

    run, config = Run(tmp_path_factory.mktemp("run")), config_of()
    write_toy(run, 8)
    train_sft(config, run)
    train_warm(config, run)
    write_pairs(run)
    train_dpo(config, run)
    return config, run


def phase(run: Run, name: str) -> list[dict]:
    file = "sft/metrics.jsonl" if name == "sft" else "dpo/metrics.jsonl"
    return [row for row in read_metrics(run.path(file)) if row["phase"] == name]


def test_every_stage_learns_and_every_factor_of_the_adapter_moves(trained):
    from safetensors.torch import load_file

    _, run = trained
    for name in ("sft", "warm", "dpo"):
        rows = phase(run, name)
        assert rows[-1]["loss"] < rows[0]["loss"] - 0.05, name
        assert rows[-1]["memory_gb"] < 24
    for folder in ("sft/adapter", "dpo/warm", "dpo/adapter"):
        weights = load_file(run.path(f"{folder}/adapter_model.safetensors"))
        assert {str(value.dtype) for value in weights.values()} == {"torch.float32"}
        assert all(float(value.abs().max()) > 0 for value in weights.values()), folder
        assert not [name for name in weights if "ref" in name.split(".")]


def test_dpo_starts_at_ln_2_in_16_bits(trained):
    _, run = trained
    first = phase(run, "dpo")[0]
    assert first["dpo_loss"] == pytest.approx(math.log(2), abs=0.02)
    assert abs(first["margin"]) < 0.02


@pytest.mark.parametrize("backend", ["unsloth", "plain"])
def test_rows_end_to_end_padded_and_alone_have_the_same_hidden_states(trained, backend):
    import torch

    from sclite.student.forward import autocast, hidden_states, pad
    from sclite.student.load import load_student
    from sclite.train.sft import solve_rows

    _, run = trained
    config = config_of(backend)
    model, tokenizer = load_student(config.student, config.sft, run.path("sft/adapter"), train=True)
    rows = solve_rows(tokenizer, run.read("templates.jsonl", Template), "")[:3]
    rows[1] = type(rows[1])(rows[1].ids[:70], rows[1].weights[:70])
    found = {}
    for name, packed, training in (("packed", True, True), ("padded", False, True), ("used", False, False)):
        model.padding_free = packed
        model.train(training)
        batch = {key: value.cuda() for key, value in pad(rows, tokenizer.pad_token_id).items()}
        with torch.no_grad(), autocast(model):
            hidden = hidden_states(model, batch["input_ids"], batch["attention_mask"]).float()
        found[name] = torch.cat([hidden[i, : len(row.ids)] for i, row in enumerate(rows)])
    scale = float(found["padded"].abs().mean())
    for name in ("packed", "used"):
        assert float((found[name] - found["padded"]).abs().mean()) < 0.02 * scale, name


def test_the_odds_in_use_are_those_that_were_trained(trained):
    from sclite.student.load import load_student
    from sclite.student.trainable import Trainable

    _, run = trained
    questions = {p.id: p.question for p in run.read("problems.jsonl", Problem)}
    works = {a.id: parse(a.trace).trace for a in run.read("attempts.jsonl", Attempt)}
    requests = [score_request(questions[id], work) for id, work in works.items()]
    found = {}
    for backend in ("unsloth", "plain"):
        chosen = config_of(backend)
        model, tokenizer = load_student(chosen.student, chosen.sft, run.path("dpo/adapter"))
        found[backend] = [odds for s in Trainable(model, tokenizer, 4).score(requests) for odds in s.log_odds]
    for one, other in zip(found["unsloth"], found["plain"], strict=True):
        assert one == pytest.approx(other, abs=0.25)


def test_many_attempts_at_once_are_those_of_the_plain_path(trained):
    from sclite import prompts
    from sclite.student.base import Request
    from sclite.student.load import load_student
    from sclite.student.trainable import Trainable

    _, run = trained
    problems = run.read("problems.jsonl", Problem) * 4
    requests = [Request(prompts.solve_messages(p.question), max_tokens=48) for p in problems]
    found = {}
    for backend in ("unsloth", "plain"):
        chosen = config_of(backend)
        model, tokenizer = load_student(chosen.student, chosen.sft, run.path("sft/adapter"))
        found[backend] = [reply.text for reply in Trainable(model, tokenizer, 32).generate(requests)]
    same = sum(one == other for one, other in zip(found["unsloth"], found["plain"], strict=True))
    assert same >= 0.75 * len(requests)  # near ties may fall either way in 16 bits


CHILD = """
import sys
from sclite.config import Config
from sclite.run import Run
from sclite.train.sft import train_sft
train_sft(Config.model_validate_json(sys.argv[1]), Run(sys.argv[2]))
"""


def test_killed_on_the_card_it_goes_on_where_it_was(tmp_path):
    from sclite.train.sft import train_sft

    config = config_of(epochs=40, checkpoints=8)
    whole, broken = Run(tmp_path / "whole"), Run(tmp_path / "broken")
    for run in (whole, broken):
        write_toy(run, 8)
    train_sft(config, whole)
    command = [sys.executable, "-c", CHILD, config.model_dump_json(), str(broken.folder)]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    while process.poll() is None and not list(broken.path("sft/checkpoints").glob("*/whole.json")):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(broken.path("sft/checkpoints").glob("*/whole.json"))
    train_sft(config, broken)
    rows, expected = phase(broken, "sft"), phase(whole, "sft")
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], abs=0.02)


def test_a_card_that_is_too_small_is_a_memory_fault(tmp_path):
    import torch

    from sclite.train.sft import train_sft

    run = Run(tmp_path)
    write_toy(run, 8)
    total, before = torch.cuda.mem_get_info()[1], torch.cuda.get_per_process_memory_fraction()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 60e6) / total)
    try:
        with pytest.raises(MemoryFault, match="too little memory"):
            train_sft(config_of(batch=64, micro_batch=64, epochs=16), run)
    finally:
        torch.cuda.set_per_process_memory_fraction(before)


def test_a_card_that_is_not_there_is_exit_5():
    command = [sys.executable, "-m", "sclite", "train", "--gpu", "77", "--set", "student.model=embedded"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 5
    assert "no CUDA card 77" in done.stderr


@pytest.mark.parametrize(
    ("name", "stage", "most_gb"),
    [
        ("qwen2.5-math-7b", "sft", 12),
        ("qwen2.5-math-7b", "dpo", 20),
        ("llama-3.1-8b", "sft", 24),
        ("llama-3.1-8b", "dpo", 24),
    ],
)
def test_seven_and_eight_billion_parameters_fit(name, stage, most_gb, tmp_path):
    """Rows of 2,048 tokens, rank 32; each in a process of its own, which prints its figures."""
    command = [
        *(sys.executable, "-m", "tests.benchmarks.bench_train", "--side", "ours", "--stage", stage, "--full"),
        *("--geometry", name, "--micro", "2", "--steps", "3", "--models", str(tmp_path)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["peak_gb"] <= most_gb
