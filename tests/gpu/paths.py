"""The same figures with both backends, which cannot share a process: Unsloth patches transformers.

python -m tests.gpu.paths NAME RUN      figures of the plain backend, as JSON
"""

import json
import os
import subprocess
import sys
from typing import Any

from sclite import prompts
from sclite.config import Config
from sclite.records import Attempt, Problem, Template
from sclite.run import Run
from sclite.student.base import Request
from sclite.student.loader import load_student
from sclite.trace import parse, render
from sclite.train.stage import quiet_libraries
from tests.toy import toy_config


def config_of(backend: str = "unsloth", four_bit: bool = True, **sft: Any) -> Config:
    """A short training of the embedded student, in 4 bits, with high learning rates."""
    return toy_config(
        "embedded",
        student={"backend": backend, "batch": 16, "load_in_4bit": four_bit},
        sft={"learning_rate": 1e-3, "num_train_epochs": 8, **sft},
        warmup={"learning_rate": 1e-3},
        dpo={"learning_rate": 5e-4, "num_train_epochs": 6},
    )


def figures(name: str, backend: str, run: Run) -> Any:
    """The result of a function of this module; with the plain backend, from a new process."""
    if backend == "unsloth":
        return FIGURES[name](backend, run)
    command = [sys.executable, "-m", "tests.gpu.paths", name, str(run.folder)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def loaded(backend: str, run: Run, stage: str, train: bool = False) -> tuple[Any, Any]:
    """(model, tokenizer) with the adapter of a stage."""
    config = config_of(backend)
    quiet_libraries(config.student)
    return load_student(config, "sft", run.path(f"{stage}/adapter"), train=train)


def hidden_gaps(backend: str, run: Run) -> dict[str, float]:
    """Relative difference of hidden states from padded rows in training: padding-free ones, and padded ones in evaluation."""
    import torch

    from sclite.student.log_probs import autocast, hidden_states, pad
    from sclite.train.sft import solve_rows

    model, tokenizer = loaded(backend, run, "sft", train=True)
    rows = solve_rows(tokenizer, run.read("templates.jsonl", Template), "")[:3]
    rows[1] = type(rows[1])(rows[1].ids[:70], rows[1].weights[:70])
    found = {}
    for name, packed, training in (("padded", False, True), ("packed", True, True), ("used", False, False)):
        model.padding_free = packed
        model.train(training)
        with torch.no_grad(), autocast(model):
            hidden = hidden_states(model, pad(rows, tokenizer.pad_token_id))
        places = [(i, column) for i, row in enumerate(rows) for column in range(len(row.ids))]
        found[name] = hidden.at(*zip(*places, strict=True)).float()
    padded = found.pop("padded")
    return {name: float((got - padded).abs().mean() / padded.abs().mean()) for name, got in found.items()}


def odds(backend: str, run: Run) -> list[float]:
    """Log-odds that each step of each attempt is wrong, from the DPO student."""
    import torch

    from sclite.student.log_probs import autocast, hidden_states, pad
    from sclite.student.tokenization import decision_ids, encode_review

    questions = {p.id: p.question for p in run.read("problems.jsonl", Problem)}
    works = {a.id: parse(a.trace).trace for a in run.read("attempts.jsonl", Attempt)}
    model, tokenizer = loaded(backend, run, "dpo")
    model.eval()
    head = model.get_output_embeddings().weight[list(decision_ids(tokenizer))]
    found = []
    for id, work in works.items():
        row = encode_review(tokenizer, prompts.review_messages(questions[id], render(work)), work)
        with torch.no_grad(), autocast(model):
            hidden = hidden_states(model, pad([row], tokenizer.pad_token_id))
        logits = hidden.at([0] * len(row.marks), row.marks).float() @ head.float().T
        found += (logits[:, 0] - logits[:, 1]).tolist()
    return found


def attempts(backend: str, run: Run) -> list[str]:
    """Greedy attempts by the SFT student, in batches of 32."""
    from sclite.student.hf_model import HFModel

    problems = run.read("problems.jsonl", Problem) * 4
    requests = [Request(prompts.solve_messages(p.question), max_tokens=48) for p in problems]
    model, tokenizer = loaded(backend, run, "sft")
    return [reply.text for reply in HFModel(model, tokenizer, 32).generate(requests)]


FIGURES = {function.__name__: function for function in (hidden_gaps, odds, attempts)}

if __name__ == "__main__":
    print(json.dumps(FIGURES[sys.argv[1]]("plain", Run(sys.argv[2]))))
